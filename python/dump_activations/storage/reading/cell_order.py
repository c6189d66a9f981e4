"""In which order the cells of a file come.

Normative: files of one number of cells, read with the same numbers, give the same order for ever.
Cell c of the file is cell c % 16 of board c // 16. `permutation(n, *key)` is what
`numpy.random.default_rng(key).permutation(n)` gives in NumPy 2. A window is as many consecutive
cells as whole batches fit in its bytes; what is left at the end of the file is one more, shorter.
The windows come in the order `permutation(whole windows, seed, epoch, 0)`, the short one last; the
cells of window w in the order `permutation(cells of it, seed, epoch, 1 + w)`. Batches are cut from
that one after the other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Stretch:
    """Batches of one window: every `step`-th from number `first` on, as far as the window goes."""

    window: int
    batches: range


@dataclass(frozen=True)
class CellOrder:
    """The order of an epoch.

    Attributes:
        cells: all that there are.
        batch_size: cells a batch; the last may have fewer.
        window_batches: whole batches in a window.
        seed, epoch: what the order depends on.
    """

    cells: int
    batch_size: int
    window_batches: int
    seed: int
    epoch: int

    @property
    def batches(self) -> int:
        """Batches of an epoch, with a short one at the end."""
        return -(-self.cells // self.batch_size)

    @property
    def _window(self) -> int:
        return self.window_batches * self.batch_size

    @cached_property
    def _windows(self) -> NDArray[np.int64]:
        """Numbers of the windows in their order."""
        whole = self.cells // self._window
        return np.append(self._permutation(whole, 0), whole)

    def stretches(self, batches: range) -> Iterator[Stretch]:
        """Cut a rank's batches where windows end."""
        while batches:
            place = batches[0] // self.window_batches
            stop = (place + 1) * self.window_batches
            inside = range(batches.start, min(stop, batches.stop), batches.step)
            yield Stretch(int(self._windows[place]), inside)
            batches = batches[len(inside) :]

    def read(self, stretch: Stretch) -> NDArray[np.int64]:
        """Return the cells of a stretch in their order, counted through the file."""
        start = stretch.window * self._window
        order = self._permutation(min(self._window, self.cells - start), 1 + stretch.window)
        order += start
        if stretch.batches.step == 1:
            first = stretch.batches.start % self.window_batches * self.batch_size
            return order[first : first + len(stretch.batches) * self.batch_size]
        places = (batch % self.window_batches * self.batch_size for batch in stretch.batches)
        return np.concatenate([order[place : place + self.batch_size] for place in places])

    def _permutation(self, n: int, number: int) -> NDArray[np.int64]:
        return np.random.default_rng([self.seed, self.epoch, number]).permutation(n)
