"""Step indices: sampled as NumPy would, given by a caller, or found by a filter.

A range and the matches of a filter are kept without a list. `len`, slices and `take` give what a
list would.
"""

import operator
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dump_activations import _rust
from dump_activations.errors import IndicesError, InvalidArgumentError, option

Steps = NDArray[np.int64]
"""A list of step indices."""

# From here on two integers may be the same float64.
_FLOAT_EXACT = 2.0**53


def sample(population: int, n: int, seed: int) -> Steps:
    """Sample `n` of the integers below `population`, int64 (n,), in memory that grows with n alone.

    They are `numpy.random.default_rng(seed).choice(population, size=n, replace=False)`. Where n
    exceeds the population, they are `default_rng(seed).integers(0, population, size=n)`.
    """
    n, seed = operator.index(n), operator.index(seed)
    if n <= 0:
        raise InvalidArgumentError(f"{option('n_samples')} must be 1 or more; got {n}")
    if seed < 0:
        raise InvalidArgumentError(f"{option('seed')} must be 0 or more; got {seed}")
    generator = np.random.default_rng(seed)
    try:
        if n > population:
            return generator.integers(0, population, size=n, dtype=np.int64)
        if population <= 10_000 or n <= population // 50:
            return generator.choice(population, size=n, replace=False)
        # NumPy shuffles the tail of the whole range here, in memory that grows with the range.
        sampled = np.empty(n, np.int64)
        state = generator.bit_generator.state["state"]
        _rust.shuffle_tail(population, state["state"], state["inc"], sampled)
    except (MemoryError, ValueError) as error:
        text = f"{option('n_samples')} must fit into memory, 8 bytes per sample; got {n}"
        raise InvalidArgumentError(text) from error
    return sampled


def step_indices(indices: ArrayLike) -> Steps:
    """Return a list of integers as a contiguous native int64 array, (n,), or raise IndicesError."""
    array = np.asarray(indices)
    if array.ndim != 1:
        raise IndicesError(f"step indices must be one-dimensional; got the shape {array.shape}")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind == "f" and (np.abs(array) < _FLOAT_EXACT).all():
        array = array.astype(np.int64) if (array == np.floor(array)).all() else array
    if array.dtype.kind not in "iu":
        raise IndicesError(f"step indices must be integers; got {array.dtype}")
    if array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        raise IndicesError(f"step indices must fit into int64; got {array.max()}")
    return np.require(array, np.int64, ["C", "ALIGNED"])


class StepRange:
    """Step indices that are a range."""

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
    """Steps that match a filter, ascending, in one bit per row that was scanned."""

    def __init__(self, chunks: Sequence[tuple[int, NDArray[np.uint8], int]]) -> None:
        """Take chunks of rows in order: first step, packed bits, and how many of them are set."""
        self._chunks = chunks
        self._ends = np.cumsum([count for *_, count in chunks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, places: slice) -> Steps:
        return self.take(np.arange(*places.indices(len(self))))

    def take(self, places: Steps) -> Steps:
        """Return the steps at these places among the matches, int64 (n,)."""
        order = np.argsort(places, kind="stable")  # Fast where they ascend.
        chunks = np.searchsorted(self._ends, places[order], side="right")
        taken = np.empty(len(places), np.int64)
        changes = np.flatnonzero(np.diff(chunks, prepend=-1))
        for chunk, of_chunk in zip(chunks[changes], np.split(order, changes)[1:], strict=True):
            first, bits, count = self._chunks[chunk]
            matches = np.flatnonzero(np.unpackbits(bits))
            taken[of_chunk] = first + matches[places[of_chunk] - (self._ends[chunk] - count)]
        return taken


StepIndices = Steps | StepRange | Matches
"""Step indices of a run, in its order."""
