"""Moves boards to the device that the model runs on, and activations from it to the consumer.

A batch is captured in a slot's buffers, one contiguous tensor per key, and yielded as an
`ActivationBatch`. The ring of slots is bounded: it slows the forward down when the consumer is
slower, and it bounds memory.

Shape letters: B boards in a batch, S cells (16).
"""

import math
import mmap
import queue
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from dump_activations.dtypes import CELLS
from dump_activations.errors import note
from dump_activations.pipeline.device import current, pinned_share
from dump_activations.pipeline.feed import BoardBatch
from dump_activations.pipeline.plan import Plan
from dump_activations.text import size_text
from dump_activations.timing import Chunk, Stopwatch

HOST_SLOTS = 3
"""Slots of a run whose batches are written: one is copied to while others are written."""

_DEVICE_SLOTS = 2
# With fewer the forward would wait for each batch's consumer.
_FEWEST_HOST_SLOTS = 2
_PORTABLE = 1  # cudaHostRegisterPortable
_HOST = torch.device("cpu")

Shapes = Mapping[str, tuple[int, ...]]
"""Key -> shape of a full batch's tensor, (B, *shape)."""

Buffers = dict[str, Tensor]
"""Key -> tensor (B, *shape)."""

# The slot that was released last comes first: its memory is in the cache, and a consumer that keeps
# up never touches the others.
_Ring = queue.LifoQueue[Buffers]

Forward = Callable[[Tensor, Buffers], Sequence[Chunk]]
"""Queues a batch: tokens (B, 16) on the device, buffers to fill -> the chunks of the batch."""


@dataclass(frozen=True)
class ActivationBatch:
    """A batch of boards and its activations.

    Attributes:
        boards: the batch of boards.
        tensors: key -> tensor (B, *shape) in the memory that the consumer asked for.
        chunks: the batch's rows. The rows of a chunk are there once it has been waited for: on the
            host, or on a device for work that is queued afterwards in the thread's current stream.
        release: gives the memory back to the ring. `tensors` must not be used after it.
    """

    boards: BoardBatch
    tensors: Buffers
    chunks: Sequence[Chunk]
    release: Callable[[], object] = lambda: None


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


