"""Looks at consecutive rows of a pool for those that pass a filter, on all cores."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from dump_activations import _rust
from dump_activations.place import Place
from dump_activations.pool.columns import ColumnReader
from dump_activations.pool.expressions import Expression
from dump_activations.pool.filters import evaluate
from dump_activations.pool.matches import Matches

# Some megabytes of rows: few enough for a core's cache to hold their columns, and enough for the
# interpreter to matter little.
CHUNK_ROWS = 1 << 18
# Seconds between reports of progress, and questions whether the user wants to end it.
_PAUSE = 0.05

Progress = Callable[[int, int], None]
"""Called now and then with the rows done and the rows in all."""


def find_matches(
    reader: ColumnReader, where: Expression, steps: range, progress: Progress | None = None
) -> Matches:
    """Find the steps for which a filter holds.

    Args:
        reader: reads the columns that the filter names.
        where: the filter.
        steps: those that are looked at, ascending.
        progress: called in this thread.

    Raises:
        InvalidArgumentError: the filter mixes numbers and comparisons.
        PoolError: a row cannot be read, or the filter divides by zero.
    """
    rows = steps[-1] + 1 - steps[0] if steps else 0
    matches = Matches(steps.start, rows, chunk_rows=CHUNK_ROWS)
    scan = _Scan(reader, where, steps, matches)
    scan.run(range(0, rows, CHUNK_ROWS), rows, progress)
    return matches


class _Scan:
    """The threads of a scan. The one that began it only waits, and hears interrupts."""

    def __init__(
        self, reader: ColumnReader, where: Expression, steps: range, matches: Matches
    ) -> None:
        self._reader = reader
        self._where = where
        self._steps = steps
        self._matches = matches
        self._cancel = _rust.Cancel()
        self._error: BaseException | None = None
        self._done = 0
        self._lock = threading.Lock()

    def run(self, starts: range, rows: int, progress: Progress | None) -> None:
        chunks = iter(enumerate(starts))
        count = min(Place.here().cores, len(starts))
        threads = [
            threading.Thread(target=self._work, args=(chunks, rows), name=f"scan-{i}")
            for i in range(count)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(_PAUSE)
                    if progress is not None:
                        progress(self._done, rows)
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
            progress(rows, rows)

    def _work(self, chunks: Iterator[tuple[int, int]], rows: int) -> None:
        try:
            buffers = self._reader.buffers(min(CHUNK_ROWS, rows))
            while self._error is None:
                with self._lock:
                    chunk, start = next(chunks, (None, 0))
                if chunk is None:
                    return
                count = min(CHUNK_ROWS, rows - start)
                self._matches.put(chunk, self._holds(start, count, buffers))
                with self._lock:
                    self._done += count
        except BaseException as error:
            self._stop(error)

    def _holds(self, start: int, count: int, buffers: list[NDArray[np.uint8]]) -> NDArray[np.bool_]:
        first = self._steps.start + start
        columns = self._reader.scan(first, count, buffers, self._cancel)
        wanted = None
        if self._steps.step > 1:
            wanted = np.zeros(count, np.bool_)
            wanted[-start % self._steps.step :: self._steps.step] = True
        return evaluate(self._where, columns, rows=count, first=first, wanted=wanted)

    def _stop(self, error: BaseException) -> None:
        """End all threads for the first error."""
        with self._lock:
            self._error = self._error or error
        self._cancel.ask()
