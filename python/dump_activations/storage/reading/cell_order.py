"""The order in which the cells of a file come, and which part of the file their values are.

Normative: files of equally many cells, read with the same numbers, always give the same order.
Cell c of the file is cell c % 16 of board c // 16. `permutation(n, *key)` is
`numpy.random.default_rng(key).permutation(n)` of NumPy 2. A window is as many consecutive cells as
whole batches fit in its bytes; the cells left at the end of the file are one more, shorter window.
The windows come in the order `permutation(whole windows, seed, epoch, 0)`, the short one last; the
cells of window w in the order `permutation(cells of it, seed, epoch, 1 + w)`. Batches are cut from
that one after the other.

Shape letters: M cells read at once, D width of a cell's value.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dump_activations.dtypes import CELLS, READABLE_DTYPES
from dump_activations.errors import InvalidArgumentError, option
from dump_activations.storage.reading.keys import Key, Part

# Keys with a value per pair of cells, whose first axis is attention heads.
_OF_PAIRS = frozenset({"attn_scores", "attn_pattern"})


@dataclass(frozen=True)
class CellOrder:
    """The order of an epoch.

    Attributes:
        cells: all cells of the files.
        batch_size: cells per batch; the last may have fewer.
        window_batches: whole batches per window.
        seed, epoch: seeds of the permutations.
    """

    cells: int
    batch_size: int
    window_batches: int
    seed: int
    epoch: int

    def windows(self, batches: range) -> Iterator[tuple[int, range]]:
        """Cut a reader's batches where windows end; yield the windows' numbers with them."""
        whole = self.cells // (self.window_batches * self.batch_size)
        windows = np.append(self._permutation(whole, 0), whole)
        while batches:
            place = batches[0] // self.window_batches
            stop = (place + 1) * self.window_batches
            inside = range(batches.start, min(stop, batches.stop), batches.step)
            yield int(windows[place]), inside
            batches = batches[len(inside) :]

    def read(self, window: int, batches: range) -> NDArray[np.int64]:
        """Return the cells of a window's batches in order, counted through the file, int64 (M,)."""
        length = self.window_batches * self.batch_size
        order = self._permutation(min(length, self.cells - window * length), 1 + window)
        order += window * length
        if batches.step == 1:
            first = batches.start % self.window_batches * self.batch_size
            return order[first : first + len(batches) * self.batch_size]
        places = (batch % self.window_batches * self.batch_size for batch in batches)
        return np.concatenate([order[place : place + self.batch_size] for place in places])

    def _permutation(self, n: int, number: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, self.epoch, number]).permutation(n)


class CellValues(NamedTuple):
    """The values of a key's cells: the layer's part of rows, D, and bytes per cell."""

    part: Part
    dtype: str
    width: int
    nbytes: int


def find_cells(key: Key, layer: int | None) -> CellValues:
    """Find the values of a key's cells; InvalidArgumentError if it has no axis of cells."""
    if key.layers and layer is None:
        raise InvalidArgumentError(
            f"{key.name} has layers {', '.join(map(str, key.layers))}; choose one by "
            f"{option('layer')}"
        )
    key = key if layer is None else key.layer(layer)
    [part] = key.parts
    has_cells = key.of_boards and key.value[:1] == (CELLS,) and 0 not in key.value
    if not has_cells or key.name.partition(".")[0] in _OF_PAIRS:
        raise InvalidArgumentError(f"{key.name} has no axis of cells")
    width = math.prod(key.value[1:])
    return CellValues(part, key.dtype, width, width * READABLE_DTYPES[key.dtype].nbytes)
