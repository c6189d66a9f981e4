"""Threads that write batches into an output file."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from dump_activations.storage.digests import RunningDigest
from dump_activations.storage.writing.batch_file import BatchFile
from dump_activations.timing import Chunk, SharedStopwatch

# Bytes of a span: few enough for several threads to share a batch.
SPAN_NBYTES = 4 << 20

# A tensor with less than this in a chunk is written when the whole batch is there.
MIN_CHUNK_NBYTES = 256 << 10

# Batches handed over and not yet written; a caller with fewer buffers waits for these instead.
BATCHES_AHEAD = 8


class WriterPool:
    """Writes batches with several threads; use as a context manager, inside the file's.

    After the first error nothing more is written; it is raised by the next `submit`, and on leaving
    the context.
    """

    def __init__(self, file: BatchFile, *, threads: int) -> None:
        self._file = file
        self._spans: queue.SimpleQueue[_Span | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(BATCHES_AHEAD)
        self._error: BaseException | None = None
        self._writing = SharedStopwatch()
        self._threads: list[threading.Thread] = []
        try:
            for i in range(threads):
                thread = threading.Thread(target=self._work, name=f"writer-{i}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self._join()
            raise

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
        tensors: Mapping[str, npt.NDArray[np.uint8]],
        *,
        chunks: Sequence[Chunk] = (),
        done: Callable[[], object],
    ) -> None:
        """Hand over a batch; blocks while `BATCHES_AHEAD` others are not written.

        Args:
            first_row: the batch's first row, a multiple of the file's `batch_rows`.
            tensors: the rows of every batched tensor, as their bytes.
            chunks: all of the batch, in order; each is waited for before its bytes are read. None
                where all bytes are there.
            done: called once, when they are no longer needed: whether or not they were written,
                and also if this call raises.

        Raises:
            BaseException: the first error of any batch before.
        """

        def leave() -> None:
            self._room.release()
            done()

        submission = _Submission(self._file, first_row, tensors, leave)
        spans = submission.split(chunks)
        queued = 0
        try:
            self._room.acquire()
            self._raise_error()
            for span in spans:
                self._spans.put(span)
                queued += 1
        finally:
            submission.drop(len(spans) - queued)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _join(self) -> None:
        for _ in self._threads:
            self._spans.put(None)
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
        while (span := self._spans.get()) is not None:
            try:
                if self._error is None:
                    span.submission.write(span, self._writing)
                else:
                    span.submission.drop(1)
            except BaseException as error:
                # Two threads may fail at once; either error is as good.
                self._error = self._error or error


@dataclass(frozen=True)
class _Span:
    """Bytes of one tensor of a batch; `start` counts from the batch's first byte."""

    submission: "_Submission"
    name: str
    start: int
    data: npt.NDArray[np.uint8]
    chunks: Sequence[Chunk]


def _stretches(
    nbytes: Mapping[str, int], chunks: Sequence[Chunk]
) -> Iterator[tuple[str, int, int, Sequence[Chunk]]]:
    """Order the bytes of a batch's tensors, as (name, start, stop, what to wait for).

    A chunk is written as soon as it is there, while the cache of the core that computed it may
    still hold it.
    """
    rows = chunks[-1].stop if chunks else 0
    split = {
        name: of_all // rows
        for name, of_all in nbytes.items()
        if rows and of_all // rows * chunks[0].stop >= MIN_CHUNK_NBYTES
    }
    for chunk in chunks:
        for name, row_nbytes in split.items():
            yield name, chunk.start * row_nbytes, chunk.stop * row_nbytes, [chunk]
    for name, of_all in nbytes.items():
        if name not in split:
            yield name, 0, of_all, chunks


class _Submission:
    """A batch on its way into the file, in spans that different threads write."""

    def __init__(
        self,
        file: BatchFile,
        first_row: int,
        tensors: Mapping[str, npt.NDArray[np.uint8]],
        done: Callable[[], object],
    ) -> None:
        self._file = file
        self._first_row = first_row
        self._tensors = tensors
        self._done = done
        self._lock = threading.Lock()
        self._left = 0
        self._complete = True
        self._digests = {name: RunningDigest() for name in tensors}

    def split(self, chunks: Sequence[Chunk]) -> list[_Span]:
        """Cut the batch into spans, each to be given to `write` or counted in `drop`."""
        nbytes = {name: data.nbytes for name, data in self._tensors.items()}
        spans = [
            _Span(self, name, at, self._tensors[name][at : min(at + at_once, stop)], awaited)
            for name, start, stop, awaited in _stretches(nbytes, chunks)
            for at_once in [self._file.span_nbytes(name, SPAN_NBYTES)]
            for at in range(start, stop, at_once)
        ]
        self._left = len(spans)
        return spans

    def write(self, span: _Span, writing: SharedStopwatch) -> None:
        """Write a span; count the time it takes, without the wait for the data."""
        written = False
        try:
            for chunk in span.chunks:
                chunk.wait()
            with writing:
                digest = self._file.write_span(self._first_row, span.name, span.start, span.data)
            with self._lock:
                self._digests[span.name].add(span.start, digest)
            written = True
        finally:
            self._leave(1, complete=written)

    def drop(self, spans: int) -> None:
        """Give up spans that will not be written."""
        if spans:
            self._leave(spans, complete=False)

    def _leave(self, spans: int, *, complete: bool) -> None:
        with self._lock:
            self._left -= spans
            self._complete &= complete
            if self._left:
                return
        try:
            if self._complete:
                digests = {name: running.whole for name, running in self._digests.items()}
                self._file.finish_batch(self._first_row, digests)
        finally:
            self._done()
