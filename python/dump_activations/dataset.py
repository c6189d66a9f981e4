"""StepsDataset: a directory of step shards, read by global step index."""

import ast
import operator
import os
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dump_activations._rust import Cancel, Pool, sample_without_replacement
from dump_activations.board import CELLS
from dump_activations.errors import (
    DatasetError,
    DumpActivationsWarning,
    IndicesError,
    IndicesNotFoundError,
    InvalidArgumentError,
    StepIndexError,
)
from dump_activations.files import check_ordinary


class Shard(NamedTuple):
    """One file of a pool: its path, its rows, and the global step index of its first row."""

    path: Path
    rows: int
    first: int


class StepsDataset:
    """A pool of steps: the rows of the `steps-*.npy` shards of a directory, or of its `steps.npy`.

    A global step index counts rows through the shards in the lexicographic order of their names.
    Opening reads headers only, and keeps no file open. Instances can be pickled (by path), used
    from several threads and carried over a fork; `torch.utils.data.DataLoader` takes them, with or
    without workers:

        ds = StepsDataset("datasets/d7_test_v1")
        loader = DataLoader(ds, batch_size=1024, sampler=ds.sample_indices(65536), num_workers=2)
        for boards in loader:  # uint8 (1024, 16)

    Raises:
        DatasetNotFoundError: There is no such directory, or no shard in it.
        DatasetError: A shard's header, fields or size are not those of a pool of steps.

    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._pool = Pool(path)

    @property
    def path(self) -> Path:
        """The directory."""
        return self._pool.path

    @cached_property
    def dtype(self) -> np.dtype[np.void]:
        """The dtype of a row of the first shard, as its header has it, padding included."""
        try:
            dtype = np.lib.format.descr_to_dtype(ast.literal_eval(self._pool.descr))
        except (TypeError, ValueError, SyntaxError, MemoryError, RecursionError) as error:
            text = f"{self.shards[0].path}: NumPy refuses its dtype: {error}"
            raise DatasetError(text) from error
        assert dtype.itemsize == self._pool.itemsize
        return dtype

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The files in order."""
        return tuple(Shard(*shard) for shard in self._pool.shards)

    def __len__(self) -> int:
        """Rows in all shards."""
        return self._pool.rows

    def __repr__(self) -> str:
        return f"StepsDataset({os.fspath(self.path)!r})"

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.path,)

    def __getitem__(self, index: SupportsIndex) -> NDArray[np.uint8]:
        """Read one board, uint8 (16,)."""
        step = operator.index(index)
        if not 0 <= step < len(self):
            raise StepIndexError(f"step index {step} is not in {self.path}: {len(self)} rows")
        board: NDArray[np.uint8] = self.read_boards([step])[0]
        return board

    def __getitems__(self, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Read a batch of boards in one call: what a `DataLoader` asks for."""
        return self.read_boards(indices)

    def sample_indices(self, n: int, seed: int = 0) -> NDArray[np.int64]:
        """Draw `n` step indices, int64 (n,), equal to NumPy's.

        They are `numpy.random.default_rng(seed).choice(len(self), size=n, replace=False)`; when n
        exceeds the pool, with a warning, `default_rng(seed).integers(0, len(self), size=n)`. Memory
        grows with n, not with the pool.

        Raises:
            InvalidArgumentError: n is below 1, or the seed negative.
            DatasetError: The pool has no rows.

        """
        n, seed = operator.index(n), operator.index(seed)
        if n <= 0:
            raise InvalidArgumentError(f"n_samples is {n}: draw at least 1")
        if seed < 0:
            raise InvalidArgumentError(f"seed is {seed}: it must be 0 or above")
        rows = len(self)
        if rows == 0:
            raise DatasetError(f"{self.path}: its shards hold no rows to draw from")
        generator = np.random.default_rng(seed)
        try:
            if n > rows:
                indices = generator.integers(0, rows, size=n, dtype=np.int64)
            else:
                indices = np.empty(n, np.int64)
                pcg64 = generator.bit_generator.state["state"]
                sample_without_replacement(rows, pcg64["state"], pcg64["inc"], indices)
        except (MemoryError, ValueError) as error:
            raise InvalidArgumentError(f"n_samples is {n}: more than memory can hold") from error
        if n > rows:
            warnings.warn(
                f"{n} samples asked for, but {self.path} has {rows} rows: drawing with replacement",
                DumpActivationsWarning,
                stacklevel=2,
            )
        return indices

    def check_indices(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Return step indices of any shape as int64 (n,), flattened in C order.

        Raises:
            IndicesError: There are none, or they are not integers.
            StepIndexError: An index is negative or past the end.

        """
        steps = _step_indices(np.asarray(indices).reshape(-1))
        if len(steps) == 0:
            raise IndicesError("--indices: no step indices")
        outside = (steps < 0) | (steps >= len(self))
        if outside.any():
            at = int(np.argmax(outside))
            raise StepIndexError(
                f"--indices: step index {steps[at]} at position {at} is not in {self.path}, "
                f"which has {len(self)} rows"
            )
        return steps

    def read_boards(
        self,
        indices: ArrayLike,
        out: NDArray[np.uint8] | None = None,
        *,
        cancel: Cancel | None = None,
    ) -> NDArray[np.uint8]:
        """Read boards as exponents, uint8 (n, 16), in the order of `indices`.

        Cell 0 is the top left, row-major; exponent e stands for the tile 2**e, 0 for an empty cell.
        The interpreter is released meanwhile. All of a run's indices in one call read fastest.

        Args:
            indices: Step indices, (n,); duplicates are allowed.
            out: Where to put the boards: a C-contiguous uint8 (n, 16), which is also returned.
            cancel: Lets another thread end the read, which Ctrl-C does in the main thread.

        Raises:
            TypeError: `out` is no array of uint8.
            InvalidArgumentError: `out` has another shape, or cannot be written.
            StepIndexError: An index is negative or past the end.
            IndicesError: The indices are not integers or not one-dimensional.
            DatasetError: A row cannot be read.

        """
        indices = _step_indices(indices)
        if out is None:
            out = np.empty((len(indices), CELLS), np.uint8)
        elif not isinstance(out, np.ndarray) or out.dtype != np.uint8:
            found = getattr(out, "dtype", type(out).__name__)
            raise TypeError(f"out: a NumPy array of uint8 is wanted, not of {found}")
        self._pool.read_boards(indices, out, cancel)
        return out

    def read_rows(self, indices: ArrayLike) -> NDArray[np.void]:
        """Read whole rows, structured (n,) of `self.dtype`, in the order of `indices`.

        Raises as `read_boards` does, and `DatasetError` where shards differ in their rows.
        """
        indices = _step_indices(indices)
        rows: NDArray[np.void] = np.empty(len(indices), self.dtype)
        self._pool.read_rows(indices, rows.view(np.uint8).reshape(len(rows), self.dtype.itemsize))
        return rows


def load_indices(path: str | os.PathLike[str]) -> NDArray[np.int64]:
    """Read step indices, int64 (n,), from a `.npy` of integers of any shape, flattened in C order.

    Raises:
        IndicesNotFoundError: There is no such file.
        IndicesError: The file is no such array, or has no entries.

    """
    check_ordinary(Path(path), IndicesError)
    try:
        # A mapping checks the header against the file's size before any memory is taken for it.
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
        if array.dtype.kind in "iu":
            array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise IndicesNotFoundError(f"{os.fspath(path)}: no such file of step indices") from error
    except Exception as error:  # NumPy raises almost anything on a damaged file.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise IndicesError(
            f"{os.fspath(path)}: not a readable .npy of step indices ({reason});"
            " write one with numpy.save"
        ) from error
    if array.size == 0:
        raise IndicesError(f"{os.fspath(path)}: no step indices in it")
    try:
        return _step_indices(array.reshape(-1))
    except IndicesError as error:
        raise IndicesError(f"{os.fspath(path)}: {error}") from None


def _step_indices(indices: ArrayLike) -> NDArray[np.int64]:
    """Check that `indices` are a list of integers, and give them as contiguous native int64."""
    array = np.asarray(indices)
    if array.ndim != 1:
        raise IndicesError(f"step indices must be one-dimensional, not of the shape {array.shape}")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise IndicesError(f"step indices must be integers, not {array.dtype}")
    if array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        raise IndicesError(f"step index {array.max()} does not fit into int64")
    return np.require(array, np.int64, ["C", "ALIGNED"])
