"""Threads that write batches into an output file."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from dump_activations.output.digest import RunningDigest
from dump_activations.output.file import OutputFile
from dump_activations.parts import Part
from dump_activations.timing import SharedStopwatch

RUN_NBYTES = 4 << 20
"""Bytes that a thread writes at a time: few enough for several threads to share a batch."""

MIN_PART_NBYTES = 256 << 10
"""A tensor with less than this in a part is written when the whole batch is there."""

BATCHES_AHEAD = 8
"""Batches handed over and not yet written; a caller with fewer buffers waits for these instead."""


class WriterPool:
    """Writes batches with several threads; use as a context manager, inside the file's.

    After the first error nothing more is written; it is raised by the next `submit` and `close`.
    """

    def __init__(self, file: OutputFile, *, threads: int) -> None:
        self._file = file
        self._runs: queue.SimpleQueue[_Run | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(BATCHES_AHEAD)
        self._error: BaseException | None = None
        self._writing = SharedStopwatch()
        self._threads = [
            threading.Thread(target=self._work, name=f"writer-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._join()
        if kind is None:
            self._raise_error()

    @property
    def busy_seconds(self) -> float:
        """Seconds in which any thread was digesting or writing, or held up by the disk."""
        return self._writing.seconds

    def submit(
        self,
        first_row: int,
        slices: Mapping[str, npt.NDArray[np.uint8]],
        *,
        parts: Sequence[Part] | None = None,
        done: Callable[[], object],
    ) -> None:
        """Hands over a batch; blocks while `BATCHES_AHEAD` others are not written.

        Args:
            first_row: the batch's first row, a multiple of the file's `batch_rows`.
            slices: the rows of every batched tensor, as runs of bytes.
            parts: all of the batch, in order; each is waited for before its bytes are read. None
                where all bytes are there.
            done: called once, when they are no longer needed: whether or not they were written,
                and also if this call raises.

        Raises:
            BaseException: the first error of any batch before.
        """

        def leave() -> None:
            self._room.release()
            done()

        job = _Batch(self._file, first_row, leave)
        runs = job.split(slices, parts or ())
        queued = 0
        try:
            self._room.acquire()
            self._raise_error()
            for run in runs:
                self._runs.put(run)
                queued += 1
        finally:
            job.drop(len(runs) - queued)

    def close(self) -> None:
        """Waits until all batches are written and ends the threads."""
        self._join()
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _join(self) -> None:
        for _ in self._threads:
            self._runs.put(None)
        try:
            self._wait_for_threads()
        except BaseException as error:
            # An impatient user: what is queued is dropped, but no write may outlive the file.
            self._error = self._error or error
            self._wait_for_threads()
            raise
        self._threads = []

    def _wait_for_threads(self) -> None:
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (run := self._runs.get()) is not None:
            try:
                if self._error is None:
                    run.batch.write(run, self._writing)
                else:
                    run.batch.drop(1)
            except BaseException as error:
                # Two threads may fail at once; either error is as good.
                self._error = self._error or error


@dataclass(frozen=True)
class _Run:
    """Bytes of one tensor of a batch; `start` counts from the batch's first byte."""

    batch: "_Batch"
    name: str
    start: int
    data: npt.NDArray[np.uint8]
    parts: Sequence[Part]


def _spans(
    nbytes: Mapping[str, int], parts: Sequence[Part]
) -> Iterator[tuple[str, int, int, Sequence[Part]]]:
    """The bytes of a batch's tensors, as (name, start, stop, what to wait for), in writing order.

    A part is written as soon as it is there, while the cache of the core that computed it may still
    hold it.
    """
    rows = parts[-1].stop if parts else 0
    split = {
        name: of_all // rows
        for name, of_all in nbytes.items()
        if rows and of_all // rows * parts[0].stop >= MIN_PART_NBYTES
    }
    for part in parts:
        for name, row_nbytes in split.items():
            yield name, part.start * row_nbytes, part.stop * row_nbytes, [part]
    for name, of_all in nbytes.items():
        if name not in split:
            yield name, 0, of_all, parts


class _Batch:
    """A batch on its way into the file, in runs that different threads write."""

    def __init__(
        self,
        file: OutputFile,
        first_row: int,
        done: Callable[[], object],
    ) -> None:
        self._file = file
        self._first_row = first_row
        self._done = done
        self._lock = threading.Lock()
        self._left = 0
        self._complete = True
        self._digests: dict[str, RunningDigest] = {}

    def split(
        self, slices: Mapping[str, npt.NDArray[np.uint8]], parts: Sequence[Part]
    ) -> list[_Run]:
        """The runs to be written, each to be given to `write` or counted in `drop`."""
        self._digests = {name: RunningDigest() for name in slices}
        spans = _spans({name: data.nbytes for name, data in slices.items()}, parts)
        runs = [
            _Run(self, name, at, slices[name][at : min(at + RUN_NBYTES, stop)], awaited)
            for name, start, stop, awaited in spans
            for at in range(start, stop, RUN_NBYTES)
        ]
        self._left = len(runs)
        return runs

    def write(self, run: _Run, writing: SharedStopwatch) -> None:
        """Writes a run; counts the time it takes, without the wait for the data."""
        written = False
        try:
            for part in run.parts:
                part.wait()
            with writing:
                digest = self._file.write_run(self._first_row, run.name, run.start, run.data)
            with self._lock:
                self._digests[run.name].add(run.start, digest)
            written = True
        finally:
            self._leave(1, complete=written)

    def drop(self, runs: int) -> None:
        """Gives up runs that will not be written."""
        if runs:
            self._leave(runs, complete=False)

    def _leave(self, runs: int, *, complete: bool) -> None:
        with self._lock:
            self._left -= runs
            self._complete &= complete
            if self._left:
                return
        try:
            if self._complete:
                digests = {name: running.whole for name, running in self._digests.items()}
                self._file.finish_batch(self._first_row, digests)
        finally:
            self._done()
