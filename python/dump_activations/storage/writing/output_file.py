"""An output file under construction: reserved whole, written at offsets, renamed when complete."""

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from dump_activations.errors import OutputError
from dump_activations.storage.digests import INTEGRITY_KEY, Digest, RunningDigest, integrity_text
from dump_activations.storage.formats.layout import Layout
from dump_activations.storage.formats.registry import format_of
from dump_activations.storage.writing.durability import BackgroundSync
from dump_activations.storage.writing.journal import (
    BatchDigests,
    Journal,
    JournalError,
    sync_directory,
)
from dump_activations.storage.writing.partial import Partial
from dump_activations.storage.writing.resume import resumable_batches, until_gap
from dump_activations.storage.writing.targets import check_output, journal_path
from dump_activations.storage.writing.work import Work


def _nothing() -> None:
    pass


class OutputFile:
    """Tensors written in any order from any thread, which appear as one file at `commit()`.

    Until then the data is in `NAME.partial` beside the target, with a journal beside that, and an
    existing target stays as it is. Use as a context manager: leaving it without a commit is
    `suspend()`. No writer may still be at work when the file is committed or left.

    Attributes:
        target: the file's name once it is complete.
        partial: its name until then.
        unusable: why a partial file that was there was dropped; None if none was.
        is_committed: whether it is complete.
    """

    def __init__(
        self,
        work: Work,
        partial: Partial,
        layout: Layout,
        batches: Mapping[int, BatchDigests],
        *,
        unusable: str | None,
    ) -> None:
        """Private: `OutputFile.open` makes one."""
        self.target = work.target
        self.partial = partial.path
        self.unusable = unusable
        self.is_committed = False
        self._work = work
        self._header = work.header
        self._specs = {spec.name: spec for spec in work.specs}
        self._layout = layout
        self._file = partial
        self._is_open = True
        self._journal = Journal(journal_path(work.target), work.header)
        self._sync: BackgroundSync | None = None
        self._lock = threading.Lock()
        self._digests = {spec.name: RunningDigest() for spec in work.specs}
        self._resumed = batches
        for batch, digests in batches.items():
            self._note_batch(batch * self._header.batch_rows, digests)

    @classmethod
    def open(
        cls,
        work: Work,
        *,
        inputs: Iterable[Path] = (),
        overwrite: bool = False,
        check: Callable[[], object] = _nothing,
    ) -> Self:
        """Take the space of the whole file; nothing else may fail for want of it later.

        A partial file of the same work is gone on with.

        Args:
            work: what the file is to hold.
            inputs: files that the target must not be.
            overwrite: drop a partial file, if there is one.
            check: called now and then while a partial file is verified; may raise.

        Raises:
            InvalidArgumentError: the format cannot hold a dtype, or the target is an input.
            OutputError: the file cannot be made, another process is making it, or there is a
                partial file of other work, or one that others can change.
        """
        target = work.target
        check_output(target, [spec.dtype for spec in work.specs], inputs=inputs)
        layout = _layout(work, None)
        with OutputError.when(f"cannot make {target.parent}"):
            target.parent.mkdir(parents=True, exist_ok=True)
        partial = Partial.open(target, anew=overwrite)
        unusable = None
        batches: Mapping[int, BatchDigests] = {}
        try:
            if not partial.is_new:
                try:
                    with OutputError.when(f"cannot read {partial.path}"):
                        batches = resumable_batches(partial, work, layout, check)
                except JournalError as error:
                    unusable = str(error)
                    partial.close()
                    partial = Partial.open(target, anew=True)
            file = cls(work, partial, layout, batches, unusable=unusable)
            file._begin()
        except BaseException:
            partial.close()
            raise
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_open:
            self.suspend()

    @property
    def size(self) -> int:
        """Bytes of the finished file."""
        return self._layout.size

    @property
    def resumed_rows(self) -> int:
        """Rows, from the first, that the run being resumed has written; 0 if none is."""
        return self._header.rows_in(len(self._resumed))

    @property
    def last_resumed(self) -> tuple[int, BatchDigests] | None:
        """First row and digests of the last batch that the run being resumed has written."""
        if not self._resumed:
            return None
        last = max(self._resumed)
        return last * self._header.batch_rows, self._resumed[last]

    def write(self, name: str, data: npt.NDArray[np.uint8]) -> None:
        """Write the bytes of a tensor that does not come in batches.

        Raises:
            OutputError: the system refused; `errno` is its reason.
        """
        assert name not in self._header.tensors, name
        digest = self._write_bytes(name, 0, data)
        with self._lock:
            self._digests[name].add(0, digest)

    def write_span(
        self, first_row: int, name: str, start: int, data: npt.NDArray[np.uint8]
    ) -> Digest:
        """Write bytes that begin `start` bytes into the batch of a tensor at `first_row`.

        Nothing is noted of them before `finish_batch`.

        Raises:
            OutputError: the system refused; `errno` is its reason.
        """
        start += first_row * self._specs[name].row_nbytes
        return self._write_bytes(name, start, data)

    def _write_bytes(self, name: str, start: int, data: npt.NDArray[np.uint8]) -> Digest:
        spec = self._specs[name]
        assert start + data.nbytes <= spec.nbytes, name
        return self._file.write_span(self._layout.offsets[name] + start, data, spec.dtype)

    def finish_batch(self, first_row: int, digests: BatchDigests) -> None:
        """Note that all of the batch at `first_row` was written by `write_span`.

        Raises:
            OutputError: data written before could not be brought to disk.
        """
        batch, remainder = divmod(first_row, self._header.batch_rows)
        assert remainder == 0, first_row
        with self._lock:
            self._note_batch(first_row, digests)
            if self._sync is None:
                self._sync = BackgroundSync(self._file, self._journal)
        with OutputError.when(f"cannot write {self.partial}"):
            self._sync.add(batch, digests)

    def commit(self) -> dict[str, Digest]:
        """Complete the file and gives it the target's name; returns each tensor's digest.

        Raises:
            OutputError: the system refused; an existing target is as it was.
        """
        digests = {name: running.whole for name, running in self._digests.items()}
        for name, spec in self._specs.items():
            assert digests[name].nbytes == spec.nbytes, f"{name} is not complete"
        layout = _layout(self._work, digests)
        assert (layout.size, layout.offsets) == (self._layout.size, self._layout.offsets)
        with OutputError.when(f"cannot write {self.target}"):
            self._stop_sync()
            for offset, data in layout.skeleton:
                self._file.write_bytes(offset, data)
            self._file.publish()
        self.is_committed = True
        what = f"{self.target} is complete, but its directory cannot be brought to disk or tidied"
        try:
            with OutputError.when(what):
                sync_directory(self.target.parent)
                self._journal.remove()
        finally:
            self._close()
        return digests

    def suspend(self) -> int:
        """Leave what is on disk for a later run to resume; returns the boards that it holds.

        With none, nothing is left behind.
        """
        if self.is_committed:
            return 0
        with suppress(OSError):  # What the journal has is on disk; the rest is written again.
            self._stop_sync()
        batches = len(list(until_gap(self._journal.batches)))
        if batches and self._file.is_in_place():
            self._close()
            return self._header.rows_in(batches)
        self.discard()
        return 0

    def discard(self) -> None:
        """Remove what was written; an existing target stays."""
        with suppress(OSError):
            self._stop_sync()
        with suppress(OSError):
            self._remove()
        self._close()

    def _begin(self) -> None:
        """Take the space of the file, and begin its journal with the batches that it has."""
        try:
            with OutputError.when(f"cannot reserve {self.size:,} bytes for {self.target}"):
                self._file.reserve(self.size)
            self._journal.start(self._resumed)
        except OutputError:
            if self._resumed:
                self._close()
            else:
                self.discard()
            raise

    def _note_batch(self, first_row: int, digests: BatchDigests) -> None:
        assert digests.keys() == set(self._header.tensors)
        for name, digest in digests.items():
            self._digests[name].add(first_row * self._specs[name].row_nbytes, digest)

    def _stop_sync(self) -> None:
        sync, self._sync = self._sync, None
        if sync is not None:
            sync.close()

    def _remove(self) -> None:
        self._file.remove()
        self._journal.remove()

    def _close(self) -> None:
        self._journal.close()
        self._file.close()
        self._is_open = False


def _layout(work: Work, digests: Mapping[str, Digest] | None) -> Layout:
    file_format = format_of(work.target, [spec.dtype for spec in work.specs])
    crc32s = {name: digest.crc32 for name, digest in digests.items()} if digests else None
    integrity = integrity_text(work.specs, work.metadata, digests)
    return file_format.layout(work.specs, {**work.metadata, INTEGRITY_KEY: integrity}, crc32s)
