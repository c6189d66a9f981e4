"""Finished files that hold the same tensors, whose rows are counted through all of them.

Shape letters: R rows asked for.
"""

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dump_activations import _rust
from dump_activations.errors import InvalidArgumentError, OutputError
from dump_activations.remote.mirror import fetch, is_mirror
from dump_activations.storage.reading.inspection import Inspection, inspect
from dump_activations.storage.reading.keys import Part
from dump_activations.storage.reading.whole import inspect_dump

THREADS: int | None = None
"""Threads of a read; None for one per core."""

# Metadata that must be equal in files that are read as one, where both have it.
_OF_THE_MODEL = ("weights_sha256", "layers", "precision")


class TensorFiles:
    """The files of one or several dumps, by their headers; each read opens them again.

    Attributes:
        files: the files' headers, in order.
        catalog: keys and tensors of the first file, which the others share.
        metadata: metadata of the first dump.
        boards: boards in all files.

    Raises as `ActivationsFile` does.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        dumps = [inspect_dump(path) for path in paths]
        self.metadata = dumps[0].contents.metadata
        self.files = [file for dump in dumps for file in dump.files]
        self.catalog = self.files[0].catalog
        self._ends = np.cumsum([file.catalog.boards for file in self.files])
        self.boards = int(self._ends[-1])
        self._open: dict[tuple[str, int], _rust.StoredTensor] = {}
        for file in self.files:
            apart = f"{file.path} cannot be read as one with {self.files[0].path}"
            if file.catalog.keys != self.catalog.keys:
                raise InvalidArgumentError(
                    f"{apart}: its keys differ in their names, layers, shapes or dtypes"
                )
            for name in _OF_THE_MODEL:
                theirs = file.contents.metadata.get(name)
                ours = self.metadata.get(name, theirs)
                if theirs not in (ours, None):
                    raise InvalidArgumentError(f"{apart}: its {name} is {theirs}, not {ours}")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}

    def read(
        self,
        part: Part,
        numbers: NDArray[np.int64],
        out: NDArray[np.uint8],
        *,
        per_row: int = 1,
        cancel: _rust.Cancel | None = None,
    ) -> None:
        """Read a part of each row of a stored tensor, or cells of it.

        Args:
            part: the part.
            numbers: rows, or cells, counted through all files, int64 (R,).
            out: receives them, uint8 (R, bytes of each).
            per_row: cells of the part; 1 for whole rows.
            cancel: lets another thread end the read.

        Raises:
            InvalidArgumentError: not all files have the tensor.
            OutputError: a row cannot be read, or a file was changed.
        """
        touched: Iterable[int] = range(len(self.files))
        if len(numbers) < len(self.files):
            touched = np.unique(np.searchsorted(self._ends, numbers // per_row, "right")).tolist()
        parts = part.of * per_row
        if part.of > 1:
            numbers = numbers + ((part.of - 1) * (numbers // per_row) + part.at) * per_row
        self._check_unchanged(touched)
        if out.size:
            stored = self._open.get((part.tensor, parts))
            if stored is None:
                stored = self._open[part.tensor, parts] = self._stored(part.tensor, parts)
            self._fetch(part.tensor, parts, numbers)
            stored.read(numbers, out, threads=THREADS, cancel=cancel)
            self._check_unchanged(touched)

    def _fetch(self, name: str, parts: int, numbers: NDArray[np.int64]) -> None:
        """Make parts of rows of remote files local; local files have them."""
        if not any(is_mirror(file.path) for file in self.files):
            return
        numbers, first = np.unique(numbers), 0
        for file in self._files_of(name):
            tensor = file.tensor(name)
            assert tensor.offset is not None
            of_boards = self.catalog.find(name).of_boards
            end = first + (tensor.shape[0] if of_boards else 1) * parts
            nbytes = tensor.nbytes // (end - first)
            inside = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, end)]
            begins = tensor.offset + (inside - first) * nbytes
            fetch({file.path: (begins, begins + nbytes)})
            first = end

    def check_digest(self, tensor: str, data: NDArray[np.uint8]) -> None:
        """Compare a whole tensor's bytes, of all files, with the files' digests.

        Raises:
            OutputError: they differ, or a file carries no digests.
        """
        start = 0
        for file in self._files_of(tensor):
            digest, stop = file.digests.get(tensor), start + file.tensor(tensor).nbytes
            if digest is None:
                raise OutputError(f"{file.path} carries no digest to verify {tensor} by")
            if zlib.crc32(data[start:stop].data) != digest.crc32:
                raise OutputError(f"{file.path}: {tensor} is damaged; make the file again")
            start = stop

    def _check_unchanged(self, files: Iterable[int]) -> None:
        """Raise OutputError if a file is not the one that was opened.

        A new time or inode number alone is not a change: `touch` and network mounts renew them. So
        a byte changed in place, under the same header and size, is not noticed.
        """
        for i in files:
            opened = self.files[i]
            with OutputError.when(f"cannot read {opened.path}"):
                status = opened.path.stat()
            if (status.st_ino, status.st_mtime_ns) != opened.stamp:
                self.files[i] = _opened_again(opened)
                self._open = {}  # which would refuse another inode number

    def _files_of(self, name: str) -> list[Inspection]:
        """Return the files that a tensor is read from: the first, where it has no axis of boards.

        Raises:
            InvalidArgumentError: another file has none of its dtype and shape.
        """
        first = self.catalog.tensors[name]
        if not self.catalog.find(name).of_boards:
            return self.files[:1]
        for file in self.files:
            tensor = file.catalog.tensors.get(name)
            wanted = (first.dtype, (file.catalog.boards, *first.shape[1:]))
            if tensor is None or (tensor.dtype, tensor.shape) != wanted:
                raise InvalidArgumentError(f"{file.path} has no {name} like {self.files[0].path}")
        return self.files

    def _stored(self, name: str, parts: int) -> _rust.StoredTensor:
        of_boards = self.catalog.find(name).of_boards
        places, nbytes = [], 0
        for file in self._files_of(name):
            tensor = file.tensor(name)
            if tensor.offset is None:
                raise OutputError(
                    f"{file.path}: {name} is compressed or not in C order, which cannot be read by "
                    "rows"
                )
            places.append((file.path, tensor.offset, tensor.shape[0] if of_boards else 1))
            nbytes += tensor.nbytes
        rows = sum(rows for _, _, rows in places)
        return _rust.StoredTensor(name, places, parts, nbytes // (rows * parts))


def _opened_again(opened: Inspection) -> Inspection:
    """Inspect a file whose time or inode number is new; OutputError if its content may be too.

    Digests in an equal header vouch for the content of a file that is another one.
    """
    try:
        found = inspect(opened.path)
    except OutputError:
        found = None
    if (
        found is None
        or (found.size, found.contents) != (opened.size, opened.contents)
        or (not opened.digests and all(np.not_equal(found.stamp, opened.stamp)))
    ):
        raise OutputError(f"{opened.path} was replaced or changed since it was opened")
    return found
