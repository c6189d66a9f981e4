"""The order in which the cells of a file come, and where their values are stored.

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
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dump_activations import _rust
from dump_activations.dtypes import CELLS, READABLE_DTYPES
from dump_activations.errors import InvalidArgumentError, option
from dump_activations.storage.reading.keys import Key, Part
from dump_activations.storage.reading.tensor_files import TensorFiles

# Keys with a value per pair of cells, whose first axis is attention heads.
_OF_PAIRS = frozenset({"attn_scores", "attn_pattern"})


@dataclass(frozen=True)
class WindowBatches:
    """One reader's batches of one window, by their numbers in the epoch."""

    window: int
    batches: range


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

    @property
    def batches(self) -> int:
        """Batches of an epoch, with a short last one."""
        return -(-self.cells // self.batch_size)

    @property
    def _window(self) -> int:
        return self.window_batches * self.batch_size

    @cached_property
    def _windows(self) -> NDArray[np.int64]:
        """Numbers of the windows in order."""
        whole = self.cells // self._window
        return np.append(self._permutation(whole, 0), whole)

    def windows(self, batches: range) -> Iterator[WindowBatches]:
        """Cut a reader's batches where windows end."""
        while batches:
            place = batches[0] // self.window_batches
            stop = (place + 1) * self.window_batches
            inside = range(batches.start, min(stop, batches.stop), batches.step)
            yield WindowBatches(int(self._windows[place]), inside)
            batches = batches[len(inside) :]

    def read(self, taken: WindowBatches) -> NDArray[np.int64]:
        """Return the cells of batches in order, counted through the file, int64 (M,)."""
        start = taken.window * self._window
        order = self._permutation(min(self._window, self.cells - start), 1 + taken.window)
        order += start
        if taken.batches.step == 1:
            first = taken.batches.start % self.window_batches * self.batch_size
            return order[first : first + len(taken.batches) * self.batch_size]
        places = (batch % self.window_batches * self.batch_size for batch in taken.batches)
        return np.concatenate([order[place : place + self.batch_size] for place in places])

    def _permutation(self, n: int, number: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, self.epoch, number]).permutation(n)


@dataclass(frozen=True)
class CellValues:
    """Where the values of a key's cells are stored.

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
        """Find them; InvalidArgumentError if the key has no axis of cells."""
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
        return self.width * READABLE_DTYPES[self.dtype].nbytes

    def read(
        self,
        files: TensorFiles,
        numbers: NDArray[np.int64],
        out: NDArray[np.uint8],
        cancel: _rust.Cancel,
    ) -> None:
        """Read cells, counted through the files, into uint8 (M, nbytes)."""
        if self.part.of > 1:
            rows = numbers // CELLS
            numbers = numbers + ((self.part.of - 1) * rows + self.part.at) * CELLS
        parts = self.part.of * CELLS
        files.read(self.part.tensor, numbers, out, parts=parts, cancel=cancel)
