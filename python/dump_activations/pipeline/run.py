"""Runs a plan's boards through its model: as a whole on a GPU, in chunks on the cores of a CPU.

Shape letters: B boards in a batch, S cells (16).
"""

import os
import re
import stat
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dump_activations.dtypes import CELLS
from dump_activations.errors import DeviceError, DumpActivationsError, option
from dump_activations.model.capture import Capture
from dump_activations.pipeline.device import pinned_share
from dump_activations.pipeline.feed import BoardBatch, feed_boards
from dump_activations.pipeline.oom import out_of
from dump_activations.pipeline.plan import Plan
from dump_activations.pipeline.precision import arithmetic, in_precision
from dump_activations.pipeline.summary import Summary
from dump_activations.pipeline.transfer import (
    ActivationBatch,
    Buffers,
    CudaStopwatch,
    CudaTransfer,
    HostTransfer,
    PinnedSlots,
)
from dump_activations.timing import Chunk, Stopwatch

# Boards in a chunk on the CPU: its temporaries stay in a core's cache and in the heap, while those
# of a whole batch are mapped afresh for each operation.
_CHUNK_ROWS = 128

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


class Run:
    """A plan's forward passes and the buffers they fill, as a context manager.

    Entering makes everything ready: it compiles the model, page-locks the host slots, and on CUDA
    runs a full batch of empty boards, so that a missing kernel or too little memory shows before
    any work, and set-up is not timed as work. Leaving ends the reading ahead and waits for the
    device. The plan's device is to be the thread's current one throughout.

    Args:
        plan: the plan to run.
        on_device: yield batches on the device that computes them.

    Attributes:
        commit_seconds: time of the caller's that counts as committing, not as the loop's.

    Raises:
        DeviceError: the device cannot run the model, or torch cannot compile it.
    """

    def __init__(self, plan: Plan, *, on_device: bool = False) -> None:
        self._plan = plan
        self._on_device = on_device
        self.commit_seconds = 0.0
        self._reading, self._waiting = Stopwatch(), Stopwatch()
        self._boards = 0
        self._ended: float | None = None

    def __enter__(self) -> Self:
        plan = self._plan
        rows = min(plan.options.batch_size, len(plan.indices))
        with ExitStack() as exits:
            self._forward = exits.enter_context(_Forward(plan, rows))
            self._transfer = self._make_transfer(rows, exits)
            exits.callback(self._transfer.close)
            self._set_up = (0.0, 0.0)
            if plan.device.type == "cuda" or plan.options.compile:
                self._warm_up(rows)
                self._set_up = (self._forward.seconds, self._transfer.copying.seconds)
            self._exits = exits.pop_all()
        self._started = time.perf_counter()
        return self

    def _make_transfer(self, rows: int, exits: ExitStack) -> HostTransfer | CudaTransfer:
        plan, dtype = self._plan, self._plan.storage_dtype
        shapes = {tensor.name: (rows, *tensor.shape) for tensor in plan.board_tensors}
        if plan.device.type != "cuda":
            return HostTransfer(shapes, dtype)
        slots = None
        if plan.host_slots and shapes:
            share = pinned_share(plan.local_processes)
            slots = PinnedSlots(shapes, dtype, plan.device, count=plan.host_slots, share=share)
            exits.enter_context(slots)
        return CudaTransfer(shapes, dtype, plan.device, host_slots=slots, on_device=self._on_device)

    def _warm_up(self, rows: int) -> None:
        indices = np.zeros(rows, np.int64)
        boards_BS = torch.zeros((rows, CELLS), dtype=torch.uint8, device="cpu")
        try:
            batch = self._transfer.run(BoardBatch(0, indices, boards_BS, {}), self._forward.start)
            for chunk in batch.chunks:
                chunk.wait()
            batch.release()
            self._transfer.close()
        except Exception as error:
            if isinstance(error, DumpActivationsError) or out_of(error):
                raise
            reason = getattr(error, "inner_exception", error)
            line = str(reason).strip().partition("\n")[0]
            if self._plan.options.compile:
                text = f"torch.compile fails here ({type(reason).__name__}: {line}); leave it out"
                raise DeviceError(f"{option('compile')}: {text}") from error
            if isinstance(error, RuntimeError) and re.search("CUDA|CUBLAS|cuDNN|CUDNN", line):
                text = f"cannot run the model ({line}); install a torch that supports this GPU"
                raise DeviceError(f"{self._plan.device} {text}") from error
            raise

    def __exit__(self, *_: object) -> None:
        self._exits.close()
        self._ended = time.perf_counter()

    def batches(
        self,
        ranges: Iterable[range] | None = None,
        *,
        done: Callable[[int], object] = lambda _boards: None,
    ) -> Generator[ActivationBatch, None, None]:
        """Turn each batch of boards into its batch of activations, which the caller releases.

        A batch is yielded once its forward is queued. Closing the generator early drops queued
        work that has not begun.

        Args:
            ranges: rows of the run, each range starting at a multiple of the batch size. The next
                one is pulled when its boards are to be read ahead, at most one beyond the range
                whose batches are yielded. None yields all rows.
            done: called with the number of boards of each batch, about when they are done.
        """
        plan = self._plan
        feed = feed_boards(
            plan.dataset,
            plan.indices,
            plan.labels,
            batch_size=plan.options.batch_size,
            vocabulary=plan.model.config.input_vocab_size,
            ranges=ranges,
            reading=self._reading,
            waiting=self._waiting,
        )
        # Leaving the run ends the reading, also where this generator is left unfinished.
        self._exits.enter_context(closing(feed))
        try:
            for boards in feed:
                batch = self._transfer.run(boards, self._forward.start)
                yield batch
                # As many as keep the workers busy while the next batch is queued.
                self._forward.finish(leave=self._forward.workers)
                self._boards += len(boards.indices)
                done(len(boards.indices))
            self._forward.finish()
        finally:
            self._forward.abandon()

    def summary(self, started: float, *, write_seconds: float = 0.0) -> Summary:
        """Sum up the run of this process, without what only its output tells.

        Args:
            started: reading of the performance counter before the plan was made.
            write_seconds: busy time of the writers.
        """
        ended = self._ended or time.perf_counter()
        forward, copying = self._set_up
        return Summary(
            boards=self._boards,
            seconds=ended - self._started - self.commit_seconds,
            setup_seconds=self._started - started,
            commit_seconds=self.commit_seconds,
            stage_seconds={
                "boards": self._reading.seconds,
                "forward": self._forward.seconds - forward,
                "copy": self._transfer.copying.seconds - copying,
                "write": write_seconds,
            },
            waiting_seconds=self._waiting.seconds,
        )


