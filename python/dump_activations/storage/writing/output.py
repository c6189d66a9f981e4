"""One output file under construction: reserved whole, written at offsets, renamed when complete.

The order on disk: batches, then their records in the journal. When all batches are there: the other
tensors and the skeleton without its last bytes, a flush, the last bytes of the skeleton, a flush,
the rename. So a file under the final name is always whole, and a partial file that carries its last
bytes is too. docs/file-format.md has the order in full.
"""

import os
import platform
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from dump_activations import _rust
from dump_activations.errors import OutputError, switch
from dump_activations.storage.digests import Digest, RunningDigest, parse_integrity
from dump_activations.storage.formats.registry import format_of
from dump_activations.storage.parallel import in_parallel
from dump_activations.storage.reading.inspection import READ_NBYTES
from dump_activations.storage.statistics import Moments, RunningStatistics
from dump_activations.storage.writing.journal import (
    BatchDigests,
    Journal,
    JournalError,
    read_journal,
    remove_journal,
)
from dump_activations.storage.writing.partial import Partial
from dump_activations.storage.writing.paths import sync_directory
from dump_activations.storage.writing.work import FINGERPRINT_KEY, FileWork, computed_by_text

SYNC_INTERVAL = 0.5
"""Seconds between two flushes: the work that a crash may cost, against the cost of a flush."""

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

    Use it as a context manager: leaving it early is `suspend()`. No writer may be at work then.

    Attributes:
        work: the tensors and batches of the file.
        missing: ranges of batches, ascending, that no earlier run has written.
        resumed_rows: boards of the other batches.
        last_resumed: number and digests of the last one of them; None without any.
        restarted_because: why an earlier partial file was dropped; None if there was none.
        is_committed: True once the file has its final name.
    """

    def __init__(
        self, work: FileWork, partial: Partial, *, replaced: os.stat_result | None = None
    ) -> None:
        """Private: `OutputFile.begin` makes one."""
        self.work = work
        self.is_committed = False
        self.restarted_because: str | None = None
        self._partial = partial
        self._replaced = replaced
        self._computed_by = [work.work.computed_by]
        self._resumed: dict[int, BatchDigests] = {}
        self._finished: set[int] = set()
        self._lock = Lock()
        self._sync: _BackgroundSync | None = None
        self._last: dict[int, BatchDigests] = {}
        self._journal: Journal | None = None
        self._digests = {name: RunningDigest() for name in work.specs}
        self._statistics = RunningStatistics(list(work.specs.values()))
        self._catching_up = Lock()
        self._published_digests: Mapping[str, Digest] | None = None

    @classmethod
    def begin(
        cls,
        work: FileWork,
        partial: Partial,
        *,
        start_over: bool = False,
        replaced: os.stat_result | None = None,
        check: Callable[[], object] = lambda: None,
    ) -> "OutputFile":
        """Resume a partial file of the same work, or reserve the space of the whole file.

        Args:
            work: the file to write.
            partial: its partial file, which this call takes over and closes if it fails.
            start_over: drop what an earlier run wrote, even of other work.
            replaced: the finished file that this one may replace, as it was found.
            check: called between reads of a partial file; may raise.

        Raises:
            OutputError: the disk is full, or the partial file is of other work.
        """
        file = cls(work, partial, replaced=replaced)
        try:
            if not partial.is_new and not start_over:
                file._resume(check)
            elif not partial.is_new:
                partial.clear()
            if file._published_digests is None:
                file._reserve()
        except BaseException:
            file._close()
            raise
        return file

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.suspend()

    @property
    def partial(self) -> Path:
        """Name of the file until it is complete."""
        return self._partial.path

    @property
    def computed_by(self) -> str:
        """JSON list of the devices and threads of all runs that wrote batches."""
        return computed_by_text(self._computed_by).rstrip()

    @property
    def size(self) -> int:
        """Bytes of the finished file."""
        return self.work.empty_layout.size

    @property
    def missing(self) -> list[range]:
        """Ranges of batches that earlier runs have not written."""
        if self._published_digests is not None:
            return []
        found: list[range] = []
        for batch in range(self.work.batches):
            if batch not in self._resumed:
                start = found.pop().start if found and found[-1].stop == batch else batch
                found.append(range(start, batch + 1))
        return found

    @property
    def resumed_rows(self) -> int:
        """Boards that earlier runs have written."""
        if self._published_digests is not None:
            return self.work.rows
        return self.work.count_rows(self._resumed)

    @property
    def last_resumed(self) -> tuple[int, BatchDigests] | None:
        """Number and digests of the last batch that earlier runs have written."""
        return max(self._resumed.items(), default=None, key=lambda each: each[0])

    @property
    def measured(self) -> Collection[str]:
        """Names of the batched tensors whose statistics are stored."""
        return self._statistics.names

    def measure(self, name: str, data: npt.NDArray[np.uint8]) -> Moments:
        """Return the statistics of a batch of a tensor, given as its bytes."""
        return self._statistics.measure(name, data)

    def write(self, name: str, data: npt.NDArray[np.uint8]) -> None:
        """Write the bytes of a tensor that does not come in batches."""
        assert name not in self.work.work.batched, name
        if self._published_digests is None:
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
        self, batch: int, digests: BatchDigests, moments: Mapping[str, Moments] | None = None
    ) -> bool:
        """Record a batch that `write_span` has written; return True where it is the last one.

        Raises:
            OutputError: data written earlier could not be brought to disk.
        """
        assert digests.keys() == set(self.work.work.batched)
        if self.measured:
            # Before the batch counts as finished: the thread that finishes the last one commits.
            self._statistics.add(batch, moments or {})
            self._read_resumed_statistics()
        with self._lock:
            assert batch not in self._finished, "a batch was written twice"
            self._add_digests(batch, digests)
            self._finished.add(batch)
            if len(self._finished) == self.work.batches:
                # The commit flushes the data anyway, so only a suspended file needs the record.
                self._last = {batch: digests}
                return True
            if self._sync is None:
                assert self._journal is not None
                self._sync = _BackgroundSync(self._partial, self._journal)
            with OutputError.when(f"cannot write {self._partial.path}"):
                self._sync.add(batch, digests)
        return False

    def commit(self) -> Mapping[str, Digest]:
        """Complete the file, give it its final name, and return the digest of each tensor.

        Raises:
            OutputError: the system refused. An existing target is as it was.
        """
        with OutputError.when(f"cannot write {self.work.target}"):
            if self._published_digests is None:
                self._complete()
            self._partial.publish(self._replaced)
        self.is_committed = True
        assert self._published_digests is not None
        digests = self._published_digests
        try:
            what = f"{self.work.target} is complete, but its directory cannot be tidied"
            with OutputError.when(what):
                sync_directory(self.work.target.parent)
                remove_journal(self.work.target)
        finally:
            self._close()
        return digests

    def suspend(self) -> int:
        """Leave what is on disk for a later run, and return the boards that are kept.

        Without any, nothing is left behind.
        """
        if self._partial.is_closed or not self._partial.is_of_this_process:
            return 0
        with suppress(OSError):  # Journalled batches are on disk. The others are written again.
            self._stop_sync()
        kept = set() if self._journal is None else self._journal.batches
        if kept and self._partial.is_in_place():
            self._close()
            return self.work.count_rows(kept)
        self.discard()
        return 0

    def discard(self) -> None:
        """Remove the partial file and its journal. An existing target stays."""
        if self._partial.is_closed or not self._partial.is_of_this_process:
            return
        with suppress(OSError):
            self._stop_sync(keep=False)
        with suppress(OSError):
            if self._journal is not None:
                self._journal.remove()
            # The lock is found by the partial file's name, so the name goes last.
            if self._partial.is_in_place():
                remove_journal(self.work.target)
                self._partial.remove()
        self._close()

    def _resume(self, check: Callable[[], object]) -> None:
        """Find batches that can be kept: journalled, and verified against the file."""
        self._published_digests = self._digests_of_whole_file()
        if self._published_digests is not None:
            return
        try:
            recorded = read_journal(self.work.target)
            if recorded.header != self.work.header:
                differing = self.work.work.differences(recorded.header.work)
                raise OtherWorkError(self._partial.path, differing)
            if self._partial.size != self.size:
                raise JournalError("its size differs from the file's")
            with OutputError.when(f"cannot read {self._partial.path}"):
                self._partial.sync()
                self._partial.drop_cache()
                self._resumed = self._verified(recorded.batches, check)
            if not self._resumed:
                raise JournalError("no batch of it is whole")
        except JournalError as error:
            if self._partial.size:
                self.restarted_because = str(error)
            self._partial.clear()
            return
        earlier = [each for each in recorded.header.computed_by if each not in self._computed_by]
        self._computed_by = [*earlier, *self._computed_by]
        for batch, digests in self._resumed.items():
            self._add_digests(batch, digests)
        self._finished = set(self._resumed)

    def _digests_of_whole_file(self) -> Mapping[str, Digest] | None:
        """Read the digests of a partial file that is complete but for its name; None for others."""
        try:
            with Path(f"/proc/self/fd/{self._partial.fd}").open("rb") as file:
                contents = format_of(self.work.target).read(file, self._partial.size)
            metadata = contents.metadata
            shard = metadata.get("shard", "")
            if (metadata.get(FINGERPRINT_KEY), shard) == self._identity:
                return parse_integrity(metadata["integrity"])
        except (OSError, ValueError, KeyError):
            pass
        return None

    @property
    def _identity(self) -> tuple[str, str]:
        return self.work.work.fingerprint, self.work.header.shard

    def _verified(
        self, candidates: Mapping[int, BatchDigests], check: Callable[[], object]
    ) -> dict[int, BatchDigests]:
        """Return the batches whose bytes in the file have the recorded digests."""
        found: dict[int, BatchDigests] = {}

        def is_whole(batch: int) -> bool:
            digests = candidates[batch]
            return self.work.fits(batch, digests) and all(
                self._read_digest(batch, name) == digest for name, digest in digests.items()
            )

        def take(batch: int, whole: bool) -> None:  # noqa: FBT001 -- the result of is_whole
            check()
            if whole:
                found[batch] = candidates[batch]

        in_parallel(is_whole, sorted(candidates), _VERIFY_THREADS, take)
        return found

    def _read_digest(self, batch: int, name: str) -> Digest:
        start, stop = self.work.span_of(batch, name)
        digest = Digest()
        for at in range(start, stop, READ_NBYTES):
            nbytes = min(READ_NBYTES, stop - at)
            dtype = self.work.specs[name].dtype
            digest += Digest(nbytes, *_rust.digest_span(self._partial.fd, at, nbytes, dtype))
        return digest

    def _reserve(self) -> None:
        """Take the space of the file, and begin its journal with the batches that it has."""
        try:
            with OutputError.when(f"cannot reserve {self.size:,} bytes for {self.work.target}"):
                self._partial.reserve(self.size)
            header = replace(
                self.work.header,
                computed_by=tuple(self._computed_by),
                host=platform.node(),
                pid=os.getpid(),
            )
            self._journal = Journal(self.work.target, header, self._resumed)
        except OutputError:
            if not self._resumed:
                self.discard()
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
        while self._statistics.next_batch in self._resumed:
            if not self._catching_up.acquire(blocking=wait):
                return
            try:
                batch = self._statistics.next_batch
                if batch in self._resumed:
                    self._statistics.add(batch, self._moments_on_disk(batch))
            finally:
                self._catching_up.release()

    def _moments_on_disk(self, batch: int) -> dict[str, Moments]:
        found = {}
        for name in self.measured:
            start, stop = self.work.span_of(batch, name)
            data = np.empty(stop - start, np.uint8)
            _read_exactly(self._partial, start, data)
            found[name] = self.measure(name, data)
        return found

    def _complete(self) -> None:
        """Write everything but the batches. The completion mark comes last."""
        self._stop_sync(keep=False)
        if self.measured:
            self._read_resumed_statistics(wait=True)
        for name, values in self._statistics.tensors().items():
            self.write(name, values.reshape(-1).view(np.uint8))
        digests = {name: running.whole for name, running in self._digests.items()}
        for name, spec in self.work.specs.items():
            assert digests[name].nbytes == spec.nbytes, f"{name} was not written whole"
        layout = self.work.layout(self._computed_by, digests)
        assert (layout.size, layout.offsets) == (self.size, self.work.empty_layout.offsets)
        *skeleton, (last_offset, last_bytes) = layout.skeleton
        for offset, data in skeleton:
            self._partial.write_bytes(offset, data)
        # A partial file with its last bytes is taken for whole, so the rest must be on disk first.
        self._partial.sync()
        self._partial.write_bytes(last_offset, last_bytes)
        self._published_digests = digests

    def _stop_sync(self, *, keep: bool = True) -> None:
        sync, self._sync = self._sync, None
        if sync is not None:
            sync.close(keep=keep)
        if keep and self._last and self._journal is not None:
            self._partial.sync()
            self._journal.append(self._last)

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.close()
        self._partial.close()


class _BackgroundSync:
    """A thread that flushes the file and journals its batches while it is being written.

    Without it all of the data would be flushed at the end. A batch enters the journal after its
    data is on disk. A failure is raised by the next call.
    """

    def __init__(self, partial: Partial, journal: Journal) -> None:
        self._partial = partial
        self._journal = journal
        self._written: dict[int, BatchDigests] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="output-sync", daemon=True)
        self._thread.start()

    def add(self, batch: int, digests: BatchDigests) -> None:
        """Note that all data of a batch has been written."""
        with self._changed:
            if self._error is not None:
                raise self._error
            self._written[batch] = digests
            self._changed.notify()

    def close(self, *, keep: bool) -> None:
        """End the thread; `keep` journals all that was written before."""
        with self._changed:
            self._closing = True
            if not keep:
                self._written.clear()
            self._changed.notify()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while batches := self._next_batches():
                self._partial.sync()
                self._journal.append(batches)
        except Exception as error:  # raised by the next call
            with self._changed:
                self._error = error

    def _next_batches(self) -> dict[int, BatchDigests]:
        """Wait for batches to journal. None are left only when the file is being closed."""
        with self._changed:
            deadline = time.monotonic() + SYNC_INTERVAL
            while not self._closing and (
                not self._written or (remaining := deadline - time.monotonic()) > 0
            ):
                self._changed.wait(remaining if self._written else None)
            batches, self._written = self._written, {}
            return batches


def _read_exactly(partial: Partial, offset: int, data: npt.NDArray[np.uint8]) -> None:
    view, done = data.data, 0
    while done < len(view):
        count = os.preadv(partial.fd, [view[done:]], offset + done)
        if count == 0:
            raise OutputError(f"{partial.path} was cut short while it was being written")
        done += count
