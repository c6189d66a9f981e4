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
from dump_activations.dtypes import READABLE_DTYPES
from dump_activations.errors import InvalidArgumentError, OutputError
from dump_activations.storage.formats.contents import StoredTensor
from dump_activations.storage.reading.inspection import Inspection, inspect
from dump_activations.storage.reading.keys import Catalog
from dump_activations.storage.reading.whole import inspect_dump

THREADS: int | None = None
"""Threads of a read; None for one per core."""

# Metadata that must be equal in files that are read as one, where both have it.
_OF_THE_MODEL = ("weights_sha256", "layers", "precision")


class TensorFiles:
    """The files of one or several dumps, by their headers; each read opens them again.

    Attributes:
        paths: the files.
        inspections: the files' headers.
        catalog: keys and tensors of the first file, which the others share.
        metadata: metadata of the first dump.
        boards: boards in all files.

    Raises:
        InvalidArgumentError: a suffix names no format, or the files do not belong together.
        OutputError: a file cannot be read, is not of its format, or has no axis of boards.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        dumps = [inspect_dump(path) for path in paths]
        self.metadata = dumps[0].contents.metadata
        self.inspections = [file for dump in dumps for file in dump.files]
        self.paths = [each.path for each in self.inspections]
        self._stamps = [each.stamp for each in self.inspections]
        self._catalogs = [Catalog(each.path, each.contents) for each in self.inspections]
        self.catalog = self._catalogs[0]
        self._ends = np.cumsum([catalog.boards for catalog in self._catalogs])
        self.boards = int(self._ends[-1])
        self._open: dict[tuple[str, int], _rust.StoredTensor] = {}
        for other, catalog in zip(self.inspections, self._catalogs, strict=True):
            self._check_alike(other, catalog)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}

    def read(
        self,
        tensor: str,
        numbers: NDArray[np.int64],
        out: NDArray[np.uint8],
        *,
        parts: int = 1,
        cancel: _rust.Cancel | None = None,
    ) -> None:
        """Read rows of a stored tensor, or equal parts of rows, counted through all rows.

        Args:
            tensor: its name.
            numbers: numbers of the parts, int64 (R,).
            out: receives them, uint8 (R, bytes per part).
            parts: parts per row.
            cancel: lets another thread end the read.

        Raises:
            InvalidArgumentError: not all files have the tensor.
            OutputError: a row cannot be read, or a file was changed.
        """
        touched: Iterable[int] = range(len(self.paths))
        if len(numbers) < len(self.paths):
            touched = np.unique(np.searchsorted(self._ends, numbers // parts, "right")).tolist()
        self._check_unchanged(touched)
        if out.size:
            stored = self._open.get((tensor, parts))
            if stored is None:
                stored = self._open[tensor, parts] = self._stored(tensor, parts)
            stored.read(numbers, out, threads=THREADS, cancel=cancel)
            self._check_unchanged(touched)

    def check_digest(self, tensor: str, data: NDArray[np.uint8]) -> None:
        """Compare a whole tensor's bytes, of all files, with the files' digests.

        Raises:
            OutputError: they differ, or a file carries no digests.
        """
        start = 0
        for inspection, stored in zip(self.inspections, self._tensors(tensor), strict=False):
            digest = inspection.digests.get(tensor)
            if digest is None:
                raise OutputError(f"{inspection.path} carries no digest to verify {tensor} by")
            if zlib.crc32(data[start : start + stored.nbytes].data) != digest.crc32:
                raise OutputError(f"{inspection.path}: {tensor} is damaged; make the file again")
            start += stored.nbytes

    def _check_unchanged(self, files: Iterable[int]) -> None:
        """Raise OutputError if a file is not the one that was opened.

        Another time or inode number alone is no change: `touch` and network mounts renew them.
        """
        for i in files:
            path, stamp = self.paths[i], _stamp(self.paths[i])
            if stamp != self._stamps[i]:
                if not self._is_same(self.inspections[i], self._stamps[i], stamp):
                    raise OutputError(f"{path} was replaced or changed since it was opened")
                self._stamps[i] = stamp
                self._open = {}  # which would refuse another inode number

    def _is_same(self, opened: Inspection, before: tuple[int, int], now: tuple[int, int]) -> bool:
        """Return whether a file's header is the one that was read, and vouches for the content."""
        try:
            found = inspect(opened.path)
        except OutputError:
            return False
        is_other_file = before[0] != now[0] and before[1] != now[1]
        is_same_header = (found.size, found.contents) == (opened.size, opened.contents)
        return is_same_header and (bool(opened.digests) or not is_other_file)

    def _tensors(self, name: str) -> list[StoredTensor]:
        """Return the tensor in each file, or in the first where it has no axis of boards.

        Raises:
            InvalidArgumentError: another file has none of its dtype and shape.
        """
        first = self.catalog.tensors[name]
        if not self.catalog.find(name).of_boards:
            return [first]
        found = []
        for path, catalog in zip(self.paths, self._catalogs, strict=True):
            tensor = catalog.tensors.get(name)
            wanted = (first.dtype, (catalog.boards, *first.shape[1:]))
            if tensor is None or (tensor.dtype, tensor.shape) != wanted:
                raise InvalidArgumentError(f"{path} has no {name} like {self.paths[0]}")
            found.append(tensor)
        return found

    def _stored(self, name: str, parts: int) -> _rust.StoredTensor:
        of_boards = self.catalog.find(name).of_boards
        tensors = self._tensors(name)
        places = []
        for path, tensor in zip(self.paths, tensors, strict=False):
            if tensor.dtype not in READABLE_DTYPES or tensor.offset is None:
                why = "compressed or not in C order" if tensor.offset is None else tensor.dtype
                raise OutputError(f"{path}: {name} is {why}, which cannot be read by rows")
            places.append((path, tensor.offset, tensor.shape[0] if of_boards else 1))
        rows = sum(rows for _, _, rows in places)
        nbytes = sum(tensor.nbytes for tensor in tensors)
        return _rust.StoredTensor(name, places, parts, nbytes // (rows * parts))

    def _check_alike(self, other: Inspection, catalog: Catalog) -> None:
        """Raise InvalidArgumentError if a file has other keys or another model than the first."""
        apart = f"{other.path} cannot be read as one with {self.paths[0]}"
        if catalog.keys != self.catalog.keys:
            raise InvalidArgumentError(
                f"{apart}: its keys differ in their names, layers, shapes or dtypes"
            )
        theirs = other.contents.metadata
        for name in _OF_THE_MODEL:
            if name in theirs and theirs[name] != (ours := self.metadata.get(name, theirs[name])):
                raise InvalidArgumentError(f"{apart}: its {name} is {theirs[name]}, not {ours}")


def _stamp(path: Path) -> tuple[int, int]:
    """Return the file's inode number and time, which are renewed when it is replaced or written."""
    with OutputError.when(f"cannot read {path}"):
        status = path.stat()
    return status.st_ino, status.st_mtime_ns
