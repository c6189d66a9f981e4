"""An output file under construction: reserved whole, written at offsets, renamed when complete."""

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from dump_activations import _rust
from dump_activations.errors import OutputError
from dump_activations.output.digest import INTEGRITY_KEY, Digest, RunningDigest, integrity_text
from dump_activations.output.durability import BackgroundSync
from dump_activations.output.formats import format_of
from dump_activations.output.journal import (
    BatchDigests,
    Header,
    Journal,
    read_journal,
    sync_directory,
)
from dump_activations.output.layout import RESERVED_NAMES, Layout, TensorSpec
from dump_activations.output.partial import (
    check_output,
    journal_path,
    open_direct,
    open_partial,
    output_error,
    partial_path,
    reserve,
)
from dump_activations.output.resume import confirmed_batches


class _Descriptor:
    """An open file, closed when the last to use it lets go of it.

    A write that is still under way when the run is given up must not find another file under the
    number of its own.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class OutputFile:
    """Tensors written in any order from any thread, which appear as one file at `commit()`.

    Until then the data is in `NAME.partial` beside the target, with a journal beside that, and an
    existing target stays as it is. Use as a context manager: leaving it without a commit is
    `suspend()`. No writer may still be at work when the file is committed or left.
    """

    def __init__(
        self,
        target: Path,
        *,
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        header: Header,
        layout: Layout,
        fd: int,
    ) -> None:
        """Private: `OutputFile.open` makes one."""
        self.target = target
        self.partial = partial_path(target)
        self._specs = {spec.name: spec for spec in specs}
        self._metadata = metadata
        self._header = header
        self._layout = layout
        self._file: _Descriptor | None = _Descriptor(fd)
        direct_fd = open_direct(fd, self.partial)
        self._direct = None if direct_fd is None else _Descriptor(direct_fd)
        self.is_committed = False
        self._journal = Journal(journal_path(target), header)
        self._sync: BackgroundSync | None = None
        self._lock = threading.Lock()
        self._digests = {spec.name: RunningDigest() for spec in specs}
        self._resumed_rows = 0
        self._last_resumed: tuple[int, BatchDigests] | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        *,
        batched: Sequence[str],
        batch_rows: int,
        fingerprint: str,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Self:
        """Takes the space of the whole file; nothing else may fail for want of it later.

        Args:
            path: the target; its suffix selects the format.
            specs: all tensors.
            metadata: stored beside them; the digests are added under `INTEGRITY_KEY`.
            batched: tensors that come in batches of `batch_rows` rows, all of equal length; the
                others are given whole to `write`, also when a run is resumed.
            batch_rows: rows of a batch; the last may be short.
            fingerprint: digest of all that determines the data.
            resume: go on with a partial file of the same work, if there is one.
            overwrite: drop a partial file, if there is one.

        Raises:
            InvalidArgumentError: the suffix names no format, or one that cannot hold a dtype.
            OutputError: the file cannot be made, another process is making it, or there is a
                partial file that neither `resume` nor `overwrite` applies to.
        """
        target = Path(os.path.realpath(path))
        check_output(target, [spec.dtype for spec in specs])
        header = _header(target, specs, batched, batch_rows, fingerprint)
        metadata = {key: _plain_text(value) for key, value in metadata.items()}
        layout = _layout(target, specs, metadata, None)
        fd = open_partial(target, may_exist=resume or overwrite)
        file = cls(target, specs=specs, metadata=metadata, header=header, layout=layout, fd=fd)
        try:
            file._begin(file._resumable() if resume else {})
        except BaseException:
            file._close()
            raise
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self.suspend()

    @property
    def size(self) -> int:
        """Bytes of the finished file."""
        return self._layout.size

    @property
    def resumed_rows(self) -> int:
        """Rows, from the first, that the run being resumed has written; 0 if none is."""
        return self._resumed_rows

    @property
    def last_resumed(self) -> tuple[int, BatchDigests] | None:
        """First row and digests of the last batch that the run being resumed has written."""
        return self._last_resumed

    def write(self, name: str, first_row: int, data: npt.NDArray[np.uint8]) -> None:
        """Writes rows, as a run of bytes, of a tensor that does not come in batches.

        Raises:
            OutputError: the system refused; `errno` is its reason.
        """
        assert name not in self._header.tensors, name
        start = first_row * self._specs[name].row_nbytes
        digest = self._write_bytes(name, start, data)
        with self._lock:
            self._digests[name].add(start, digest)

    def write_run(
        self, first_row: int, name: str, start: int, data: npt.NDArray[np.uint8]
    ) -> Digest:
        """Writes bytes that begin `start` bytes into the batch of a tensor at `first_row`.

        Nothing is noted of them before `finish_batch`.

        Raises:
            OutputError: the system refused; `errno` is its reason.
        """
        start += first_row * self._specs[name].row_nbytes
        return self._write_bytes(name, start, data)

    def _write_bytes(self, name: str, start: int, data: npt.NDArray[np.uint8]) -> Digest:
        spec = self._specs[name]
        assert start + data.nbytes <= spec.nbytes, name
        file, direct = self._file, self._direct
        assert file is not None
        try:
            offset = self._layout.offsets[name] + start
            direct_fd = None if direct is None else direct.number
            digest = _rust.write_span(file.number, direct_fd, offset, data, spec.dtype)
        except OSError as error:
            raise output_error(f"cannot write {self.partial}", error) from error
        finally:
            del file, direct  # Which a traceback would keep open.
        return Digest(data.nbytes, *digest)

    def finish_batch(self, first_row: int, digests: BatchDigests) -> None:
        """Notes that all of the batch at `first_row` was written by `write_run`.

        Raises:
            OutputError: data written before could not be brought to disk.
        """
        batch, remainder = divmod(first_row, self._header.batch_rows)
        assert remainder == 0, first_row
        with self._lock:
            self._note_batch(first_row, digests)
            if self._sync is None:
                self._sync = BackgroundSync(self._fd, self._journal)
        try:
            self._sync.add(batch, digests)
        except OSError as error:
            raise output_error(f"cannot write {self.partial}", error) from error

    def commit(self) -> dict[str, Digest]:
        """Completes the file and gives it the target's name; returns each tensor's digest.

        Raises:
            OutputError: the system refused; an existing target is as it was.
        """
        digests = {name: running.whole for name, running in self._digests.items()}
        for name, spec in self._specs.items():
            assert digests[name].nbytes == spec.nbytes, f"{name} is not complete"
        layout = _layout(self.target, list(self._specs.values()), self._metadata, digests)
        assert (layout.size, layout.offsets) == (self._layout.size, self._layout.offsets)
        try:
            self._stop_sync()
            for offset, piece in layout.pieces:
                _write_all(self._fd, offset, piece)
            os.fsync(self._fd)
            self.partial.replace(self.target)
        except OSError as error:
            raise output_error(f"cannot write {self.target}", error) from error
        self.is_committed = True
        try:
            sync_directory(self.target.parent)
            self._journal.remove()
        except OSError as error:
            what = (
                f"{self.target} is complete, but its directory cannot be brought to disk or "
                "tidied, which --resume does"
            )
            raise output_error(what, error) from error
        finally:
            self._close()
        return digests

    def suspend(self) -> int:
        """Leaves what is on disk for a later run to resume; returns the boards that it holds.

        With none, nothing is left behind.
        """
        if self.is_committed:
            return 0
        with suppress(OSError):  # What the journal has is on disk; the rest is written again.
            self._stop_sync()
        left = read_journal(journal_path(self.target))
        boards = self._header.rows_in(len(left[1])) if left else 0
        if boards:
            self._close()
        else:
            self.discard()
        return boards

    def discard(self) -> None:
        """Removes what was written; an existing target stays."""
        with suppress(OSError):
            self._stop_sync()
        self._remove()
        self._close()

    @property
    def _fd(self) -> int:
        assert self._file is not None
        return self._file.number

    def _begin(self, batches: Mapping[int, BatchDigests]) -> None:
        """Reserves the file and takes over the batches that it has."""
        try:
            if batches:
                self._journal.restart(batches)
            else:
                self._journal.remove()
                os.ftruncate(self._fd, 0)
            reserve(self._fd, self.size)
        except OSError as error:
            if not batches:
                with suppress(OSError):
                    self._remove()
            what = f"cannot reserve {self.size:,} bytes for {self.target}"
            raise output_error(what, error) from error
        for batch, digests in batches.items():
            self._note_batch(batch * self._header.batch_rows, digests)
            self._last_resumed = batch * self._header.batch_rows, digests
        self._resumed_rows = self._header.rows_in(len(batches))

    def _resumable(self) -> Mapping[int, BatchDigests]:
        """The batches of the partial file that need not be written again."""
        left = read_journal(journal_path(self.target))
        # A journal may have outlived its file.
        if left is None or os.fstat(self._fd).st_size == 0:
            return {}
        header, batches = left
        if header != self._header:
            raise OutputError(
                f"{self.partial} is left over from another dump; repeat that dump's options with "
                "--resume, or drop it with --overwrite"
            )
        specs = self._specs
        try:
            return confirmed_batches(self._fd, self._layout, specs, self._header, batches)
        except OSError as error:
            raise output_error(f"cannot read {self.partial}", error) from error

    def _note_batch(self, first_row: int, digests: BatchDigests) -> None:
        assert digests.keys() == set(self._header.tensors)
        for name, digest in digests.items():
            self._digests[name].add(first_row * self._specs[name].row_nbytes, digest)

    def _stop_sync(self) -> None:
        sync, self._sync = self._sync, None
        if sync is not None:
            sync.close()

    def _remove(self) -> None:
        self.partial.unlink(missing_ok=True)
        self._journal.remove()

    def _close(self) -> None:
        self._journal.close()
        self._file = self._direct = None


def _layout(
    target: Path,
    specs: Sequence[TensorSpec],
    metadata: Mapping[str, str],
    digests: Mapping[str, Digest] | None,
) -> Layout:
    file_format = format_of(target, [spec.dtype for spec in specs])
    crc32s = {name: digest.crc32 for name, digest in digests.items()} if digests else None
    return file_format.layout(
        specs, {**metadata, INTEGRITY_KEY: integrity_text(specs, metadata, digests)}, crc32s
    )


def _header(
    target: Path,
    specs: Sequence[TensorSpec],
    batched: Sequence[str],
    batch_rows: int,
    fingerprint: str,
) -> Header:
    shapes = {spec.name: spec.shape for spec in specs}
    assert len(shapes) == len(specs), "two tensors of one name"
    assert not RESERVED_NAMES & shapes.keys(), "a tensor with the name of the metadata"
    (rows,) = {shapes[name][0] for name in batched}
    tensors = [(spec.name, spec.dtype, spec.shape) for spec in specs]
    work = json.dumps([fingerprint, target.suffix, tensors])
    return Header(
        work=hashlib.sha256(work.encode()).hexdigest(),
        rows=rows,
        batch_rows=batch_rows,
        tensors=tuple(batched),
    )


def _plain_text(value: str) -> str:
    """Text that every format can hold: bytes of a file name that are no text are escaped."""
    return value.encode("utf-8", "backslashreplace").decode()


def _write_all(fd: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
