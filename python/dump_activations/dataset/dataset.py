"""StepsDataset: a directory of step shards, read by global step index."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dump_activations import _rust
from dump_activations.dataset.columns import Columns, LabelReader
from dump_activations.dataset.expressions import Expression, parse, split_names
from dump_activations.dataset.filters import find_matches, locate_rows
from dump_activations.dataset.sampling import Matches, StepRange, sample, step_indices
from dump_activations.dataset.shards import Shard, fetch_rows, open_shards
from dump_activations.dtypes import CELLS
from dump_activations.errors import (
    DatasetError,
    IndicesError,
    InvalidArgumentError,
    StepIndexError,
    option,
    printable,
    slice_text,
    warn,
    whole_number,
)
from dump_activations.progress import Count
from dump_activations.remote.mirror import url_of

if TYPE_CHECKING:
    # For the types of a `DataLoader`. It only needs the methods, and a dataset needs no torch.
    from torch.utils.data import Dataset

    _Dataset = Dataset[NDArray[np.uint8]]
else:
    _Dataset = object

# Lines of a repr, next to its title and two that count the rest.
_FIELDS_SHOWN = 12
_SHARDS_SHOWN = 5


class StepsDataset(_Dataset):
    """A dataset of steps: the rows of a directory's `steps-*.npy` shards, or of its `steps.npy`.

    A global step index counts rows through the shards in the lexicographic order of their names.
    Opening reads headers only, and keeps no file open. Instances can be pickled (by path), used
    from several threads and after a fork. `torch.utils.data.DataLoader` takes them, with or
    without workers:

        ds = StepsDataset("datasets/d7_test_v1")
        loader = DataLoader(ds, batch_size=1024, sampler=ds.sample_indices(65536), num_workers=2)
        for boards in loader:  # uint8 (1024, 16)

    Copies of shards that synchronisers made are left out. They, gaps in the shards' numbers and
    names that do not sort as their numbers cause a warning.

    Args:
        path: The directory.
        labels: With any, items are dicts: `boards`, `indices` and these, as `read_labels` has them.

    Raises:
        InvalidArgumentError: There is no such label.
        DatasetNotFoundError: There is no such directory, or no shard in it.
        DatasetError: A shard's header, fields or size are wrong.
    """

    def __init__(self, path: str | os.PathLike[str], labels: str | Sequence[str] = ()) -> None:
        self._dataset = open_shards(path)
        self._labels = split_names(labels)
        self._label_reader = self.label_reader(self._labels) if self._labels else None

    @property
    def path(self) -> Path:
        """The directory."""
        return self._dataset.path

    @property
    def source(self) -> str:
        """The URL that the dataset is read from, without credentials, or else its directory."""
        url = url_of(self.shards[0].path)
        return url.rpartition("/")[0] if url else os.fspath(self.path)

    @cached_property
    def dtype(self) -> np.dtype[np.void]:
        """The dtype of a row of the first shard, as its header has it, padding included."""
        return self._columns.layouts[0][1]

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The files in order."""
        return tuple(Shard(*shard) for shard in self._dataset.shards)

    @cached_property
    def layout_sha256(self) -> str:
        """Digest of the shards' names, row counts and row layouts. No row is read."""
        descrs = self._dataset.descrs
        shards = [
            [shard.path.name, shard.rows, descr]
            for shard, descr in zip(self.shards, descrs, strict=True)
        ]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

    @cached_property
    def _columns(self) -> Columns:
        return Columns(self._dataset)

    def __len__(self) -> int:
        """Rows in all shards."""
        return self._dataset.rows

    def __repr__(self) -> str:
        """Return at most 20 lines: the path, the rows, their fields, and the shards."""
        title, *tables = self._described()
        return "\n".join([title, *(f"  {'  '.join(row)}" for rows in tables for row in rows)])

    def _repr_html_(self) -> str:
        """Return the same as tables, as a notebook shows them."""
        title, *tables = self._described()
        cells = [
            "".join(f"<tr><td>{'</td><td>'.join(map(escape, row))}</td></tr>" for row in rows)
            for rows in tables
        ]
        return f"<p>{escape(title)}</p>" + "".join(f"<table>{each}</table>" for each in cells)

    def _described(self) -> tuple[str, list[tuple[str, ...]], list[tuple[str, ...]]]:
        """Return a title, rows about the first fields, and rows about the first shards."""
        labels = f", labels={list(self._labels)}" if self._labels else ""
        title = (
            f"StepsDataset({self.source!r}{labels}): {len(self):,} rows of "
            f"{self.dtype.itemsize} bytes, {len(self.shards):,} shards"
        )

        def first(rows: list[tuple[str, ...]], shown: int, what: str) -> list[tuple[str, ...]]:
            more = (f"... and {len(rows) - shown:,} more {what}",)
            return [*rows[:shown], *[more] * (len(rows) > shown)]

        fields: list[tuple[str, ...]] = [
            (printable(name), f"{self.dtype[name].base} {self.dtype[name].shape or ''}".rstrip())
            for name in self.dtype.names or ()
        ]
        shards: list[tuple[str, ...]] = [
            (printable(shard.path.name), f"{shard.rows:,} rows from step {shard.first:,}")
            for shard in self.shards
        ]
        return title, first(fields, _FIELDS_SHOWN, "fields"), first(shards, _SHARDS_SHOWN, "shards")

    def __reduce__(self) -> tuple[type[Self], tuple[Path, Sequence[str]]]:
        return type(self), (self.path, self._labels)

    def __getitem__(self, index: SupportsIndex | slice | ArrayLike) -> Any:
        """Read one board, uint8 (16,), or the boards of a slice or a list of steps, uint8 (n, 16).

        With labels, a dict: `boards`, `indices` (int64), and each label.
        """
        if isinstance(index, slice):
            return self._items(np.arange(*index.indices(len(self)), dtype=np.int64))
        if (step := whole_number(index)) is None:
            return self._items(step_indices(index))  # type: ignore[arg-type]
        if not 0 <= step < len(self):
            raise StepIndexError(
                f"step index must be from 0 to {len(self) - 1} in {self.path}; got {step}"
            )
        items = self._items(np.array([step]))
        return {key: values[0] for key, values in items.items()} if self._labels else items[0]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Read a batch in one call, for a `DataLoader`.

        Boards, uint8 (n, 16); with labels, a list of dicts.
        """
        items = self._items(step_indices(indices))
        if not self._labels:
            return items
        return [dict(zip(items, each, strict=True)) for each in zip(*items.values(), strict=True)]

    def _items(self, indices: NDArray[np.int64]) -> Any:
        if self._label_reader is None:
            return self.read_boards(indices)
        boards_NS = np.empty((len(indices), CELLS), np.uint8)
        labels = self._label_reader.read(indices, boards_NS)
        return {"boards": boards_NS, "indices": indices, **labels}

    def sample_indices(
        self,
        n: int,
        seed: int = 0,
        where: str | Expression | None = None,
        *,
        progress: Count | None = None,
    ) -> NDArray[np.int64]:
        """Sample `n` step indices, int64 (n,), equal to NumPy's.

        They are `numpy.random.default_rng(seed).choice(len(self), size=n, replace=False)`. When n
        exceeds the rows they are `default_rng(seed).integers(0, len(self), size=n)`, with a
        warning. With a filter they are the same sample of what `find` returns,
        `choice(ds.find(where), size=n, replace=False)`. Memory grows with n, and with a filter by
        one bit per row.

        Args:
            n: The number of samples.
            seed: The seed, 0 or more.
            where: Sample only steps that match this filter, as in `find`.
            progress: Called in this thread with the rows done and all rows.

        Raises:
            InvalidArgumentError: n is below 1, the seed is negative, or the filter is wrong.
            DatasetError: The dataset has no rows.
            IndicesError: No row matches the filter.
        """
        return self.sample_from(self.matches(where, progress=progress), n, seed)

    def sample_from(self, steps: StepRange | Matches, n: int, seed: int) -> NDArray[np.int64]:
        """Sample from the steps that `matches` returned, as `sample_indices` does."""
        if len(steps) == 0:
            raise IndicesError(f"{option('where')}: no row of {self.path} matches")
        places = sample(len(steps), n, seed)
        if n > len(steps):
            rows = "rows" if isinstance(steps, StepRange) else "rows that match the filter"
            warn(
                f"{self.path} has {len(steps)} {rows}, fewer than {n} samples: sampled with "
                f"replacement; {option('steps', ':')} takes each row once"
            )
        return steps.take(places)

    def find(
        self,
        where: str | Expression,
        steps: slice | None = None,
        *,
        progress: Count | None = None,
    ) -> NDArray[np.int64]:
        """Find the steps that match a filter: int64 (n,), ascending.

        The filter is written as in Python, `"max_exponent >= 11 and run_id % 10 != 0"`:
        comparisons, `in (1, 2)`, arithmetic, `and`, `or`, `not`, `&`, `|` and `~` over fields of
        the rows, elements of array fields (`branch_evs_0`), labels and numbers. Integers are exact
        in 64 bits, and an operation that overflows is an error. Floats are float64. The shards are
        read once, on all cores.

        Args:
            where: The filter.
            steps: The steps to look at; all by default.
            progress: Called in this thread with the rows done and all rows.

        Raises:
            InvalidArgumentError: The filter cannot be parsed, or names an unknown column.
            DatasetError: A row cannot be read, or the filter divides by zero or overflows.
        """
        return self.matches(where, steps, progress=progress)[:]

    def matches(
        self,
        where: str | Expression | None,
        steps: slice | None = None,
        *,
        progress: Count | None = None,
    ) -> StepRange | Matches:
        """Return what `find` does, or all of `steps` without a filter, in at most a bit per row."""
        selected = range(len(self))[steps or slice(None)]
        if len(self) == 0:
            raise DatasetError(f"{self.path}: its shards have no rows")
        if not selected:
            raise InvalidArgumentError(
                f"{option('steps', slice_text(steps or slice(None)))} takes no row of {self.path}, "
                f"which has {len(self)}"
            )
        if where is None:
            return StepRange(selected)
        expression = parse(where) if isinstance(where, str) else where
        return find_matches(self._columns, expression, selected, progress)

    def locate(
        self, run_id: ArrayLike, step_index: ArrayLike, *, progress: Count | None = None
    ) -> NDArray[np.int64]:
        """Find the rows of these steps of these self-play runs: step indices, int64 (n,).

        Step indices change when a dataset is merged or sharded in another way; runs and their
        steps do not. `ds.locate(acts.labels["run_id"], acts.labels["step_index"])` gives the steps
        of an earlier dump in this dataset. The dataset is read once, on all cores, in memory that
        grows with n alone.

        Args:
            run_id: The run of each, as in the rows, (n,); duplicates are allowed.
            step_index: The number of each step in its run, as in the rows, (n,).
            progress: Called in this thread with the rows done and all rows.

        Raises:
            IndicesError: No row, or more than one, is such a step of such a run.
            InvalidArgumentError: The rows have no `run_id` and `step_index` or `step_idx`.
            DatasetError: A row cannot be read.
        """
        run_ids, run_steps = step_indices(run_id), step_indices(step_index)
        if len(run_ids) != len(run_steps):
            raise InvalidArgumentError(
                f"{option('indices')}: run_id and step_index must have one length; got "
                f"{len(run_ids)} and {len(run_steps)}"
            )
        return locate_rows(self._columns, run_ids, run_steps, progress)

    def label_reader(self, names: str | Sequence[str]) -> LabelReader:
        """Find labels by name, and raise, as `read_labels` does."""
        return LabelReader(self._columns, split_names(names))

    def read_labels(
        self, indices: ArrayLike, names: str | Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        """Read labels, name -> `(n, *shape)`, in the order of `indices`.

        uint8 and booleans are uint8, other integers int64; floats are float32 or float64.

        Args:
            indices: Step indices, (n,); duplicates are allowed.
            names: Fields of the rows, elements of array fields (`branch_evs_0`), labels by the
                rules of the game (`empty_cells`, `max_exponent`, `max_in_corner`, `legal_moves`,
                `merges`), and labels of the run from `metadata.db` (`run_seed`, `run_steps`,
                `run_max_score`, `run_highest_tile`). Also globs of them, and `all` for every field
                of the rows but `board`, which `read_boards` decodes.

        Raises:
            InvalidArgumentError: There is no such label, or it is not a number.
            StepIndexError: An index is negative or past the end.
            DatasetError: A row cannot be read, or a value does not fit into int64.
        """
        steps = step_indices(indices)
        return self.label_reader(names).read(steps, np.empty((len(steps), CELLS), np.uint8))

    def check_indices(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Return step indices of any shape, at least one, as int64 (n,), flattened in C order."""
        steps = step_indices(np.asarray(indices).reshape(-1))
        if len(steps) == 0:
            raise IndicesError(f"{option('indices')} must have at least one step index; got none")
        outside = (steps < 0) | (steps >= len(self))
        if outside.any():
            at = int(np.argmax(outside))
            raise StepIndexError(
                f"{option('indices')}: step index {steps[at]} at position {at} is outside "
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

        Cell 0 is the top left, row-major. Exponent e stands for the tile 2**e, 0 for an empty
        cell. The interpreter is released during the read. One call with all indices reads fastest.

        Args:
            indices: Step indices, (n,); duplicates are allowed.
            out: Array to fill and return: C-contiguous uint8 (n, 16).
            cancel: Lets another thread end the read, as Ctrl-C does in the main thread.

        Raises:
            TypeError: `out` is not an array of uint8.
            InvalidArgumentError: `out` has another shape, or cannot be written.
            StepIndexError: An index is negative or past the end.
            IndicesError: The indices are not integers or not one-dimensional.
            DatasetError: A row cannot be read.
        """
        indices = step_indices(indices)
        if out is None:
            out = np.empty((len(indices), CELLS), np.uint8)
        elif not isinstance(out, np.ndarray) or out.dtype != np.uint8:
            given = getattr(out, "dtype", type(out).__name__)
            raise TypeError(f"out must be a NumPy array of uint8; got {given}")
        fetch_rows(self._dataset, indices, cancel)
        self._dataset.read_boards(indices, out, cancel)
        return out

    def read_rows(self, indices: ArrayLike) -> NDArray[np.void]:
        """Read whole rows, structured (n,) of `self.dtype`, in the order of `indices`.

        Raises as `read_boards` does, and `DatasetError` where shards differ in their rows.
        """
        indices = step_indices(indices)
        rows: NDArray[np.void] = np.empty(len(indices), self.dtype)
        fetch_rows(self._dataset, indices)
        out = rows.view(np.uint8).reshape(len(rows), self.dtype.itemsize)
        self._dataset.read_rows(indices, out)
        return rows
