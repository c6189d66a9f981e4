"""The boards of a file as a map-style dataset."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

Item = tuple[Tensor, dict[str, Any]]
"""The values of one board, and its labels."""


class BoardValues(Dataset[Item]):
    """What `ActivationsFile.boards` returns: `(activation, {label: value})` a board.

    Args:
        boards: How many there are.
        read: Rows -> values, (R, ...).
        read_labels: Name of a label -> what reads it, likewise.
    """

    def __init__(
        self,
        boards: int,
        read: Callable[[Sequence[int]], Tensor],
        read_labels: Mapping[str, Callable[[Sequence[int]], NDArray[Any]]],
    ) -> None:
        self._boards = boards
        self._read = read
        self._read_labels = read_labels

    def __len__(self) -> int:
        """Boards in the file."""
        return self._boards

    def __getitem__(self, row: int) -> Item:
        """Read one board."""
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[Item]:
        """Read a batch in one call: what a `DataLoader` asks for."""
        labels = {name: read(rows) for name, read in self._read_labels.items()}
        return [
            (value, {name: values[i] for name, values in labels.items()})
            for i, value in enumerate(self._read(rows).unbind())
        ]
