"""Reads consecutive rows of a dataset on all cores: to filter them, or to locate steps of runs."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
from numpy.typing import NDArray

from dump_activations import _rust
from dump_activations.dataset.columns import ColumnReader, Columns, Values
from dump_activations.dataset.expressions import Expression
from dump_activations.dataset.filters import evaluate
from dump_activations.dataset.sampling import Matches, Steps
from dump_activations.errors import IndicesError, InvalidArgumentError, option
from dump_activations.progress import Count

# A few megabytes: the columns of a chunk stay in a core's cache, and the interpreter's share of
# the time is small. A multiple of 8, since a chunk's matches are packed into bytes.
CHUNK_ROWS = 1 << 18
# Seconds between reports of progress, and between checks for an interrupt.
_PAUSE = 0.05

RUN = "run_id"
STEPS = ("step_index", "step_idx")
"""Names that rows may have for the number of their step in its run."""


def scan_rows(
    reader: ColumnReader,
    rows: range,
    look: Callable[[int, int, Values], None],
    progress: Count | None,
) -> None:
    """Read consecutive rows chunk by chunk, and call `look` from any thread in any order.

    It takes the first row of a chunk, the count of rows and their columns. The calling thread
    reports progress and handles interrupts. Where several chunks fail, the error of the first one
    is raised.
    """
    starts = iter(range(rows.start, rows.stop, CHUNK_ROWS))
    done, errors = 0, dict[int, BaseException]()
    lock, stop, cancel = threading.Lock(), threading.Event(), _rust.Cancel()

    def work() -> None:
        nonlocal done
        buffers = reader.buffers(min(CHUNK_ROWS, len(rows)))
        while not stop.is_set():
            with lock:
                start = next(starts, None)
            if start is None:
                return
            count = min(CHUNK_ROWS, rows.stop - start)
            try:
                look(start, count, reader.scan(start, count, buffers, cancel))
            except BaseException as error:
                errors[start] = error
                stop.set()  # The chunks before it were all handed out, and finish.
                return
            with lock:
                done += count

    threads = min(len(os.sched_getaffinity(0)), -(-len(rows) // CHUNK_ROWS))
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="scan") as executor:
        try:
            running = {executor.submit(work) for _ in range(threads)}
            while running:
                finished, running = wait(running, _PAUSE)
                for each in finished:
                    each.result()
                if progress is not None:
                    progress(done, len(rows))
        except BaseException:
            stop.set()
            cancel.ask()
            raise
    if errors:
        raise errors[min(errors)]


def find_matches(
    columns: Columns, where: Expression, steps: range, progress: Count | None
) -> Matches:
    """Find which of `steps`, ascending, match a filter. Raises as `StepsDataset.find` does."""
    named = {name: columns.find(name, of="where") for name in where.names}
    for name, column in named.items():
        if column.shape:
            elements = ["_".join(map(str, (name, *at))) for at in np.ndindex(column.shape)]
            raise InvalidArgumentError(
                f"{option('where')}: {name!r} is an array; name one of its elements, "
                f"{elements[0]} to {elements[-1]}"
            )
        if column.dtype.kind not in "biuf":
            raise InvalidArgumentError(
                f"{option('where')}: {name!r} must be a number; it is {column.dtype}"
            )
    # Refuse a wrong filter before any row is read.
    none = {name: np.empty(0, column.dtype) for name, column in named.items()}
    evaluate(where, none, np.empty(0, np.bool_), first=0)
    rows = range(steps.start, steps[-1] + 1)
    matches = Matches(rows.start, len(rows), chunk_rows=CHUNK_ROWS)

    def look(first: int, count: int, values: Values) -> None:
        selected_N = np.zeros(count, np.bool_)
        selected_N[(steps.start - first) % steps.step :: steps.step] = True
        matches.put(first, evaluate(where, values, selected_N, first))

    scan_rows(ColumnReader(columns.dataset, named), rows, look, progress)
    return matches


def locate_rows(
    columns: Columns, run_ids: Steps, run_steps: Steps, progress: Count | None
) -> Steps:
    """Find the rows of these runs and steps, int64 (n,), as `StepsDataset.locate` does."""
    if len(run_ids) == 0:
        return np.empty(0, np.int64)
    step = next((name for name in STEPS if name in columns.fields), STEPS[0])
    read = {name: columns.find(name, of="indices") for name in (RUN, step)}
    for name, column in read.items():
        if column.shape or column.dtype.kind not in "iu":
            raise InvalidArgumentError(
                f"{option('indices')}: {name!r} of {columns.dataset.path} must be an integer "
                f"field; it is {column.dtype}"
            )
    runs, run_places = np.unique(run_ids, return_inverse=True)
    steps, step_places = np.unique(run_steps, return_inverse=True)
    # One int64 below n**2 per run and step, so that pairs can be sorted.
    pairs, places = np.unique(run_places * len(steps) + step_places, return_inverse=True)
    rows, counts = np.zeros((2, len(pairs)), np.int64)
    lock = threading.Lock()

    def look(first: int, _: int, values: Values) -> None:
        at, run_places = _find(values[RUN], runs)
        among, step_places = _find(values[step][at], steps)
        at, run_places = at[among], run_places[among]
        among, found = _find(run_places * len(steps) + step_places, pairs)
        with lock:
            rows[found] = first + at[among]
            np.add.at(counts, found, 1)

    scan_rows(ColumnReader(columns.dataset, read), range(columns.dataset.rows), look, progress)
    wrong = counts[places] != 1
    if wrong.any():
        at = int(np.argmax(wrong))
        raise IndicesError(
            f"{option('indices')}: {counts[places[at]] or 'no'} rows of {columns.dataset.path} are "
            f"step {run_steps[at]} of run {run_ids[at]}"
        )
    return rows[places]


def _find(values: NDArray[np.integer], among: Steps) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return which values are among sorted ones, and their places there."""
    numbers = values.astype(np.int64)
    places = np.minimum(np.searchsorted(among, numbers), len(among) - 1)
    is_found = among[places] == numbers
    if values.dtype.kind == "u":
        is_found &= numbers >= 0  # Values from 2**63 on wrapped around.
    at = np.flatnonzero(is_found)
    return at, places[at]
