"""Captures batches on a CUDA device and copies them to pinned memory of the host.

All code that calls CUDA itself is here, except the choice and the arithmetic of the device. It is
tested on a simulated device; CUDA graphs have not run on a real one.

Shape letters: B boards in a batch, S cells (16).
"""

import mmap
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn

from dump_activations.dtypes import CELLS
from dump_activations.errors import note, size_text
from dump_activations.pipeline.device import current, first_sentence, pinned_share, run_near
from dump_activations.pipeline.feed import BoardBatch
from dump_activations.pipeline.plan import Plan
from dump_activations.pipeline.transfer import (
    ActivationBatch,
    Buffers,
    Shapes,
    cut,
    mapped,
    ring,
    shapes_of,
    slot_nbytes,
)
from dump_activations.progress import Chunk

_DEVICE_SLOTS = 2
# With fewer the forward would wait for each batch's consumer.
_FEWEST_HOST_SLOTS = 2
_PORTABLE = 1  # cudaHostRegisterPortable
_HOST = torch.device("cpu")

# While a thread records a graph, CUDA lets no thread wait for the whole device: both would fail.
# torch's compiler waits too. So runs are set up and closed one at a time. A thread that sets up a
# run may collect garbage, and so close another run.
set_up_alone = threading.RLock()

Forward = Callable[[Tensor, Buffers], object]
"""Queues a forward pass: boards (B, 16) on the device, buffers to fill."""


