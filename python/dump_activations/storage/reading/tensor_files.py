"""Finished files that hold the same tensors, whose rows are counted through all of them."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dump_activations import _rust
from dump_activations.dtypes import DTYPES
from dump_activations.errors import InvalidArgumentError, OutputError
from dump_activations.storage.formats.contents import StoredTensor
from dump_activations.storage.reading.catalog import Catalog
from dump_activations.storage.reading.inspection import Inspection, inspect

THREADS: int | None = None
"""Threads of a read; None for as many as there are cores."""

# What has to be the same in files that are read as one, as far as both say it.
_OF_THE_MODEL = ("weights_sha256", "layers", "precision")


class TensorFiles:
    """The files, by their headers; they are opened anew for each read, in whatever process.

    Attributes:
        paths: where they are.
        catalog: what the first has, as the others do.
        metadata: of the first.
        boards: boards in all of them.

    Raises:
        InvalidArgumentError: a suffix names no format, or the files do not belong together.
        OutputError: a file cannot be read, is not of its format, or has no axis of boards.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._stamps = [_stamp(path) for path in paths]
        inspections = [inspect(path) for path in paths]
        catalogs = [Catalog(each.path, each.contents) for each in inspections]
        self.catalog = catalogs[0]
        self.metadata = inspections[0].contents.metadata
        self.boards = sum(catalog.boards for catalog in catalogs)
        self._inspections = inspections
        self._catalogs = catalogs
        self._open: dict[tuple[str, int], _rust.StoredTensor] = {}
        for other, catalog in zip(inspections, catalogs, strict=True):
            differs = self._differs(other, catalog)
            if differs:
                raise InvalidArgumentError(
                    f"{other.path} cannot be read as one with {paths[0]}: {differs}"
                )

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
        """Read rows of a stored tensor, or equal parts of them counted through all rows.

        Args:
            tensor: its name.
            numbers: of the parts, int64 (R,).
            out: where to put them, uint8 (R, bytes of a part).
            parts: how many a row is.
            cancel: lets another thread end the read.

        Raises:
            InvalidArgumentError: not all files have the tensor.
            OutputError: a row cannot be read, or a file was changed.
        """
        self._check_unchanged()
        if out.size:
            stored = self._open.get((tensor, parts))
            if stored is None:
                stored = self._open[tensor, parts] = self._stored(tensor, parts)
            stored.read(numbers, out, threads=THREADS, cancel=cancel)
            self._check_unchanged()

    def check_digest(self, tensor: str, data: NDArray[np.uint8]) -> None:
        """Compare the bytes of a whole tensor, of all files, with what the files say of them.

        Raises:
            OutputError: they differ, or a file carries no digests.
        """
        start = 0
        for inspection, stored in zip(self._inspections, self._tensors(tensor), strict=False):
            digest = inspection.digests.get(tensor)
            if digest is None:
                raise OutputError(f"{inspection.path} carries no digest to verify {tensor} by")
            if zlib.crc32(data[start : start + stored.nbytes].data) != digest.crc32:
                raise OutputError(f"{inspection.path}: {tensor} is damaged; make the file again")
            start += stored.nbytes

    def _tensors(self, name: str) -> list[StoredTensor]:
        """Return the tensor in each file, or in the first where it is not of boards.

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
                raise InvalidArgumentError(f"{path} has no {name} like that of {self.paths[0]}")
            found.append(tensor)
        return found

    def _stored(self, name: str, parts: int) -> _rust.StoredTensor:
        of_boards = self.catalog.find(name).of_boards
        places = []
        for path, tensor in zip(self.paths, self._tensors(name), strict=False):
            if tensor.dtype not in DTYPES or tensor.offset is None:
                why = "compressed or not in C order" if tensor.offset is None else tensor.dtype
                raise OutputError(f"{path}: {name} is {why}, which cannot be read by rows")
            places.append((path, tensor.offset, tensor.shape[0] if of_boards else 1))
        rows = sum(rows for _, _, rows in places)
        nbytes = sum(tensor.nbytes for tensor in self._tensors(name))
        return _rust.StoredTensor(name, places, parts, nbytes // (rows * parts))

    def _check_unchanged(self) -> None:
        for path, stamp in zip(self.paths, self._stamps, strict=True):
            if _stamp(path) != stamp:
                raise OutputError(f"{path} was replaced or changed since it was opened")

    def _differs(self, other: Inspection, catalog: Catalog) -> str:
        """Say in what another file differs from the first; nothing where it does not."""
        if catalog.keys != self.catalog.keys:
            return "its keys differ in their names, layers, shapes or dtypes"
        theirs = other.contents.metadata
        for name in _OF_THE_MODEL:
            if name in theirs and theirs[name] != (ours := self.metadata.get(name, theirs[name])):
                return f"its {name} is {theirs[name]}, not {ours}"
        return ""


def _stamp(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file is replaced, cut short or written to."""
    with OutputError.when(f"cannot read {path}"):
        status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
