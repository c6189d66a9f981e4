"""Runs a plan's boards through its model: as a whole on a GPU, in chunks on the cores of a CPU.

Shape letters: B boards in a batch, S cells (16).
"""

import os
import stat
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from dump_activations.dtypes import CELLS
from dump_activations.errors import DeviceError, DumpActivationsError, note, option, size_text
from dump_activations.model.capture import Capture
from dump_activations.model.encoder import with_joined_products
from dump_activations.pipeline.cuda import (
    CudaStopwatch,
    CudaTransfer,
    has_callers_code,
    set_up_alone,
)
from dump_activations.pipeline.device import (
    arithmetic,
    first_sentence,
    in_precision,
    is_of_cuda,
    out_of,
)
from dump_activations.pipeline.feed import BoardBatch, feed_boards
from dump_activations.pipeline.plan import Plan
from dump_activations.pipeline.transfer import ActivationBatch, Buffers, cut, host_ring
from dump_activations.progress import Chunk, Stopwatch

# Boards in a chunk on the CPU: its temporaries stay in a core's cache and in the heap, while those
# of a whole batch are mapped afresh for each operation.
_CHUNK_ROWS = 128

STAGES = ("boards", "forward", "copy", "write")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The work that this process did in a run. Times are in seconds.

    Attributes:
        output: the file, or the name or URL of its shards; None if nothing was written.
        keys: activation keys that were captured.
        boards: boards that went through the model.
        resumed_boards: the other boards of the output, which earlier runs or other processes wrote.
        bytes_written: size of the finished files of the output.
        shards_written: shards that this process wrote; 0 for one file.
        shards_found: shards that were complete or that others wrote meanwhile; 0 for one file.
        seconds: wall time of the loop: reading, forward, copying and writing together.
        setup_seconds: wall time before the loop: loading, sampling, compiling, the first batch.
        commit_seconds: wall time until finished files were durable under their names.
        stage_seconds: busy time of each stage. Stages overlap, so they may add up to more.
        waiting_seconds: how long the loop waited for boards.
        nonfinite: tensor name -> number of its values stored as `nan` and as `inf`; only tensors
            with any.
    """

    output: Path | str | None = None
    keys: tuple[str, ...] = ()
    boards: int = 0
    resumed_boards: int = 0
    bytes_written: int = 0
    shards_written: int = 0
    shards_found: int = 0
    seconds: float = 0.0
    setup_seconds: float = 0.0
    commit_seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    waiting_seconds: float = 0.0
    nonfinite: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def boards_per_second(self) -> float:
        """Boards per second of the loop."""
        return self.boards / self.seconds if self.seconds else 0.0

    @property
    def slowest_stage(self) -> str:
        """The stage that was busy longest, which bounds the run's speed."""
        return max(self.stage_seconds, key=self.stage_seconds.__getitem__)

    @property
    def total_seconds(self) -> float:
        """Wall time of the whole call."""
        return self.setup_seconds + self.seconds + self.commit_seconds

    def __str__(self) -> str:
        """Return work, place, size and speed in one line, as the command shows them."""
        resumed = shards = ""
        if self.resumed_boards:
            by = "resumed, or written by other processes" if self.shards_found else "resumed"
            resumed = f" (and {self.resumed_boards:,} {by})"
        if count := self.shards_written + self.shards_found:
            shards = f", {self.shards_written:,} of {count:,} shards by this process"
        where = f"{size_text(self.bytes_written)} in {self.output}{shards}"
        speed = f", {self.boards_per_second:,.0f} boards/s in the loop" if self.boards else ""
        of = f" of {', '.join(self.keys)}" if self.keys else ""
        return (
            f"{self.boards:,} boards{of}{resumed}: {where if self.output else 'nothing written'}; "
            f"{self.total_seconds:.1f} s{speed}"
        )

    def _repr_html_(self) -> str:
        """Return the same line and a table of the stages, as a notebook shows them."""
        headings, rows = self.stage_table()
        cells = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
        return (
            f"<p>{escape(str(self))}</p><table><thead><tr><th>{'</th><th>'.join(headings)}</th>"
            f"</tr></thead><tbody>{cells}</tbody></table>"
        )

    def stage_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return the headings and the rows of a table of the stages."""
        stages = {"setup": self.setup_seconds, **self.stage_seconds}
        stages |= {"waiting for boards": self.waiting_seconds, "whole loop": self.seconds}
        rows: list[tuple[str, ...]] = []
        for stage, seconds in {**stages, "commit": self.commit_seconds}.items():
            slowest = " (slowest)" if self.boards and stage == self.slowest_stage else ""
            share = f"{seconds / self.total_seconds:.0%}" if self.total_seconds else "-"
            # A time that rounds to zero gives no rate.
            rate = f"{self.boards / seconds:,.0f}" if seconds >= 0.0005 else "-"
            rows.append((f"{stage}{slowest}", f"{seconds:.3f}", share, rate))
        return ("stage", "seconds", "share", "boards/s"), rows

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the figures derived from them, ready for JSON."""
        return {
            **asdict(self),
            "output": None if self.output is None else str(self.output),
            "boards_per_second": self.boards_per_second,
            "total_seconds": self.total_seconds,
            "slowest_stage": self.slowest_stage,
        }


