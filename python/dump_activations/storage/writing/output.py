"""One output file under construction: reserved whole, written at offsets, renamed when complete.

The order on disk: batches, then their records in the journal. When all batches are there: the other
tensors and the skeleton without its last bytes, a flush, the last bytes of the skeleton, a flush,
the rename. So a file under the final name is always whole, and a partial file that carries its last
bytes is too. docs/file-format.md has the order in full.
"""

import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from dump_activations import _rust
from dump_activations.errors import OutputError, switch
from dump_activations.interrupts import in_parallel
from dump_activations.storage.digests import INTEGRITY_KEY, Digest, RunningDigest, parse_integrity
from dump_activations.storage.formats.registry import format_of
from dump_activations.storage.statistics import Moments, RunningStatistics
from dump_activations.storage.writing.journal import (
    BatchDigests,
    Journal,
    JournalError,
    read_journal,
    remove_journal,
)
from dump_activations.storage.writing.partial import Partial
from dump_activations.storage.writing.work import FileWork

_VERIFY_THREADS = 8


class OtherWorkError(OutputError):
    """A file at the output, or next to it, that another call made."""

    def __init__(self, path: Path, differing: str) -> None:
        what = f", which differs in {differing}" if differing else ""
        super().__init__(
            f"{path} is of other work{what}; repeat that call, choose another output, or replace "
            f"the file with {switch('overwrite')}"
        )


