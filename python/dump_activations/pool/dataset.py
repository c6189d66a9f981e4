"""StepsDataset: a directory of step shards, read by global step index."""

import ast
import operator
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dump_activations import _rust
from dump_activations.board import CELLS
from dump_activations.errors import (
    IndicesError,
    PoolError,
    StepIndexError,
    option,
    warn,
)
from dump_activations.pool.draws import draw
from dump_activations.pool.indices import step_indices

if TYPE_CHECKING:
    # For a `DataLoader`'s types. What it needs are the methods; a pool needs no torch.
    from torch.utils.data import Dataset

    _Dataset = Dataset[NDArray[np.uint8]]
else:
    _Dataset = object


class Shard(NamedTuple):
    """One file of a pool: its path, its rows, and the global step index of its first row."""

    path: Path
    rows: int
    first: int


class StepsDataset(_Dataset):
    """A pool of steps: the rows of the `steps-*.npy` shards of a directory, or of its `steps.npy`.

    A global step index counts rows through the shards in the lexicographic order of their names.
    Opening reads headers only, and keeps no file open. Instances can be pickled (by path), used
    from several threads and carried over a fork; `torch.utils.data.DataLoader` takes them, with or
    without workers:

        ds = StepsDataset("datasets/d7_test_v1")
        loader = DataLoader(ds, batch_size=1024, sampler=ds.sample_indices(65536), num_workers=2)
        for boards in loader:  # uint8 (1024, 16)

    Raises:
        PoolNotFoundError: there is no such directory, or no shard in it.
        PoolError: a shard's header, fields or size are not those of a pool of steps.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._pool = _rust.Pool(path)

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
            raise PoolError(text) from error
        assert dtype.itemsize == self._pool.itemsize
        return dtype

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The files in order."""
        return tuple(Shard(*shard) for shard in self._pool.shards)

    @property
    def row_layouts(self) -> list[str]:
        """The dtype of each shard's rows, as the text in its header."""
        return self._pool.descrs

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
            PoolError: the pool has no rows.
        """
        if len(self) == 0:
            raise PoolError(f"{self.path}: its shards hold no rows to draw from")
        indices = draw(len(self), n, seed)
        if n > len(self):
            warn(
                f"{n} samples asked for, but {self.path} has {len(self)} rows: drawn with "
                "replacement"
            )
        return indices

    def check_indices(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Return step indices of any shape as int64 (n,), flattened in C order.

        Raises:
            IndicesError: there are none, or they are not integers.
            StepIndexError: an index is negative or past the end.
        """
        steps = step_indices(np.asarray(indices).reshape(-1))
        if len(steps) == 0:
            raise IndicesError(f"{option('indices')}: no step indices")
        outside = (steps < 0) | (steps >= len(self))
        if outside.any():
            at = int(np.argmax(outside))
            raise StepIndexError(
                f"{option('indices')}: step index {steps[at]} at position {at} is not in "
                f"{self.path}, which has {len(self)} rows"
            )
        return steps

    def read_boards(
        self,
        indices: ArrayLike,
        out: NDArray[np.uint8] | None = None,
        *,
        cancel: _rust.Cancel | None = None,
    ) -> NDArray[np.uint8]:
        """Read boards as exponents, uint8 (n, 16), in the order of `indices`.

        Cell 0 is the top left, row-major; exponent e stands for the tile 2**e, 0 for an empty cell.
        The interpreter is released meanwhile. All of a run's indices in one call read fastest.

        Args:
            indices: step indices, (n,); duplicates are allowed.
            out: where to put the boards: a C-contiguous uint8 (n, 16), which is also returned.
            cancel: lets another thread end the read, which Ctrl-C does in the main thread.

        Raises:
            TypeError: `out` is no array of uint8.
            InvalidArgumentError: `out` has another shape, or cannot be written.
            StepIndexError: an index is negative or past the end.
            IndicesError: the indices are not integers or not one-dimensional.
            PoolError: a row cannot be read.
        """
        indices = step_indices(indices)
        if out is None:
            out = np.empty((len(indices), CELLS), np.uint8)
        elif not isinstance(out, np.ndarray) or out.dtype != np.uint8:
            found = getattr(out, "dtype", type(out).__name__)
            raise TypeError(f"out: a NumPy array of uint8 is wanted, not of {found}")
        self._pool.read_boards(indices, out, cancel)
        return out

    def read_rows(self, indices: ArrayLike) -> NDArray[np.void]:
        """Read whole rows, structured (n,) of `self.dtype`, in the order of `indices`.

        Raises as `read_boards` does, and `PoolError` where shards differ in their rows.
        """
        indices = step_indices(indices)
        rows: NDArray[np.void] = np.empty(len(indices), self.dtype)
        self._pool.read_rows(indices, rows.view(np.uint8).reshape(len(rows), self.dtype.itemsize))
        return rows
