"""The boards of a file as a map-style dataset.

Shape letters: R boards asked for.
"""

from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset

from dump_activations.errors import printable, whole_number
from dump_activations.storage.reading.array import ActivationArray, Rows

Item = tuple[Tensor, dict[str, Any]]
"""The values of one board or of several, and their labels."""


class BoardValues(Dataset[Item]):
    """A dataset of `(activation, {label: value})`, one per board, as `ActivationsFile.boards`."""

    def __init__(self, values: ActivationArray, labels: Mapping[str, ActivationArray]) -> None:
        self._values = values
        self._labels = labels

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        labels = f", with {', '.join(self._labels)}" if self._labels else ""
        return printable(f"BoardValues({self._values!r}{labels})")

    def __getitem__(self, rows: SupportsIndex | slice | ArrayLike) -> Item:
        """Read one board by its number; or a batch, (R, ...), by a slice, numbers or a mask.

        Negative numbers count from the end. Raises RowIndexError outside the file.
        """
        if (row := whole_number(rows)) is None:
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
        labels = {name: of_label.numpy(rows) for name, of_label in self._labels.items()}
        return self._values.read(rows), labels
