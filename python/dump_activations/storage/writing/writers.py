"""Threads that digest batches and write them into output files."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from dump_activations.progress import Chunk, SharedStopwatch
from dump_activations.storage.digests import RunningDigest
from dump_activations.storage.statistics import Moments
from dump_activations.storage.writing.output import OutputFile

# Bytes of a span: few enough for several threads to share a batch.
SPAN_NBYTES = 4 << 20

# A tensor with fewer bytes than this in a chunk is written when the whole batch is there.
MIN_CHUNK_NBYTES = 256 << 10

# Batches that are submitted and not yet written. A caller with fewer buffers waits for these first.
BATCHES_AHEAD = 8


class _Span(NamedTuple):
    """Bytes of one tensor of a batch, `start` to `stop`, and the chunks to wait for."""

    name: str
    start: int
    stop: int
    chunks: Sequence[Chunk]


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
        self._tasks: queue.SimpleQueue[tuple[_Submission, _Span | str] | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(BATCHES_AHEAD)
        self._error: BaseException | None = None
        self.busy = SharedStopwatch()  # while any thread digests, writes or waits for the disk
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
        if kind is None and self._error is not None:
            raise self._error

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

        try:
            self._room.acquire()
            if self._error is not None:
                raise self._error
        except BaseException:
            leave()
            raise
        tasks: list[_Span | str] = [*_spans(tensors, chunks), *file.statistics.names]
        submission = _Submission(file, batch, tensors, chunks, len(tasks), leave, self._commit)
        for task in tasks:
            self._tasks.put((submission, task))

    def _join(self) -> None:
        for _ in self._threads:
            self._tasks.put(None)
        try:
            for thread in self._threads:
                thread.join()
        except BaseException as error:
            # A second Ctrl-C drops the queued spans, but no write may outlive the file.
            self._error = self._error or error
            for thread in self._threads:
                thread.join()
            raise

    def _work(self) -> None:
        while (item := self._tasks.get()) is not None:
            submission, task = item
            try:
                if self._error is None:
                    submission.work_on(task, self.busy)
                else:
                    submission.leave(complete=False)
            except BaseException as error:
                # Where two threads fail at once, either error will do.
                self._error = self._error or error


@dataclass(eq=False)
class _Submission:
    """A batch on its way into its file, in `left` tasks that different threads do."""

    file: OutputFile
    batch: int
    tensors: Mapping[str, npt.NDArray[np.uint8]]
    chunks: Sequence[Chunk]
    left: int
    done: Callable[[], object]
    commit: Callable[[OutputFile], object]

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._complete = True
        self._digests = {name: RunningDigest() for name in self.tensors}
        self._moments: dict[str, Moments] = {}

    def work_on(self, task: _Span | str, writing: SharedStopwatch) -> None:
        """Write a span, or measure the tensor of a name; the wait for the data is not counted."""
        complete = False
        try:
            for chunk in task.chunks if isinstance(task, _Span) else self.chunks:
                chunk.wait()
            with writing:
                if isinstance(task, _Span):
                    data = self.tensors[task.name][task.start : task.stop]
                    digest = self.file.write_span(self.batch, task.name, task.start, data)
                    with self._lock:
                        self._digests[task.name].add(task.start, digest)
                else:
                    self._moments[task] = self.file.statistics.measure(task, self.tensors[task])
            complete = True
        finally:
            self.leave(complete=complete)

    def leave(self, *, complete: bool) -> None:
        """Count one task as done, or given up. The last one finishes the batch."""
        with self._lock:
            self.left -= 1
            self._complete &= complete
            if self.left:
                return
        is_last = False
        try:
            if self._complete:
                digests = {name: running.whole for name, running in self._digests.items()}
                is_last = self.file.finish_batch(self.batch, digests, self._moments)
        finally:
            self.done()
        if is_last:  # After the buffers are free, so that the next batch need not wait.
            self.commit(self.file)


def _spans(
    tensors: Mapping[str, npt.NDArray[np.uint8]], chunks: Sequence[Chunk]
) -> Iterator[_Span]:
    """Cut a batch's tensors into spans, in the order in which they are written.

    A chunk is written as soon as it is there, while the cache of the core that computed it may
    still hold it.
    """
    rows = chunks[-1].stop if chunks else 0
    row_nbytes = {name: data.nbytes // rows for name, data in tensors.items() if rows}
    split = [name for name in row_nbytes if row_nbytes[name] * chunks[0].stop >= MIN_CHUNK_NBYTES]
    ranges = [
        (name, chunk.start * row_nbytes[name], chunk.stop * row_nbytes[name], [chunk])
        for chunk in chunks
        for name in split
    ]
    whole = [(name, 0, data.nbytes, chunks) for name, data in tensors.items() if name not in split]
    for name, start, stop, awaited in [*ranges, *whole]:
        for at in range(start, stop, SPAN_NBYTES):
            yield _Span(name, at, min(at + SPAN_NBYTES, stop), awaited)