class Run:
    """A plan's forward passes and the buffers they fill, as a context manager.

    Entering makes everything ready: it compiles the model, page-locks the host slots, and on CUDA
    runs a full batch of empty boards, so that a missing kernel or too little memory shows before
    any work, and set-up is not timed as work. Leaving ends the reading ahead and waits for the
    device. The plan's device is to be the thread's current one throughout.

    On the CPU each core takes chunks of the batch and runs them by itself: threads that share
    each operation would wait for one another a hundred times per batch, and longest when a core is
    busy with something else. A batch is only queued, so that no core waits for the end of one
    before the chunks of the next. On a GPU, and compiled, a batch is run as a whole.

    Args:
        plan: the plan to run.
        host_slots: batches to page-lock memory for, where a CUDA device copies them to the host.
            Without them a CUDA device keeps its batches.
        local_processes: processes that share this machine's memory.

    Raises:
        DeviceError: the device cannot run the model, or torch cannot compile it.
    """

    def __init__(self, plan: Plan, *, host_slots: int = 0, local_processes: int = 1) -> None:
        self._plan = plan
        self._host_slots, self._local_processes = host_slots, local_processes
        self.commit_seconds = 0.0  # Of the caller's time, which is not the loop's.
        self._reading, self._waiting = Stopwatch(), Stopwatch()
        self._cuda: CudaTransfer | None = None
        self._computing: Stopwatch | CudaStopwatch = Stopwatch()
        self._copying: Stopwatch | CudaStopwatch = Stopwatch()
        self._boards = 0
        self._ended: float | None = None
        self._is_chunked = not (plan.device.type == "cuda" or plan.options.compile)
        # On the CPU even a single worker runs chunks, which fit its cache, while this thread reads
        # boards and takes shards.
        self._workers = torch.get_num_threads() if self._is_chunked else 1
        self._futures: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        plan, compiled = self._plan, self._plan.options.compile
        rows = min(plan.options.batch_size, len(plan.indices))
        with ExitStack() as exits:
            if compiled:
                _use_own_cache()
            is_graphed = plan.device.type == "cuda" and plan.options.cuda_graph
            if is_graphed and has_callers_code(plan.model):
                is_graphed = False
                note("forward passes run without CUDA graphs: the model has code of the caller's")
            model = in_precision(plan.model, plan.options.precision, plan.device)
            if compiled or plan.options.precision != "fp32":
                hooked = [name for tensor in plan.board_tensors for name in tensor.modules]
                model = with_joined_products(model, hooked)
            if is_graphed:  # Graphs read weights by address: keep them if the caller sets others.
                self._weights = [each.detach() for each in (*model.parameters(), *model.buffers())]
            self._capture = exits.enter_context(
                Capture(model, plan.board_tensors, compiled_rows=rows if compiled else None)
            )
            if self._is_chunked:
                _keep_heap()
                self._chunk_rows = min(_CHUNK_ROWS, -(-rows // self._workers))
                # A thread takes its number of threads from the process's setting when it begins.
                exits.callback(torch.set_num_threads, self._workers)
                self._executor = ThreadPoolExecutor(
                    self._workers,
                    thread_name_prefix="forward",
                    initializer=torch.set_num_threads,
                    initargs=(1,),
                )
                exits.callback(self._executor.shutdown, wait=True, cancel_futures=True)
            if plan.device.type == "cuda":
                slots, processes = self._host_slots, self._local_processes
                self._cuda = CudaTransfer(plan, rows, host_slots=slots, local_processes=processes)
                exits.callback(self._cuda.close)
                self._computing, self._copying = self._cuda.computing, self._cuda.copying
            else:
                self._free = host_ring(plan, rows)
            self._set_up = (0.0, 0.0)
            if not self._is_chunked:
                with set_up_alone if plan.device.type == "cuda" else nullcontext():
                    self._warm_up(rows, is_graphed=is_graphed)
                self._set_up = (self._computing.seconds, self._copying.seconds)
            self._exits = exits.pop_all()
        self._started = time.perf_counter()
        return self

    def _warm_up(self, rows: int, *, is_graphed: bool) -> None:
        indices = np.zeros(rows, np.int64)
        boards_BS = torch.zeros((rows, CELLS), dtype=torch.uint8, device="cpu")
        try:
            batch = self._capture_batch(BoardBatch(0, indices, boards_BS, {}))
            for chunk in batch.chunks:
                chunk.wait()
            batch.release()
            if self._cuda is not None:
                if is_graphed:
                    self._cuda.record(self._forward)
                torch.cuda.synchronize(self._plan.device)  # The times are complete after it.
        except Exception as error:
            if isinstance(error, DumpActivationsError) or out_of(error):
                raise
            reason = getattr(error, "inner_exception", error)
            line = first_sentence(reason)
            if self._plan.options.compile:
                text = f"torch.compile fails here ({type(reason).__name__}: {line}); leave it out"
                raise DeviceError(f"{option('compile')}: {text}") from error
            if is_of_cuda(error):
                text = f"cannot run the model ({line}); install a torch that supports this GPU"
                raise DeviceError(f"{self._plan.device} {text}") from error
            raise

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # A device that has failed fails again here. The first error has notes, of what is kept.
        with suppress(RuntimeError) if isinstance(error, Exception) else nullcontext():
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
        feed = feed_boards(self._plan, ranges, reading=self._reading, waiting=self._waiting)
        # Leaving the run ends the reading, also where this generator is left unfinished.
        self._exits.enter_context(closing(feed))
        try:
            for boards in feed:
                yield self._capture_batch(boards)
                # As many as keep the workers busy while the next batch is queued.
                self._finish(leave=self._workers)
                self._boards += len(boards.indices)
                done(len(boards.indices))
            self._finish()
        finally:
            while self._futures:  # Waiting for one that has not begun raises CancelledError.
                self._futures.popleft().cancel()

    def _capture_batch(self, boards: BoardBatch) -> ActivationBatch:
        """Queue a batch. Blocks while every slot is taken."""
        if self._cuda is not None:
            return self._cuda.run(boards, self._forward)
        slot = self._free.get()
        buffers = cut(slot, len(boards.indices))
        chunks = self._start(boards.boards_BS, buffers)
        return ActivationBatch(boards, buffers, chunks, partial(self._free.put, slot))

    def _start(self, tokens_BS: Tensor, buffers: Buffers) -> list[Chunk]:
        """Queue a batch on the CPU, and return its chunks in order."""
        rows = len(tokens_BS)
        if not self._is_chunked:
            self._run_chunk(tokens_BS, buffers)
            return [Chunk(0, rows)]
        chunks = []
        for start in range(0, rows, self._chunk_rows):
            stop = min(start + self._chunk_rows, rows)
            chunk = {key: tensor[start:stop] for key, tensor in buffers.items()}
            future = self._executor.submit(self._run_chunk, tokens_BS[start:stop], chunk)
            self._futures.append(future)
            chunks.append(Chunk(start, stop, future.result))
        return chunks

    def _run_chunk(self, tokens_BS: Tensor, buffers: Buffers) -> None:
        with self._computing:
            self._forward(tokens_BS, buffers)

    def _forward(self, tokens_BS: Tensor, buffers: Buffers) -> None:
        own = arithmetic(self._plan.options.precision, self._plan.device)
        with torch.inference_mode(), own:
            self._capture.run(tokens_BS, buffers)

    def _finish(self, *, leave: int = 0) -> None:
        """Wait for the oldest chunks until so many are left; raise the error of one that failed."""
        while len(self._futures) > leave:
            self._futures.popleft().result()

    def summary(self, started: float, *, write_seconds: float = 0.0) -> Summary:
        """Sum up the run, which `started` before its plan was made, without its output."""
        ended = self._ended or time.perf_counter()
        forward, copying = self._set_up
        return Summary(
            keys=tuple(each.key for each in self._plan.activations),
            boards=self._boards,
            seconds=ended - self._started - self.commit_seconds,
            setup_seconds=self._started - started,
            commit_seconds=self.commit_seconds,
            stage_seconds={
                "boards": self._reading.seconds,
                "forward": (self._computing.seconds - forward) / self._workers,
                "copy": self._copying.seconds - copying,
                "write": write_seconds,
            },
            waiting_seconds=self._waiting.seconds,
        )


def _keep_heap() -> None:
    """Have glibc keep the memory of a chunk's temporaries for the next chunk.

    glibc keeps as much as twice the largest block that was mapped and freed, of up to 32 MiB. By
    default it gives the memory back after each chunk, and page faults take a quarter of the time of
    a small model.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def _use_own_cache() -> None:
    """Have torch keep compiled code where nobody else can write, unless the user names a directory.

    By default it is in the shared temporary directory under a predictable name: code that another
    user puts there would be run.
    """
    variable = "TORCHINDUCTOR_CACHE_DIR"
    chosen = os.environ.get(variable)
    # torch sets it as well, to its default.
    if chosen and not chosen.startswith(f"{tempfile.gettempdir()}/torchinductor_"):
        return
    directory = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "dump-activations", "torch")
    try:
        directory = directory.expanduser()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
        is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        if not is_own or found.st_mode & 0o077:
            raise PermissionError("must be a directory of this user alone, with mode 0700")
    except (OSError, RuntimeError) as error:  # The latter where the user has no home.
        raise DeviceError(
            f"{option('compile')}: torch cannot keep compiled code in {directory} ({error}); "
            f"set {variable}"
        ) from error
    os.environ[variable] = str(directory)
