"""Step indices: sampled as NumPy would, read from a file, given by a caller, or found by a filter.

A range and the matches of a filter are kept without a list. `len`, slices and `take` give what a
list would.
"""

import operator
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dump_activations import _rust
from dump_activations.errors import (
    IndicesError,
    IndicesNotFoundError,
    InvalidArgumentError,
    option,
)
from dump_activations.paths import check_ordinary

Steps = NDArray[np.int64]
"""A list of step indices."""

# From here on two integers may be the same float64.
_FLOAT_EXACT = 2.0**53


def sample(population: int, n: int, seed: int) -> Steps:
    """Sample `n` of the integers below `population`, int64 (n,), in memory that grows with n alone.

    They are `numpy.random.default_rng(seed).choice(population, size=n, replace=False)`. Where n
    exceeds the population, they are `default_rng(seed).integers(0, population, size=n)`.

    Raises:
        InvalidArgumentError: n is below 1 or more than memory holds, or the seed is negative.
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


def load_indices(path: str | os.PathLike[str]) -> Steps:
    """Read step indices, int64 (n,), from a `.npy` of integers of any shape, in C order.

    Raises:
        IndicesNotFoundError: there is no such file.
        IndicesError: the file is not such an array, or is empty.
    """
    check_ordinary(Path(path), IndicesError)
    try:
        # A mapping checks the header against the file's size before memory is allocated for it.
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
        if array.dtype.kind in "iuf":
            array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise IndicesNotFoundError(f"{os.fspath(path)}: no such file of step indices") from error
    except Exception as error:  # NumPy raises almost anything on a damaged file.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise IndicesError(
            f"{os.fspath(path)}: not a readable .npy of step indices ({reason}); write one with "
            "numpy.save"
        ) from error
    if array.size == 0:
        raise IndicesError(f"{os.fspath(path)}: it has no step indices")
    try:
        return step_indices(array.reshape(-1))
    except IndicesError as error:
        raise IndicesError(f"{os.fspath(path)}: {error.args[0]}") from None


def step_indices(indices: ArrayLike) -> Steps:
    """Return a list of integers as a contiguous native int64 array, (n,).

    Raises:
        IndicesError: it is not one-dimensional, or not all are integers that fit into int64.
    """
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

    def __init__(self, first: int, rows: int, *, chunk_rows: int) -> None:
        """Start without a match among the `rows` rows from step `first` on."""
        self._first = first
        self._chunk_rows = chunk_rows
        chunks = -(-rows // chunk_rows)
        self._bits = np.zeros((chunks, chunk_rows // 8), np.uint8)
        self._counts = np.zeros(chunks, np.int64)

    def put(self, first: int, matches_N: NDArray[np.bool_]) -> None:
        """Store a chunk's matches, once; `first` is the step of its first row. Thread-safe."""
        chunk = (first - self._first) // self._chunk_rows
        bits = np.packbits(matches_N)
        self._bits[chunk, : len(bits)] = bits
        self._counts[chunk] = np.count_nonzero(matches_N)

    def __len__(self) -> int:
        return int(self._counts.sum())

    def __getitem__(self, places: slice) -> Steps:
        start, stop, step = places.indices(len(self))
        assert step == 1
        ends = np.cumsum(self._counts)
        found = [np.empty(0, np.int64)]
        for chunk in range(int(np.searchsorted(ends, start, side="right")), len(ends)):
            before = int(ends[chunk] - self._counts[chunk])
            if before >= stop:
                break
            found.append(self._steps_in(chunk)[max(start - before, 0) : stop - before])
        return np.concatenate(found)

    def take(self, places: Steps) -> Steps:
        """Return the steps at these places among the matches, int64 (n,)."""
        ends = np.cumsum(self._counts)
        order = np.argsort(places)
        chunks = np.searchsorted(ends, places[order], side="right")
        taken = np.empty(len(places), np.int64)
        changes = np.flatnonzero(np.diff(chunks, prepend=-1))
        for chunk, of_chunk in zip(chunks[changes], np.split(order, changes)[1:], strict=True):
            before = ends[chunk] - self._counts[chunk]
            taken[of_chunk] = self._steps_in(chunk)[places[of_chunk] - before]
        return taken

    def _steps_in(self, chunk: int) -> Steps:
        places = np.flatnonzero(np.unpackbits(self._bits[chunk]))
        return places + (self._first + int(chunk) * self._chunk_rows)


StepIndices = Steps | StepRange | Matches
"""Step indices of a run, in its order."""
