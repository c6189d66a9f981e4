"""What is handed out of cells.

Shape letters: B cells in a batch, D the width of a cell's value.
"""

from typing import NamedTuple

from torch import Tensor


class CellBatch(NamedTuple):
    """Cells of several boards.

    Attributes:
        values: (B, D) as stored; of several keys a dict of them.
        rows: which board of the file each cell is of, int64 (B,), on the host.
        cells: which cell of that board it is, int64 (B,), on the host.
    """

    values: Tensor | dict[str, Tensor]
    rows: Tensor
    cells: Tensor


class KeyedCells(NamedTuple):
    """A `CellBatch` whose values are always a dict."""

    values: dict[str, Tensor]
    rows: Tensor
    cells: Tensor
