"""Looks at consecutive rows of a dataset, on all cores."""

import os
import threading
from collections.abc import Callable, Iterator

import numpy as np

from dump_activations import _rust
from dump_activations.dataset.columns import ColumnReader, Values
from dump_activations.dataset.expressions import Expression
from dump_activations.dataset.filters import evaluate
from dump_activations.dataset.matches import Matches
from dump_activations.progress import Count

# Some megabytes of rows: few enough for a core's cache to hold their columns, and enough for the
# interpreter to matter little.
CHUNK_ROWS = 1 << 18
# Seconds between reports of progress, and questions whether the user wants to end it.
_PAUSE = 0.05

Look = Callable[[int, int, Values], None]
"""Called with the first of consecutive rows, their number, and the columns that were read."""


def find_matches(
    reader: ColumnReader, where: Expression, steps: range, progress: Count | None = None
) -> Matches:
    """Find the steps for which a filter holds.

    Args:
        reader: reads the columns that the filter names.
        where: the filter.
        steps: those that are looked at, ascending.
        progress: called in this thread.

    Raises:
        InvalidArgumentError: the filter mixes numbers and comparisons.
        DatasetError: a row cannot be read, or the filter divides by zero.
    """
    rows = range(steps.start, steps[-1] + 1) if steps else range(0)
    matches = Matches(rows.start, len(rows), chunk_rows=CHUNK_ROWS)

    def look(first: int, count: int, columns: Values) -> None:
        wanted = None
        if steps.step > 1:
            wanted = np.zeros(count, np.bool_)
            wanted[(steps.start - first) % steps.step :: steps.step] = True
        holds = evaluate(where, columns, rows=count, first=first, wanted=wanted)
        matches.put((first - rows.start) // CHUNK_ROWS, holds)

    scan_rows(reader, rows, look, progress)
    return matches


def scan_rows(reader: ColumnReader, rows: range, look: Look, progress: Count | None = None) -> None:
    """Read columns of consecutive rows, chunk by chunk, and look at them in any thread and order.

    Raises what `look` raises, and:
        DatasetError: a row cannot be read.
    """
    _Scan(reader, look).run(rows, progress)


class _Scan:
    """The threads of a scan. The one that began it only waits, and hears interrupts."""

    def __init__(self, reader: ColumnReader, look: Look) -> None:
        self._reader = reader
        self._look = look
        self._cancel = _rust.Cancel()
        self._error: BaseException | None = None
        self._done = 0
        self._lock = threading.Lock()

    def run(self, rows: range, progress: Count | None) -> None:
        starts = range(0, len(rows), CHUNK_ROWS)
        chunks = (rows[start : start + CHUNK_ROWS] for start in starts)
        threads = [
            threading.Thread(target=self._work, args=(chunks, len(rows)), name=f"scan-{i}")
            for i in range(min(len(os.sched_getaffinity(0)), len(starts)))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(_PAUSE)
                    if progress is not None:
                        progress(self._done, len(rows))
        except BaseException as error:
            self._stop(error)
            raise
        finally:
            # One whose start was interrupted ends by itself: there is an error.
            for thread in threads:
                if thread.is_alive():
                    thread.join()
        if self._error is not None:
            raise self._error
        if progress is not None:
            progress(len(rows), len(rows))

    def _work(self, chunks: Iterator[range], rows: int) -> None:
        try:
            buffers = self._reader.buffers(min(CHUNK_ROWS, rows))
            while self._error is None:
                with self._lock:
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                columns = self._reader.scan(chunk.start, len(chunk), buffers, self._cancel)
                self._look(chunk.start, len(chunk), columns)
                with self._lock:
                    self._done += len(chunk)
        except BaseException as error:
            self._stop(error)

    def _stop(self, error: BaseException) -> None:
        """End all threads for the first error."""
        with self._lock:
            self._error = self._error or error
        self._cancel.ask()
