"""StepsDataset: a directory of step shards, read by global step index."""

import hashlib
import json
import operator
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dump_activations import _rust
from dump_activations.dataset.columns import ColumnReader, Columns
from dump_activations.dataset.draws import draw
from dump_activations.dataset.expressions import Expression, parse
from dump_activations.dataset.filters import evaluate
from dump_activations.dataset.headers import read_layout, row_dtype
from dump_activations.dataset.indices import step_indices
from dump_activations.dataset.label_names import split_names
from dump_activations.dataset.label_reader import LabelReader
from dump_activations.dataset.matches import Matches, StepRange
from dump_activations.dataset.row_ids import locate_rows
from dump_activations.dataset.scan import find_matches
from dump_activations.dataset.shard_names import warn_of_odd_names
from dump_activations.dtypes import CELLS
from dump_activations.errors import (
    DatasetError,
    IndicesError,
    InvalidArgumentError,
    StepIndexError,
    option,
    warn,
)
from dump_activations.progress import Count

if TYPE_CHECKING:
    # For a `DataLoader`'s types. What it needs are the methods; a dataset needs no torch.
    from torch.utils.data import Dataset

    _Dataset = Dataset[NDArray[np.uint8]]
else:
    _Dataset = object


class Shard(NamedTuple):
    """One file of a dataset: its path, its rows, and the global step index of its first row."""

    path: Path
    rows: int
    first: int