class CudaStopwatch:
    """Adds up the seconds a CUDA stream spends on the work queued inside its `with` blocks.

    Nothing blocks: an interval is counted once the device has passed its end.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0

    def __enter__(self) -> None:
        start = torch.cuda.Event(enable_timing=True)
        start.record(self._stream)
        self._pending.append((start, torch.cuda.Event(enable_timing=True)))

    def __exit__(self, *_: object) -> None:
        self._pending[-1][1].record(self._stream)
        self._count_finished()

    @property
    def seconds(self) -> float:
        """Seconds of the intervals that have ended on the device."""
        self._count_finished()
        return self._seconds

    def _count_finished(self) -> None:
        while self._pending and self._pending[0][1].query():
            start, stop = self._pending.popleft()
            self._seconds += start.elapsed_time(stop) / 1000


class CudaTransfer:
    """Captures batches on the device and copies them to pinned host slots on a side stream.

    The forward of one batch runs while the batch before it is copied. A device slot is used again
    once its copy is done (the device waits), a host slot once its consumer released it (the
    calling thread waits). The forward passes run in the stream that is current when this is made.

    Without host slots the consumer has each batch on the device for one more batch. The batch after
    that is captured in the same slot, and before it the forward's stream has to wait for the
    consumer's work.

    It page-locks `host_slots` slots, or fewer where the host has no room for them.

    Raises:
        MemoryError: the host has no room for two of the slots.
    """

    def __init__(self, plan: Plan, rows: int, *, host_slots: int, local_processes: int) -> None:
        self._device = device = plan.device
        self._compute = torch.cuda.current_stream(device)
        self._side = torch.cuda.Stream(device)
        self.computing, self.copying = CudaStopwatch(self._compute), CudaStopwatch(self._side)
        shapes, dtype = shapes_of(plan, rows), plan.storage_dtype
        # Used in turn: the slot that is being copied is the last used.
        self._slots = [_DeviceSlot(shapes, dtype, device, rows) for _ in range(_DEVICE_SLOTS)]
        self._next = cycle(self._slots)
        self._host: _HostMemory | None = None
        if not (host_slots and shapes):
            return
        nbytes, share = slot_nbytes(shapes, dtype), pinned_share(local_processes)
        host_slots = min(host_slots, share // nbytes)
        if host_slots < _FEWEST_HOST_SLOTS:
            raise MemoryError(
                f"{_FEWEST_HOST_SLOTS} x {size_text(nbytes)} must be page-locked, this process may "
                f"page-lock {size_text(share)}"
            )
        # CUDA keeps an error for the thread that met it, and would raise it at the caller's next
        # kernel.
        with ThreadPoolExecutor(1, thread_name_prefix="pinning") as pinning:
            self._host = pinning.submit(_lock, host_slots * nbytes, device).result()
        if not self._host.is_pinned:
            note(f"{device} cannot page-lock host memory here; copies to the host are slower")
        self._free = ring(self._host.memory, shapes, dtype, host_slots)

    def run(self, boards: BoardBatch, forward: Forward) -> ActivationBatch:
        """Queue a batch and its copy. Blocks while every host slot is taken."""
        slot, rows = next(self._next), len(boards.indices)
        self._compute.wait_event(slot.copied)
        tokens_BS = slot.bring(boards.boards_BS)
        with self.computing:
            # A short batch runs eagerly, so that its values have the bits of a run without graphs.
            if slot.graph is not None and rows == len(slot.boards_BS):
                slot.graph.replay()
            else:
                forward(tokens_BS, cut(slot.buffers, rows))
        if self._host is not None:
            return self._copy(slot, boards, is_queued=self._host.is_pinned)
        slot.filled.record(self._compute)
        whole = Chunk(0, rows, partial(self._wait_on_device, slot.filled))
        return ActivationBatch(boards, cut(slot.buffers, rows), [whole])

    def record(self, forward: Forward) -> None:
        """Record the forward pass of each slot as a CUDA graph, or note why that cannot be done.

        To be called after a first batch, in which torch and the libraries of CUDA set up all that
        they need. Replaying takes the host 0.1 ms, launching some 200 kernels 2 to 3 ms.
        """
        graphs: list[torch.cuda.CUDAGraph] = []
        # torch keeps a workspace of 32 MB for each stream of a thread. One that was made in a
        # recording would keep the graph's memory for ever, and serve others while the graph runs.
        drop_workspaces = torch._C._cuda_clearCublasWorkspaces
        drop_workspaces()
        try:
            for slot in self._slots:
                graph = torch.cuda.CUDAGraph()
                # Graphs that never run at once share their temporaries. Other threads may go on.
                pool = graphs[0].pool() if graphs else None
                with torch.cuda.graph(graph, pool, self._side, capture_error_mode="thread_local"):
                    forward(slot.boards_BS, slot.buffers)
                graphs.append(graph)
            drop_workspaces()
            # A short batch, often the last of a long run, must find memory next to the graphs.
            rows = max(len(self._slots[0].boards_BS) - 1, 1)
            forward(self._slots[0].boards_BS[:rows], cut(self._slots[0].buffers, rows))
        except RuntimeError as error:
            note(f"forward passes run without CUDA graphs: {first_sentence(error)}")
            return
        for slot, graph in zip(self._slots, graphs, strict=True):
            slot.graph = graph

    def _copy(
        self, source: "_DeviceSlot", boards: BoardBatch, *, is_queued: bool
    ) -> ActivationBatch:
        target, rows = self._free.get(), len(boards.indices)
        host = cut(target, rows)
        # Writers sleep on this event instead of spinning on a core that others need.
        arrived = torch.cuda.Event(blocking=True)
        self._side.wait_stream(self._compute)
        with torch.cuda.stream(self._side), self.copying:
            for key, tensor in cut(source.buffers, rows).items():
                host[key].copy_(tensor, non_blocking=is_queued)
            source.copied.record(self._side)
            arrived.record(self._side)
        whole = Chunk(0, rows, partial(self._wait, arrived))
        return ActivationBatch(boards, host, [whole], partial(self._free.put, target))

    def _wait(self, event: torch.cuda.Event) -> None:
        with current(self._device):
            event.synchronize()

    def _wait_on_device(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def close(self) -> None:
        """Wait for all that is queued and give the pinned memory back. Tensors stay readable."""
        self._compute.synchronize()
        self._side.synchronize()
        if self._host is not None and self._host.is_registered:
            with set_up_alone:
                # The consumer may copy from it in streams that the run has not heard of.
                torch.cuda.synchronize(self._device)
                torch.cuda.cudart().cudaHostUnregister(self._host.memory.data_ptr())


class _DeviceSlot:
    """One batch's memory on the device, with the events of its last forward pass and last copy.

    Attributes:
        graph: the forward pass from `boards_BS` to `buffers`, if it could be recorded.
    """

    def __init__(self, shapes: Shapes, dtype: torch.dtype, device: torch.device, rows: int) -> None:
        self.buffers = {
            key: torch.empty(shape, dtype=dtype, device=device) for key, shape in shapes.items()
        }
        self.graph: torch.cuda.CUDAGraph | None = None
        self.copied, self.filled = torch.cuda.Event(), torch.cuda.Event()
        self.boards_BS = torch.empty((rows, CELLS), dtype=torch.uint8, device=device)
        self._host = _locked_by_torch(rows * CELLS)
        # A host thread that waits sleeps, instead of spinning on a core that others need.
        self._boards_copied = torch.cuda.Event(blocking=True)

    def bring(self, boards_BS: Tensor) -> Tensor:
        """Queue the copy of boards, uint8 (B, 16), by way of page-locked memory."""
        self._boards_copied.synchronize()
        host_BS = self._host.memory.view(-1, CELLS)[: len(boards_BS)]
        host_BS.copy_(boards_BS)
        tokens_BS = self.boards_BS[: len(boards_BS)]
        tokens_BS.copy_(host_BS, non_blocking=self._host.is_pinned)
        self._boards_copied.record()
        return tokens_BS


@dataclass(frozen=True)
class _HostMemory:
    """Host memory, uint8 (nbytes,), and how CUDA sees it."""

    memory: Tensor
    is_pinned: bool
    is_registered: bool = False


def _lock(nbytes: int, device: torch.device) -> _HostMemory:
    """Page-lock memory.

    torch's own pinned memory comes in powers of two and stays with the process. CUDA page-locks
    memory of the exact size, which takes a second for some GB. Where that is forbidden
    (confidential VMs) or scarce (WSL2), torch's pinned memory is taken, and else ordinary memory.
    """
    run_near(device)
    # After a fork, copy-on-write could give this process a page that the GPU has not mapped.
    memory = mapped(nbytes, mmap.MADV_DONTFORK)
    with current(device):
        code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, _PORTABLE)
        if int(code) == 0:
            return _HostMemory(memory, is_pinned=True, is_registered=True)
        return _locked_by_torch(nbytes)


def _locked_by_torch(nbytes: int) -> _HostMemory:
    try:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=_HOST, pin_memory=True)
    except RuntimeError:
        return _HostMemory(torch.empty(nbytes, dtype=torch.uint8, device=_HOST), is_pinned=False)
    return _HostMemory(memory, is_pinned=True)


def has_callers_code(model: nn.Module) -> bool:
    """Return True where the forward pass runs code of the caller's, which no CUDA graph repeats."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or not type(module).__module__.startswith(("torch.nn.", "dump_activations."))
        for module in model.modules()
    )
