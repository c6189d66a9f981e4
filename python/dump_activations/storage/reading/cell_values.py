"""Where the values of a key's cells are.

Shape letters: M cells read at once, D the width of a cell's value.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dump_activations import _rust
from dump_activations.dtypes import CELLS, DTYPES
from dump_activations.errors import InvalidArgumentError, option
from dump_activations.storage.reading.catalog import Key, Part
from dump_activations.storage.reading.tensor_files import TensorFiles

# Values that are of pairs of cells, whose first axis is that of attention heads.
_OF_PAIRS = frozenset({"attn_scores", "attn_pattern"})


@dataclass(frozen=True)
class CellValues:
    """Where the values of the cells are that a key has.

    Attributes:
        part: the layer's part of each row of a stored tensor.
        dtype: NumPy's and torch's name of it.
        width: D.
    """

    part: Part
    dtype: str
    width: int

    @classmethod
    def of(cls, key: Key, layer: int | None) -> "CellValues":
        """Find them; InvalidArgumentError where the key has no axis of cells."""
        if key.layers and layer is None:
            raise InvalidArgumentError(
                f"{key.name} has layers {', '.join(map(str, key.layers))}; choose one by "
                f"{option('layer')}"
            )
        [part] = key.parts(layer)
        has_cells = key.of_boards and key.value[:1] == (CELLS,) and 0 not in key.value
        if not has_cells or key.name.partition(".")[0] in _OF_PAIRS:
            raise InvalidArgumentError(f"{key.name} has no axis of cells")
        return cls(part, key.dtype, math.prod(key.value[1:]))

    @property
    def nbytes(self) -> int:
        """Bytes of one cell's value."""
        return self.width * DTYPES[self.dtype].nbytes

    def read(
        self,
        files: TensorFiles,
        numbers: NDArray[np.int64],
        out: NDArray[np.uint8],
        cancel: _rust.Cancel,
    ) -> None:
        """Read cells, counted through the file, into uint8 (M, nbytes)."""
        if self.part.of > 1:
            rows = numbers // CELLS
            numbers = numbers + ((self.part.of - 1) * rows + self.part.at) * CELLS
        parts = self.part.of * CELLS
        files.read(self.part.tensor, numbers, out, parts=parts, cancel=cancel)
