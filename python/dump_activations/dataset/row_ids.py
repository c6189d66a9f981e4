"""Finds rows by what identifies them in any dataset: the self-play run they are of, and its step."""

import threading

import numpy as np
from numpy.typing import NDArray

from dump_activations.dataset.columns import ColumnReader, Columns, Values
from dump_activations.dataset.scan import scan_rows
from dump_activations.errors import IndicesError, InvalidArgumentError, option
from dump_activations.progress import Count

RUN = "run_id"
STEPS = ("step_index", "step_idx")
"""What rows may call the number of their step within its run."""


def locate_rows(
    columns: Columns,
    run_ids: NDArray[np.int64],
    run_steps: NDArray[np.int64],
    progress: Count | None = None,
) -> NDArray[np.int64]:
    """Find the rows of these runs and steps, int64 (n,), in one pass over the dataset.

    Raises:
        IndicesError: no row is such a step of such a run, or several are.
        InvalidArgumentError: the rows do not say what they are of.
        DatasetError: a row cannot be read.
    """
    if len(run_ids) == 0:
        return np.empty(0, np.int64)
    step = next((name for name in STEPS if name in columns.fields), STEPS[0])
    found = {name: columns.find(name, of="indices") for name in (RUN, step)}
    for name, column in found.items():
        if column.shape or column.dtype.kind not in "iu":
            raise InvalidArgumentError(
                f"{option('indices')}: {name!r} in {columns.dataset.path} is no whole number"
            )
    wanted = _Wanted(run_ids, run_steps)

    def look(first: int, _: int, values: Values) -> None:
        wanted.look(first, values[RUN], values[step])

    scan_rows(ColumnReader(columns.dataset, found), range(columns.dataset.rows), look, progress)
    counts = wanted.counts[wanted.places]
    if (counts != 1).any():
        at = int(np.argmax(counts != 1))
        raise IndicesError(
            f"{option('indices')}: {counts[at] or 'no'} rows of {columns.dataset.path} are step "
            f"{run_steps[at]} of run {run_ids[at]}"
        )
    return wanted.rows[wanted.places]


class _Wanted:
    """Runs and steps that are looked for, each pair once.

    Attributes:
        places: of each pair that is wanted, its place among the different ones.
        rows: a row of each different pair.
        counts: how many rows it has.
    """

    def __init__(self, run_ids: NDArray[np.int64], run_steps: NDArray[np.int64]) -> None:
        self._run_ids, run_places = np.unique(run_ids, return_inverse=True)
        self._steps, step_places = np.unique(run_steps, return_inverse=True)
        # Below n**2, so that any two numbers make one that can be sorted.
        pairs = run_places * len(self._steps) + step_places
        self._pairs, self.places = np.unique(pairs, return_inverse=True)
        self.rows = np.zeros(len(self._pairs), np.int64)
        self.counts = np.zeros(len(self._pairs), np.int64)
        self._lock = threading.Lock()

    def look(
        self, first: int, run_ids: NDArray[np.integer], run_steps: NDArray[np.integer]
    ) -> None:
        """Note which of consecutive rows are wanted; any thread may."""
        at, run_places = _find(run_ids, self._run_ids)
        among, step_places = _find(run_steps[at], self._steps)
        at, run_places = at[among], run_places[among]
        among, pairs = _find(run_places * len(self._steps) + step_places, self._pairs)
        with self._lock:
            self.rows[pairs] = first + at[among]
            np.add.at(self.counts, pairs, 1)


def _find(
    values: NDArray[np.integer], among: NDArray[np.int64]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return which values are among sorted ones, and the places of those there."""
    numbers = values.astype(np.int64)
    places = np.minimum(np.searchsorted(among, numbers), len(among) - 1)
    found = among[places] == numbers
    if values.dtype.kind == "u":
        found &= numbers >= 0  # Those from 2**63 on are none of any int64.
    at = np.flatnonzero(found)
    return at, places[at]
