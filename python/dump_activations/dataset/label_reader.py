"""Labels of boards, as they are stored: chosen by name, read with the boards."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dump_activations import _rust
from dump_activations.dataset.columns import Column, ColumnReader, Columns, Values
from dump_activations.errors import DatasetError, InvalidArgumentError, option

ALL = "all"
_INT64_MAX = np.iinfo(np.int64).max


class LabelReader:
    """Reads boards and labels of rows at once.

    Attributes:
        dtypes: name of each label -> dtype it is stored in: uint8, int64, float32 or float64.
        shapes: name -> shape of one row's value.
    """

    def __init__(self, columns: Columns, names: Sequence[str]) -> None:
        """Find the labels; `names` may hold globs, and `all` for every field of the rows.

        Raises:
            InvalidArgumentError: there is no such label, or it is no number.
            DatasetError: some shards lack it, or `metadata.db` cannot be read.
        """
        self._dataset = columns.dataset
        found = dict(_expand(columns, names))
        dtypes = {name: _stored_dtype(column) for name, column in found.items()}
        self.dtypes = {name: dtype for name, dtype in dtypes.items() if dtype is not None}
        self.shapes = {name: column.shape for name, column in found.items()}
        self._reader = ColumnReader(columns.dataset, found)

    def read(
        self,
        indices: NDArray[np.int64],
        boards: NDArray[np.uint8],
        cancel: _rust.Cancel | None = None,
    ) -> Values:
        """Read rows by their step indices, their boards into `boards`, uint8 (n, 16).

        Returns:
            Name -> the label's values, (n, *shape).

        Raises:
            DatasetError: a row cannot be read, or a value does not fit into int64.
        """
        values = self._reader.read(indices, boards, cancel)
        return {name: self._stored(name, values[name], indices) for name in values}

    def _stored(self, name: str, values: NDArray[Any], indices: NDArray[np.int64]) -> NDArray[Any]:
        if values.dtype.kind == "u" and values.dtype.itemsize == 8:
            too_large = (values > _INT64_MAX).reshape(len(values), -1).any(axis=1)
            if too_large.any():
                row = int(np.argmax(too_large))
                raise DatasetError(
                    f"{self._dataset.path}: step {indices[row]}: its {name!r}, {values[row]}, does "
                    "not fit into int64"
                )
        return np.require(values, self.dtypes[name], ["C", "ALIGNED", "WRITEABLE"])


def _stored_dtype(column: Column) -> np.dtype[Any] | None:
    """Return the dtype that a label is stored in; None where it is no number."""
    kind, nbytes = column.dtype.kind, column.dtype.itemsize
    if 0 in column.shape or kind not in "biuf" or nbytes > 8:
        return None
    if kind == "f":
        return np.dtype(np.float64 if nbytes == 8 else np.float32)
    small = kind == "b" or (kind == "u" and nbytes == 1)
    return np.dtype(np.uint8 if small else np.int64)


def _expand(columns: Columns, patterns: Sequence[str]) -> Iterator[tuple[str, Column]]:
    """Find all columns that are meant; of those matched by a pattern, the ones that can be labels.

    No pattern means `board`: the file's `boards` hold it, and it seldom fits into int64.
    """
    for pattern in patterns:
        if pattern == ALL:
            matching = [*columns.fields]
        elif any(sign in pattern for sign in "*?["):
            matching = [name for name in columns.names if fnmatchcase(name, pattern)]
        else:
            column = columns.find(pattern, of="labels")
            if not _can_be_stored(pattern, column):
                raise InvalidArgumentError(
                    f"{option('labels')}: {pattern!r} is {column.dtype}, which is no number"
                )
            yield pattern, column
            continue
        if not matching:
            raise InvalidArgumentError(
                f"{option('labels')}: nothing matches {pattern!r} in {columns.dataset.path}; there "
                f"are {', '.join(columns.names)}"
            )
        for name in matching:
            if name != "board" and _can_be_stored(name, found := columns.find(name, of="labels")):
                yield name, found


def _can_be_stored(name: str, column: Column) -> bool:
    return name.isprintable() and _stored_dtype(column) is not None