class _Forward:
    """Forward passes that fill buffers with activations.

    On the CPU each core takes chunks of the batch and runs them by itself: threads that share
    each operation would wait for one another a hundred times per batch, and longest when a core is
    busy with something else. A batch is only queued, so that no core waits for the end of one
    before the chunks of the next.
    """

    def __init__(self, plan: Plan, rows: int) -> None:
        self._precision, self._device = plan.options.precision, plan.device
        on_cuda, compiled = plan.device.type == "cuda", plan.options.compile
        if compiled:
            _use_own_cache()
        self._capture = Capture(
            in_precision(plan.model, self._precision, plan.device),
            plan.board_tensors,
            compiled_rows=rows if compiled else None,
        )
        self._computing: Stopwatch | CudaStopwatch = (
            CudaStopwatch(torch.cuda.current_stream(plan.device)) if on_cuda else Stopwatch()
        )
        self.workers = 1 if on_cuda or compiled else torch.get_num_threads()
        # On a GPU, and compiled, a batch is run as a whole. On the CPU even a single worker runs
        # chunks, which fit its cache, while this thread reads boards and takes shards.
        self._is_chunked = not (on_cuda or compiled)
        self._chunk_rows = min(_CHUNK_ROWS, -(-rows // self.workers))
        self._executor: ThreadPoolExecutor | None = None
        self._futures: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        with ExitStack() as exits:
            exits.enter_context(self._capture)
            if self._is_chunked:
                # A thread takes its number of threads from the process's setting when it begins.
                exits.callback(torch.set_num_threads, self.workers)
                self._executor = ThreadPoolExecutor(
                    self.workers,
                    thread_name_prefix="forward",
                    initializer=torch.set_num_threads,
                    initargs=(1,),
                )
                exits.callback(self._executor.shutdown, wait=True, cancel_futures=True)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    @property
    def seconds(self) -> float:
        """How long the device was busy; with several workers, their mean."""
        return self._computing.seconds / self.workers

    def start(self, tokens_BS: Tensor, buffers: Buffers) -> list[Chunk]:
        """Queue a batch: exponents (B, 16) of any integer dtype, and buffers (B, *shape) to fill.

        Returns:
            The chunks of the batch, in order. On CUDA there is nothing to wait for: the next work
            in the stream finds the buffers full.
        """
        rows = len(tokens_BS)
        if self._executor is None:
            self._run_chunk(tokens_BS, buffers)
            return [Chunk(0, rows)]
        chunks = []
        for start in range(0, rows, self._chunk_rows):
            stop = min(start + self._chunk_rows, rows)
            cut = {key: tensor[start:stop] for key, tensor in buffers.items()}
            future = self._executor.submit(self._run_chunk, tokens_BS[start:stop], cut)
            self._futures.append(future)
            chunks.append(Chunk(start, stop, future.result))
        return chunks

    def finish(self, *, leave: int = 0) -> None:
        """Wait for the oldest chunks until so many are left; raise the error of one that failed."""
        while len(self._futures) > leave:
            self._futures.popleft().result()

    def abandon(self) -> None:
        """Drop chunks that are queued and not begun; waiting for one raises CancelledError."""
        while self._futures:
            self._futures.popleft().cancel()

    def _run_chunk(self, tokens_BS: Tensor, buffers: Buffers) -> None:
        with self._computing, torch.inference_mode(), arithmetic(self._precision, self._device):
            self._capture.run(tokens_BS, buffers)


def _use_own_cache() -> None:
    """Have torch keep compiled code where nobody else can write, unless the user names a directory.

    By default it is in the shared temporary directory under a predictable name: code that another
    user puts there would be run.
    """
    chosen = os.environ.get(_CACHE_VARIABLE)
    # torch sets it as well, to its default.
    if chosen and not chosen.startswith(f"{tempfile.gettempdir()}/torchinductor_"):
        return
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        directory = caches / "dump-activations" / "torch"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except (OSError, RuntimeError) as error:  # The latter where the user has no home.
        raise DeviceError(
            f"{option('compile')}: torch has no directory for compiled code ({error}); "
            f"set {_CACHE_VARIABLE}"
        ) from error
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not is_own or found.st_mode & 0o077:
        raise DeviceError(
            f"{option('compile')}: {directory} must be a directory of this user alone (mode 0700)"
            f"; remove it, or set {_CACHE_VARIABLE}"
        )
    os.environ[_CACHE_VARIABLE] = str(directory)