class StepsDataset(_Dataset):
    """A dataset of steps: the rows of the `steps-*.npy` shards of a directory, or of its `steps.npy`.

    A global step index counts rows through the shards in the lexicographic order of their names.
    Opening reads headers only, and keeps no file open. Instances can be pickled (by path), used
    from several threads and carried over a fork; `torch.utils.data.DataLoader` takes them, with or
    without workers:

        ds = StepsDataset("datasets/d7_test_v1")
        loader = DataLoader(ds, batch_size=1024, sampler=ds.sample_indices(65536), num_workers=2)
        for boards in loader:  # uint8 (1024, 16)

    Shards whose numbers have gaps, or are not in the order of the names, are cause for a warning.

    Args:
        path: The directory.
        labels: With any, items are dicts: `boards`, `indices` and these, as `read_labels` has them.

    Raises:
        InvalidArgumentError: there is no such label.
        DatasetNotFoundError: there is no such directory, or no shard in it.
        DatasetError: a shard's header, fields or size are not those of a dataset of steps.
    """

    def __init__(self, path: str | os.PathLike[str], labels: str | Sequence[str] = ()) -> None:
        self._dataset = _rust.Dataset(path, read_layout)
        self._labels = split_names(labels)
        self._label_reader = self.label_reader(self._labels) if self._labels else None
        warn_of_odd_names(self.path, self._dataset.names)

    @property
    def path(self) -> Path:
        """The directory."""
        return self._dataset.path

    @cached_property
    def dtype(self) -> np.dtype[np.void]:
        """The dtype of a row of the first shard, as its header has it, padding included."""
        dtype = row_dtype(self.shards[0].path, self._dataset.descr)
        assert dtype.itemsize == self._dataset.itemsize
        return dtype

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The files in order."""
        return tuple(Shard(*shard) for shard in self._dataset.shards)

    @property
    def row_layouts(self) -> list[str]:
        """The dtype of each shard's rows, as the text in its header."""
        return self._dataset.descrs

    @cached_property
    def sha256(self) -> str:
        """What tells datasets apart: the shards' names, numbers of rows and rows' layout, digested."""
        shards = [
            [name, shard.rows, descr]
            for name, shard, descr in zip(
                self._dataset.names, self.shards, self.row_layouts, strict=True
            )
        ]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

    @cached_property
    def _columns(self) -> Columns:
        return Columns(self._dataset)

    def __len__(self) -> int:
        """Rows in all shards."""
        return self._dataset.rows

    def __repr__(self) -> str:
        labels = f", labels={list(self._labels)}" if self._labels else ""
        return f"StepsDataset({os.fspath(self.path)!r}{labels})"

    def __reduce__(self) -> tuple[type[Self], tuple[Path, Sequence[str]]]:
        return type(self), (self.path, self._labels)

    def __getitem__(self, index: SupportsIndex | slice | ArrayLike) -> Any:
        """Read one board, uint8 (16,), or those of a slice or a list of steps, uint8 (n, 16).

        With labels, a dict: `boards`, `indices` (int64), and each label.
        """
        if isinstance(index, slice):
            return self._items(np.arange(*index.indices(len(self)), dtype=np.int64))
        try:
            step = operator.index(index)  # type: ignore[arg-type]
        except TypeError:
            return self._items(step_indices(index))  # type: ignore[arg-type]
        if not 0 <= step < len(self):
            raise StepIndexError(f"step index {step} is not in {self.path}: {len(self)} rows")
        items = self._items(np.array([step]))
        return {key: values[0] for key, values in items.items()} if self._labels else items[0]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Read a batch in one call: what a `DataLoader` asks for.

        Boards, uint8 (n, 16); with labels, a list of dicts.
        """
        items = self._items(step_indices(indices))
        if not self._labels:
            return items
        return [dict(zip(items, each, strict=True)) for each in zip(*items.values(), strict=True)]

    def _items(self, indices: NDArray[np.int64]) -> Any:
        if self._label_reader is None:
            return self.read_boards(indices)
        boards = np.empty((len(indices), CELLS), np.uint8)
        labels = self._label_reader.read(indices, boards)
        return {"boards": boards, "indices": indices, **labels}

    def find(
        self,
        where: str | Expression,
        steps: slice | None = None,
        *,
        progress: Count | None = None,
    ) -> NDArray[np.int64]:
        """Find the steps for which an expression holds: int64 (n,), ascending.

        The expression is written as in Python, `"max_rank >= 11 and run_id % 10 != 0"`:
        comparisons, arithmetic, `and`, `or`, `not`, `&`, `|` and `~` over fields of the rows,
        elements of array fields (`branch_evs_0`), and labels. Integers are exact and floats are
        float64, as in Python. Only the shards' bytes are needed, which are read once, on all cores.

        Args:
            where: The expression.
            steps: The steps that are looked at; all by default.
            progress: Called now and then with the rows done and the rows in all.

        Raises:
            InvalidArgumentError: The expression cannot be read, or names what is not there.
            DatasetError: A row cannot be read, or the expression divides by zero.

        """
        return self.matches(where, steps, progress=progress)[:]

    def matches(
        self,
        where: str | Expression | None,
        steps: slice | None = None,
        *,
        progress: Count | None = None,
    ) -> StepRange | Matches:
        """Return what `find` gives, or all of `steps` without a filter, in a few bytes.

        Raises as `find` does.
        """
        wanted = range(len(self))[steps or slice(None)]
        if not wanted:
            if len(self) == 0:
                raise DatasetError(f"{self.path}: its shards hold no rows to draw from")
            raise InvalidArgumentError(
                f"{option('steps')}: {wanted.start}:{wanted.stop}:{wanted.step} is empty; "
                f"{self.path} has {len(self)} rows"
            )
        if where is None:
            return StepRange(wanted)
        expression = parse(where) if isinstance(where, str) else where
        return find_matches(self._filter_reader(expression), expression, wanted, progress)

    def locate(
        self, run_id: ArrayLike, step_index: ArrayLike, *, progress: Count | None = None
    ) -> NDArray[np.int64]:
        """Find the rows that are these steps of these self-play runs: step indices, int64 (n,).

        Step indices change when a dataset is merged or cut into other shards, these do not:
        `ds.locate(dump["labels/run_id"], dump["labels/step_index"])` are the steps of an earlier
        dump in this dataset. The dataset is read once, on all cores, in memory that grows with n alone.

        Args:
            run_id: As the rows have it, (n,); duplicates are allowed.
            step_index: The number of the step in its run, as the rows have it, (n,).
            progress: Called now and then with the rows done and the rows in all.

        Raises:
            IndicesError: No row is such a step of such a run, or several are.
            InvalidArgumentError: The rows have no `run_id` and `step_index`, or `step_idx`.
            DatasetError: A row cannot be read.

        """
        run_ids, run_steps = step_indices(run_id), step_indices(step_index)
        if len(run_ids) != len(run_steps):
            raise InvalidArgumentError(
                f"{option('indices')}: {len(run_ids)} runs, but {len(run_steps)} steps of them"
            )
        return locate_rows(self._columns, run_ids, run_steps, progress)

    def _filter_reader(self, where: Expression) -> ColumnReader:
        """Find the columns that a filter names, and check that it can be evaluated on them."""
        columns = {name: self._columns.find(name, of="where") for name in where.names}
        for name, column in columns.items():
            if column.shape:
                elements = ["_".join(map(str, (name, *at))) for at in np.ndindex(column.shape)]
                raise InvalidArgumentError(
                    f"{option('where')}: {name!r} is an array; its elements are {elements[0]} to "
                    f"{elements[-1]}"
                )
            if column.dtype.kind not in "biuf":
                raise InvalidArgumentError(
                    f"{option('where')}: {name!r} is {column.dtype}, which is no number"
                )
        evaluate(where, {name: np.empty(0, c.dtype) for name, c in columns.items()}, rows=0)
        return ColumnReader(self._dataset, columns)

    def sample_indices(
        self,
        n: int,
        seed: int = 0,
        where: str | Expression | None = None,
        *,
        progress: Count | None = None,
    ) -> NDArray[np.int64]:
        """Draw `n` step indices, int64 (n,), equal to NumPy's.

        They are `numpy.random.default_rng(seed).choice(len(self), size=n, replace=False)`; when n
        exceeds the dataset, with a warning, `default_rng(seed).integers(0, len(self), size=n)`. Memory
        grows with n, not with the dataset. With a filter it is the same draw from what `find` gives,
        `choice(ds.find(where), size=n, replace=False)`, in one bit a row more.

        Raises:
            InvalidArgumentError: n is below 1, the seed negative, or the filter wrong.
            DatasetError: the dataset has no rows.
            IndicesError: no row passes the filter.
        """
        return self.draw_from(self.matches(where, progress=progress), n, seed)

    def draw_from(self, steps: StepRange | Matches, n: int, seed: int) -> NDArray[np.int64]:
        """Draw from what `matches` gave, as `sample_indices` does."""
        if len(steps) == 0:
            raise IndicesError(f"{option('where')}: no row of {self.path} passes")
        places = draw(len(steps), n, seed)
        if n > len(steps):
            rows = "rows" if isinstance(steps, StepRange) else "rows that pass the filter"
            warn(
                f"{n} samples asked for, but {self.path} has {len(steps)} {rows}: drawn with "
                "replacement"
            )
        return steps.take(places)

    def label_reader(self, names: str | Sequence[str]) -> LabelReader:
        """Find labels by their names, globs of them, or `all` for every field of the rows.

        Raises:
            InvalidArgumentError: There is no such label, or it is no number.
            DatasetError: Some shards lack it, or `metadata.db` cannot be read.

        """
        return LabelReader(self._columns, split_names(names))

    def read_labels(
        self, indices: ArrayLike, names: str | Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        """Read labels, name -> `(n, *shape)`, in the order of `indices`.

        uint8 stays so, other integers become int64, floats stay float32 or float64.

        Args:
            indices: Step indices, (n,); duplicates are allowed.
            names: Fields of the rows, elements of array fields (`branch_evs_0`), what the rules of
                the game say (`empty_cells`, `max_exponent`, `max_in_corner`, `legal_moves`,
                `merges`), and what `metadata.db` says of the run (`run_seed`, `run_steps`,
                `run_max_score`, `run_highest_tile`); globs of them; `all` for every field of the
                rows but `board`, which `read_boards` gives decoded.

        Raises:
            InvalidArgumentError: There is no such label, or it is no number.
            StepIndexError: An index is negative or past the end.
            DatasetError: A row cannot be read, or a value does not fit into int64.

        """
        steps = step_indices(indices)
        return self.label_reader(names).read(steps, np.empty((len(steps), CELLS), np.uint8))

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
            DatasetError: a row cannot be read.
        """
        indices = step_indices(indices)
        if out is None:
            out = np.empty((len(indices), CELLS), np.uint8)
        elif not isinstance(out, np.ndarray) or out.dtype != np.uint8:
            found = getattr(out, "dtype", type(out).__name__)
            raise TypeError(f"out: a NumPy array of uint8 is wanted, not of {found}")
        self._dataset.read_boards(indices, out, cancel)
        return out

    def read_rows(self, indices: ArrayLike) -> NDArray[np.void]:
        """Read whole rows, structured (n,) of `self.dtype`, in the order of `indices`.

        Raises as `read_boards` does, and `DatasetError` where shards differ in their rows.
        """
        indices = step_indices(indices)
        rows: NDArray[np.void] = np.empty(len(indices), self.dtype)
        self._dataset.read_rows(
            indices, rows.view(np.uint8).reshape(len(rows), self.dtype.itemsize)
        )
        return rows
