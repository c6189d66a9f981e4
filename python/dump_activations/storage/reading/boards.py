"""The boards of a file as a map-style dataset.

Shape letters: R boards asked for.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dump_activations.storage.reading.array import Rows, row_numbers

Item = tuple[Tensor, dict[str, Any]]
"""The values of one board or of several, and their labels."""


class BoardValues(Dataset[Item]):
    """A dataset of `(activation, {label: value})`, one per board, as `ActivationsFile.boards`."""

    def __init__(
        self,
        boards: int,
        read: Callable[[NDArray[np.int64]], Tensor],
        read_labels: Mapping[str, Callable[[NDArray[np.int64]], NDArray[Any]]],
    ) -> None:
        self._boards = boards
        self._read = read
        self._read_labels = read_labels

    def __len__(self) -> int:
        return self._boards

    def __getitem__(self, rows: SupportsIndex | slice | ArrayLike) -> Item:
        """Read one board by its number; or a batch, (R, ...), by a slice, numbers or a mask.

        Negative numbers count from the end. Raises RowIndexError outside the file.
        """
        try:
            row = operator.index(rows)  # type: ignore[arg-type]
        except TypeError:
            return self._batch(rows)  # type: ignore[arg-type]
        values, labels = self._batch([row])
        return values[0], {name: of_boards[0] for name, of_boards in labels.items()}

    def __getitems__(self, rows: Sequence[int]) -> list[Item]:
        """Read a batch in one call, as a `DataLoader` does; one item per board."""
        values, labels = self._batch(rows)
        return [
            (value, {name: of_boards[i] for name, of_boards in labels.items()})
            for i, value in enumerate(values.unbind())
        ]

    def _batch(self, rows: Rows) -> Item:
        numbers = row_numbers(rows, self._boards, "the dataset")
        return self._read(numbers), {
            name: read(numbers) for name, read in self._read_labels.items()
        }