class HostTransfer:
    """Captures batches in host memory, where the model runs and the consumer reads them."""

    def __init__(self, plan: Plan, rows: int) -> None:
        self.copying: Stopwatch | CudaStopwatch = Stopwatch()
        shapes, dtype = _shapes(plan, rows), plan.storage_dtype
        count = min(HOST_SLOTS, -(-len(plan.indices) // rows))
        memory = _mapped(count * _slot_nbytes(shapes, dtype))
        self._free = _ring(memory, shapes, dtype, count)

    def run(self, boards: BoardBatch, forward: Forward) -> ActivationBatch:
        """Queue a batch. Blocks while every slot is taken."""
        slot = self._free.get()
        buffers = _cut(slot, len(boards.indices))
        chunks = forward(boards.boards_BS, buffers)
        return ActivationBatch(boards, buffers, chunks, partial(self._free.put, slot))


class CudaTransfer:
    """Captures batches on the device and copies them to pinned host slots on a side stream.

    The forward of one batch runs while the batch before it is copied. A device slot is used again
    once its copy is done (the device waits), a host slot once its consumer released it (the
    calling thread waits). The forward passes run in the stream that is current when this is made.

    Without host slots the consumer has each batch on the device until the one after the next is
    captured, in the same slot. Before that, the forward's stream has to wait for the consumer's
    work.

    Args:
        plan: a plan for a CUDA device.
        rows: boards in a full batch.
        host_slots: slots to page-lock for the copies, fewer where the host has no room for them.
        local_processes: processes that share this machine's memory.

    Raises:
        MemoryError: the host has no room for two of the slots.
    """

    def __init__(self, plan: Plan, rows: int, *, host_slots: int, local_processes: int) -> None:
        self._device = device = plan.device
        self._compute = torch.cuda.current_stream(device)
        self._side = torch.cuda.Stream(device)
        self.copying: Stopwatch | CudaStopwatch = CudaStopwatch(self._side)
        shapes, dtype = _shapes(plan, rows), plan.storage_dtype
        # Used in turn: the one being copied is the last used.
        self._slots = cycle(
            [_DeviceSlot(shapes, dtype, device, rows) for _ in range(_DEVICE_SLOTS)]
        )
        self._host: _HostMemory | None = None
        if not (host_slots and shapes):
            return
        nbytes, share = _slot_nbytes(shapes, dtype), pinned_share(local_processes)
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
        self._free = _ring(self._host.memory, shapes, dtype, host_slots)

    def run(self, boards: BoardBatch, forward: Forward) -> ActivationBatch:
        """Queue a batch and its copy. Blocks while every host slot is taken."""
        slot, rows = next(self._slots), len(boards.indices)
        self._compute.wait_event(slot.copied)
        forward(slot.bring(boards.boards_BS), _cut(slot.buffers, rows))
        if self._host is not None:
            return self._copy(slot, boards, is_queued=self._host.is_pinned)
        slot.filled.record(self._compute)
        whole = Chunk(0, rows, partial(self._wait_on_device, slot.filled))
        return ActivationBatch(boards, _cut(slot.buffers, rows), [whole])

    def _copy(
        self, source: "_DeviceSlot", boards: BoardBatch, *, is_queued: bool
    ) -> ActivationBatch:
        target, rows = self._free.get(), len(boards.indices)
        host = _cut(target, rows)
        # Writers sleep on this event instead of spinning on a core that others need.
        arrived = torch.cuda.Event(blocking=True)
        self._side.wait_stream(self._compute)
        with torch.cuda.stream(self._side), self.copying:
            for key, tensor in _cut(source.buffers, rows).items():
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
            # The consumer may copy from it in streams that the run has not heard of.
            torch.cuda.synchronize(self._device)
            torch.cuda.cudart().cudaHostUnregister(self._host.memory.data_ptr())


class _DeviceSlot:
    """One batch's memory on the device, with the events of its last forward pass and last copy."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, device: torch.device, rows: int) -> None:
        self.buffers = {
            key: torch.empty(shape, dtype=dtype, device=device) for key, shape in shapes.items()
        }
        self.copied, self.filled = torch.cuda.Event(), torch.cuda.Event()
        self._boards_BS = torch.empty((rows, CELLS), dtype=torch.uint8, device=device)
        self._host = _locked_by_torch(rows * CELLS)
        # A host thread that waits sleeps, instead of spinning on a core that others need.
        self._boards_copied = torch.cuda.Event(blocking=True)

    def bring(self, boards_BS: Tensor) -> Tensor:
        """Queue the copy of boards, uint8 (B, 16), by way of page-locked memory."""
        self._boards_copied.synchronize()
        host_BS = self._host.memory.view(-1, CELLS)[: len(boards_BS)]
        host_BS.copy_(boards_BS)
        tokens_BS = self._boards_BS[: len(boards_BS)]
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
    # After a fork, copy-on-write could give this process a page that the GPU has not mapped.
    memory = _mapped(nbytes, mmap.MADV_DONTFORK)
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


def _mapped(nbytes: int, advice: int = mmap.MADV_NORMAL) -> Tensor:
    """Map memory, uint8 (nbytes,), that starts on a page and takes none until it is written to."""
    try:
        pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size_text(nbytes)}: {error.strerror}") from None
    pages.madvise(advice)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _ring(memory: Tensor, shapes: Shapes, dtype: torch.dtype, count: int) -> _Ring:
    """Cut memory into slots whose tensors start on a page, as direct writes need."""
    free, start = _Ring(), 0
    for _ in range(count):
        slot = {}
        for key, shape in shapes.items():
            nbytes = math.prod(shape) * dtype.itemsize
            slot[key] = memory[start : start + nbytes].view(dtype).view(shape)
            start += -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        free.put(slot)
    return free


def _shapes(plan: Plan, rows: int) -> Shapes:
    return {tensor.name: (rows, *tensor.shape) for tensor in plan.board_tensors}


def _slot_nbytes(shapes: Shapes, dtype: torch.dtype) -> int:
    sizes = (math.prod(shape) * dtype.itemsize for shape in shapes.values())
    return sum(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE for nbytes in sizes)


def _cut(buffers: Buffers, rows: int) -> Buffers:
    return {key: tensor[:rows] for key, tensor in buffers.items()}