class OutputFile:
    """A partial file that this process writes, in any order and from any thread.

    Leaving its context suspends it.
    """

    def __init__(
        self,
        work: FileWork,
        partial: Partial,
        *,
        overwrite: bool = False,
        replaced: tuple[int, int] | None = None,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        """Resume a partial file of the same work, or reserve the space of the whole file.

        Args:
            work: the file to write.
            partial: its partial file, which this call takes over and closes if it fails.
            overwrite: start a partial file of other work over.
            replaced: size and time of the finished file that this one may replace.
            check: called between reads of a partial file; may raise.

        Raises:
            OutputError: the disk is full, or the partial file is of other work.
        """
        self.work = work
        self.statistics = RunningStatistics(list(work.specs.values()))
        self.restarted_because: str | None = None  # why an earlier partial file was dropped
        self._partial = partial
        self._replaced = replaced
        self._computed_by = [work.work.computed_by]
        self._resumed: dict[int, BatchDigests] = {}
        self._is_whole = False
        self._digests = {name: RunningDigest() for name in work.specs}
        self._lock, self._catching_up = Lock(), Lock()
        self._journal: Journal | None = None
        try:
            if not partial.is_new:
                self._resume(check, overwrite=overwrite)
            self._unwritten = work.batches - len(self._resumed)
            if not self._is_whole:
                self._reserve()
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.suspend()

    @property
    def partial(self) -> Path:
        """Name of the file until it is complete."""
        return self._partial.path

    @property
    def size(self) -> int:
        """Bytes of the finished file."""
        return self.work.empty_layout.size

    @property
    def missing(self) -> list[range]:
        """Ranges of batches, ascending, that earlier runs have not written."""
        found: list[range] = []
        for batch in range(0 if self._is_whole else self.work.batches):
            if batch not in self._resumed:
                start = found.pop().start if found and found[-1].stop == batch else batch
                found.append(range(start, batch + 1))
        return found

    @property
    def resumed_rows(self) -> int:
        """Boards that earlier runs have written."""
        return self.work.rows if self._is_whole else self.work.header.count_rows(self._resumed)

    @property
    def last_resumed(self) -> tuple[int, BatchDigests] | None:
        """Number and digests of the last batch that earlier runs have written."""
        return max(self._resumed.items(), default=None, key=lambda each: each[0])

    def write(self, name: str, data: npt.NDArray[np.uint8]) -> None:
        """Write the bytes of a tensor that does not come in batches."""
        assert name not in self.work.work.batched, name
        if not self._is_whole:
            offset = self.work.empty_layout.offsets[name]
            digest = self._partial.write_span(offset, data, self.work.specs[name].dtype)
            self._digests[name] = RunningDigest()
            self._digests[name].add(0, digest)

    def write_span(self, batch: int, name: str, start: int, data: npt.NDArray[np.uint8]) -> Digest:
        """Write bytes that begin `start` bytes into a batch of a tensor, and digest them.

        The bytes count once `finish_batch` was called.

        Raises:
            OutputError: the system refused; `errno` is its reason.
        """
        offset, _ = self.work.span_of(batch, name)
        return self._partial.write_span(offset + start, data, self.work.specs[name].dtype)

    def finish_batch(
        self, batch: int, digests: BatchDigests, moments: Mapping[str, Moments]
    ) -> bool:
        """Record a batch that `write_span` has written; return True where it is the last one.

        Raises:
            OutputError: data written earlier could not be brought to disk.
        """
        # Before the batch counts as finished: the thread that finishes the last one commits.
        if self.statistics.names:
            self.statistics.add(batch, moments)
            self._read_resumed_statistics()
        with self._lock, OutputError.when(f"cannot write {self.partial}"):
            assert self._journal is not None
            self._add_digests(batch, digests)
            self._unwritten -= 1
            self._journal.add(batch, digests, is_last=not self._unwritten)
            return not self._unwritten

    def commit(self) -> None:
        """Complete the file, and give it its final name.

        Raises:
            OutputError: the system refused. An existing target is as it was.
        """
        target = self.work.target
        with OutputError.when(f"cannot write {target}"):
            if not self._is_whole:
                self._complete()
            self._partial.publish(self._replaced)
        try:
            with OutputError.when(f"{target} is complete, but its directory cannot be tidied"):
                self._partial.mount.sync_directory(target.parent)
                remove_journal(target)
        finally:
            self._close()

    def suspend(self, *, discard: bool = False) -> int:
        """Leave what is on disk for a later run, and return the boards that are kept.

        Without any, or to discard them, nothing is left behind. An existing target stays. No writer
        may be at work.
        """
        if not self._partial.is_held:
            return 0
        kept = set(range(self.work.batches)) if self._is_whole else set()
        if self._journal is not None:
            with suppress(OSError):  # Recorded batches are on disk. The others are written again.
                self._journal.stop(keep=not discard)
            kept |= self._journal.batches
        if kept and not discard and self._partial.is_in_place:
            self._close()
            return self.work.header.count_rows(kept)
        with suppress(OSError):
            if self._journal is not None:
                self._journal.remove()
            # The lock is found by the partial file's name, so the name goes last.
            if self._partial.is_in_place:
                remove_journal(self.work.target)
                self._partial.remove()
        self._close()
        return 0

    def _resume(self, check: Callable[[], object], *, overwrite: bool) -> None:
        """Find batches that can be kept: journalled, and verified against the disk."""
        target, partial = self.work.target, self._partial
        with OutputError.when(f"cannot read {partial.path}"):
            partial.sync()
            # Pages that could not be written back may still be in the cache, and look right there.
            os.posix_fadvise(partial.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self._is_whole = self._has_completion_mark()
        if self._is_whole:
            return
        try:
            recorded = read_journal(target)
            if recorded.header != self.work.header:
                differing = self.work.work.differences(recorded.header.work)
                if not overwrite:
                    raise OtherWorkError(partial.path, differing)
                raise JournalError(f"it is of other work, which differs in {differing}")
            if partial.size != self.size:
                raise JournalError("its size differs from the file's")
            with OutputError.when(f"cannot read {partial.path}"):
                self._resumed = self._verified(recorded.batches, check)
            if not self._resumed:
                raise JournalError("no batch of it is whole")
        except JournalError as error:
            if partial.size:
                self.restarted_because = str(error)
            os.ftruncate(partial.fd, 0)  # The file stays the same, so the lock does too.
            return
        earlier = [each for each in recorded.header.computed_by if each not in self._computed_by]
        self._computed_by = [*earlier, *self._computed_by]
        for batch, digests in self._resumed.items():
            self._add_digests(batch, digests)

    def _has_completion_mark(self) -> bool:
        with (
            suppress(OSError, ValueError, KeyError),
            Path(f"/proc/self/fd/{self._partial.fd}").open("rb") as file,
        ):
            metadata = format_of(self.work.target).read(file, self._partial.size).metadata
            parse_integrity(metadata[INTEGRITY_KEY])
            return self.work.is_described_by(metadata)
        return False

    def _verified(
        self, candidates: Mapping[int, BatchDigests], check: Callable[[], object]
    ) -> dict[int, BatchDigests]:
        """Return the batches whose bytes in the file have the recorded digests."""
        found: dict[int, BatchDigests] = {}

        def is_whole(batch: int) -> bool:
            for name, digest in candidates[batch].items():
                start, stop = self.work.span_of(batch, name)
                dtype = self.work.specs[name].dtype
                counts = _rust.digest_span(self._partial.fd, start, stop - start, dtype)
                if Digest(stop - start, *counts) != digest:
                    return False
            return True

        def take(batch: int, whole: bool) -> None:  # noqa: FBT001 -- the result of is_whole
            check()
            if whole:
                found[batch] = candidates[batch]

        in_parallel(is_whole, sorted(candidates), _VERIFY_THREADS, take)
        return found

    def _reserve(self) -> None:
        """Take the space of the file, and begin its journal with the batches that it has."""
        try:
            with OutputError.when(f"cannot reserve {self.size:,} bytes for {self.work.target}"):
                fd, mount = self._partial.fd, self._partial.mount
                # Without fallocate, `check_space` has compared them with the free space.
                if not mount.can_reserve or not _rust.reserve(fd, self.size):
                    os.ftruncate(fd, self.size)
            header = replace(
                self.work.header,
                computed_by=tuple(self._computed_by),
                host=platform.node(),
                pid=os.getpid(),
            )
            self._journal = Journal(self._partial, header, self._resumed)
        except BaseException:
            if not self._resumed:
                self.suspend(discard=True)
            raise

    def _add_digests(self, batch: int, digests: BatchDigests) -> None:
        for name, digest in digests.items():
            start, _ = self.work.span_of(batch, name)
            self._digests[name].add(start - self.work.empty_layout.offsets[name], digest)

    def _read_resumed_statistics(self, *, wait: bool = False) -> None:
        """Read resumed batches back for the statistics, when their turn comes.

        Statistics are merged in the order of the batches, so that their bits do not depend on the
        order in which batches are written. One thread reads. The others go on writing.
        """
        while self.statistics.next_batch in self._resumed:
            if not self._catching_up.acquire(blocking=wait):
                return
            try:
                batch = self.statistics.next_batch
                if batch in self._resumed:
                    self.statistics.add(batch, self._moments_on_disk(batch))
            finally:
                self._catching_up.release()

    def _moments_on_disk(self, batch: int) -> dict[str, Moments]:
        found = {}
        for name in self.statistics.names:
            start, stop = self.work.span_of(batch, name)
            path = f"/proc/self/fd/{self._partial.fd}"
            data = np.fromfile(path, np.uint8, stop - start, offset=start)
            if len(data) < stop - start:
                raise OutputError(f"{self.partial} was cut short while it was being written")
            found[name] = self.statistics.measure(name, data)
        return found

    def _complete(self) -> None:
        """Write everything but the batches. The completion mark comes last."""
        assert self._journal is not None
        self._journal.stop(keep=False)
        if self.statistics.names:
            self._read_resumed_statistics(wait=True)
        for name, values in self.statistics.tensors().items():
            self.write(name, values.reshape(-1).view(np.uint8))
        digests = {name: running.whole for name, running in self._digests.items()}
        for name, spec in self.work.specs.items():
            assert digests[name].nbytes == spec.nbytes, f"{name} was not written whole"
        layout = self.work.layout(self._computed_by, digests)
        assert (layout.size, layout.offsets) == (self.size, self.work.empty_layout.offsets)
        *skeleton, mark = ((at, np.frombuffer(data, np.uint8)) for at, data in layout.skeleton)
        for offset, data in skeleton:
            self._partial.write_span(offset, data, "uint8")
        # A partial file with its last bytes is taken for whole, so the rest must be on disk first.
        self._partial.sync()
        self._partial.write_span(*mark, "uint8")
        self._is_whole = True

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.close()
        self._partial.close()
