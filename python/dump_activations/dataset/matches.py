"""Step indices that need not be held as a list: a range of a dataset, or the rows that pass a filter.

Both are read as a list is: `len`, and slices, which are int64 (n,).
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Steps = NDArray[np.int64]


class StepRange:
    """Every so many-th step of a stretch of a dataset."""

    def __init__(self, steps: range) -> None:
        assert steps.step > 0, steps
        self._steps = steps

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, places: slice) -> Steps:
        cut = self._steps[places]
        return np.arange(cut.start, cut.stop, cut.step, dtype=np.int64)

    def take(self, places: Steps) -> Steps:
        """Return the steps at these places, int64 (n,)."""
        return self._steps.start + places * self._steps.step


class Matches:
    """Rows of a dataset that pass a filter, ascending: one bit for each row that was looked at."""

    def __init__(self, first: int, rows: int, *, chunk_rows: int) -> None:
        """Begin with none of the `rows` rows from `first` on.

        Args:
            first: step index of the first row that is looked at.
            rows: how many are.
            chunk_rows: rows of a chunk, a multiple of 8.
        """
        self._first = first
        self._chunk_rows = chunk_rows
        chunks = -(-rows // chunk_rows)
        self._bits = np.zeros((chunks, chunk_rows // 8), np.uint8)
        self._counts = np.zeros(chunks, np.int64)

    def put(self, chunk: int, holds: NDArray[np.bool_]) -> None:
        """Note which rows of a chunk pass, once; any thread may."""
        bits = np.packbits(holds)
        self._bits[chunk, : len(bits)] = bits
        self._counts[chunk] = np.count_nonzero(holds)

    def __len__(self) -> int:
        return int(self._counts.sum())

    def __getitem__(self, places: slice) -> Steps:
        start, stop, step = places.indices(len(self))
        assert step == 1
        return np.concatenate([np.empty(0, np.int64), *self._pieces(start, stop)])

    def take(self, places: Steps) -> Steps:
        """Return the rows at these places among the matches, int64 (n,)."""
        ends = np.cumsum(self._counts)
        order = np.argsort(places)
        chunks = np.searchsorted(ends, places[order], side="right")
        taken = np.empty(len(places), np.int64)
        changes = np.flatnonzero(np.diff(chunks, prepend=-1))
        for chunk, of_chunk in zip(chunks[changes], np.split(order, changes)[1:], strict=True):
            before = ends[chunk] - self._counts[chunk]
            taken[of_chunk] = self._rows_in(chunk)[places[of_chunk] - before]
        return taken

    def _pieces(self, start: int, stop: int) -> Iterator[Steps]:
        ends = np.cumsum(self._counts)
        for chunk in range(int(np.searchsorted(ends, start, side="right")), len(ends)):
            before = int(ends[chunk] - self._counts[chunk])
            if before >= stop:
                return
            if self._counts[chunk]:
                yield self._rows_in(chunk)[max(start - before, 0) : stop - before]

    def _rows_in(self, chunk: int) -> Steps:
        places = np.flatnonzero(np.unpackbits(self._bits[chunk]))
        return places + (self._first + int(chunk) * self._chunk_rows)


StepIndices = Steps | StepRange | Matches
"""Step indices of a run, in its order."""
