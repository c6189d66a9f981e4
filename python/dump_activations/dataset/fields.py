"""The fields of a dataset's rows, wherever each shard's rows have them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dump_activations import _rust
from dump_activations.dataset.headers import row_dtype
from dump_activations.errors import DatasetError


@dataclass(frozen=True)
class RowField:
    """A field that all shards have.

    Attributes:
        name: as in the shards' headers.
        dtype: of one element, in the shards' byte order.
        shape: of one row's value.
        offsets: where it lies in a row, in bytes, for each layout of rows in the dataset.
    """

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one row's value."""
        return self.dtype.itemsize * math.prod(self.shape)


class RowFields:
    """The fields of the rows of a dataset, whose shards may have several layouts of rows."""

    def __init__(self, dataset: _rust.Dataset) -> None:
        self._dataset = dataset

    @cached_property
    def layouts(self) -> list[tuple[Path, np.dtype[np.void]]]:
        """Each layout once: the first shard that has it, and the dtype of its rows."""
        shards = dict(reversed([*zip(self._dataset.descrs, self._dataset.shards, strict=True)]))
        descrs = dict.fromkeys(self._dataset.descrs)
        return [(shards[descr][0], row_dtype(shards[descr][0], descr)) for descr in descrs]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the first shard's fields."""
        return iter(self.layouts[0][1].names or ())

    def find(self, name: str) -> RowField | None:
        """Return the field of that name; None where no shard has it.

        Raises:
            DatasetError: some shards lack it, or have it with another dtype.
        """
        holders = [(path, row) for path, row in self.layouts if name in (row.names or ())]
        if not holders:
            return None
        for path, row in self.layouts:
            if name not in (row.names or ()):
                raise DatasetError(f"{path}: its rows have no {name!r}, which {holders[0][0]} has")
            if row[name] != holders[0][1][name]:
                raise DatasetError(
                    f"{path}: its rows have {name!r} as {row[name]}, but those of "
                    f"{holders[0][0]} as {holders[0][1][name]}; shards of one dataset must agree in "
                    "what is read of them"
                )
        dtype = holders[0][1][name]
        offsets = tuple(row.fields[name][1] for _, row in self.layouts if row.fields)
        return RowField(name, dtype.base, dtype.shape, offsets)
