"""Threads that digest batches and write them into output files."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from dump_activations.storage.digests import RunningDigest
from dump_activations.storage.statistics import Moments
from dump_activations.storage.writing.output import OutputFile
from dump_activations.timing import Chunk, SharedStopwatch

# Bytes of a span: few enough for several threads to share a batch.
SPAN_NBYTES = 4 << 20

# A tensor with fewer bytes than this in a chunk is written when the whole batch is there.
MIN_CHUNK_NBYTES = 256 << 10

# Batches that are submitted and not yet written. A caller with fewer buffers waits for these first.
BATCHES_AHEAD = 8


class Writers:
    """Writes batches with several threads; use as a context manager, inside the files'.

    After the first error nothing more is written. The next `submit` raises it, and so does leaving
    the context.
    """

    def __init__(self, commit: Callable[[OutputFile], object], *, threads: int) -> None:
        """Start the threads.

        Args:
            commit: called in a thread with each file whose last batch was written.
            threads: how many write at once.
        """
        self._commit = commit
        self._spans: queue.SimpleQueue[_Span | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(BATCHES_AHEAD)
        self._error: BaseException | None = None
        self._writing = SharedStopwatch()
        self._threads: list[threading.Thread] = []
        try:
            for number in range(threads):
                thread = threading.Thread(target=self._work, name=f"writer-{number}", daemon=True)
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
        """Seconds in which any thread was digesting or writing, or waiting for the disk."""
        return self._writing.seconds

    def submit(
        self,
        file: OutputFile,
        batch: int,
        tensors: Mapping[str, npt.NDArray[np.uint8]],
        *,
        chunks: Sequence[Chunk] = (),
        done: Callable[[], object],
    ) -> None:
        """Submit a batch. Blocks while `BATCHES_AHEAD` others are not written.

        Args:
            file: the file that the batch belongs to.
            batch: its number in the file.
            tensors: the rows of every batched tensor, as their bytes.
            chunks: the chunks of the batch, in order. Each is waited for before its bytes are read.
                Empty where all bytes are there.
            done: called once when the bytes are no longer needed, also where they were not written
                or this call raises.

        Raises:
            BaseException: the first error of an earlier batch.
        """

        def leave() -> None:
            self._room.release()
            done()

        submission = _Submission(file, batch, tensors, leave, self._commit)
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
            # A second Ctrl-C drops the queued spans, but no write may outlive the file.
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
                    span.submission.work_on(span, self._writing)
                else:
                    span.submission.drop(1)
            except BaseException as error:
                # Where two threads fail at once, either error will do.
                self._error = self._error or error


@dataclass(frozen=True)
class _Span:
    """Bytes of one tensor of a batch, to be written; without `data`, a tensor to be measured.

    `start` counts from the first byte of the batch.
    """

    submission: "_Submission"
    name: str
    start: int
    data: npt.NDArray[np.uint8] | None
    chunks: Sequence[Chunk]


class _Submission:
    """A batch on its way into its file, in spans that different threads write."""

    def __init__(
        self,
        file: OutputFile,
        batch: int,
        tensors: Mapping[str, npt.NDArray[np.uint8]],
        done: Callable[[], object],
        commit: Callable[[OutputFile], object],
    ) -> None:
        self._file = file
        self._batch = batch
        self._tensors = tensors
        self._done = done
        self._commit = commit
        self._lock = threading.Lock()
        self._left = 0
        self._complete = True
        self._digests = {name: RunningDigest() for name in tensors}
        self._moments: dict[str, Moments] = {}

    def split(self, chunks: Sequence[Chunk]) -> list[_Span]:
        """Cut the batch into spans. Each goes to `work_on`, or is counted in `drop`."""
        nbytes = {name: data.nbytes for name, data in self._tensors.items()}
        spans = [
            _Span(self, name, at, self._tensors[name][at : min(at + SPAN_NBYTES, stop)], awaited)
            for name, start, stop, awaited in _ordered(nbytes, chunks)
            for at in range(start, stop, SPAN_NBYTES)
        ]
        spans += [_Span(self, name, 0, None, chunks) for name in self._file.measured]
        self._left = len(spans)
        return spans

    def work_on(self, span: _Span, writing: SharedStopwatch) -> None:
        """Write or measure a span, and count the time without the wait for the data."""
        complete = False
        try:
            for chunk in span.chunks:
                chunk.wait()
            with writing:
                if span.data is None:
                    measured = self._file.measure(span.name, self._tensors[span.name])
                    self._moments[span.name] = measured
                else:
                    data, start = span.data, span.start
                    digest = self._file.write_span(self._batch, span.name, start, data)
                    with self._lock:
                        self._digests[span.name].add(start, digest)
            complete = True
        finally:
            self._leave(1, complete=complete)

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
        is_last = False
        try:
            if self._complete:
                digests = {name: running.whole for name, running in self._digests.items()}
                is_last = self._file.finish_batch(self._batch, digests, self._moments)
        finally:
            self._done()
        if is_last:  # After the buffers are free, so that the next batch need not wait.
            self._commit(self._file)


def _ordered(
    nbytes: Mapping[str, int], chunks: Sequence[Chunk]
) -> Iterator[tuple[str, int, int, Sequence[Chunk]]]:
    """Order the bytes of a batch's tensors, as (name, start, stop, chunks to wait for).

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
