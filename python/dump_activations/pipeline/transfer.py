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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Generic, TypeVar

import torch
from torch import Tensor

from dump_activations.dtypes import CELLS
from dump_activations.errors import note
from dump_activations.pipeline.device import current
from dump_activations.pipeline.feed import BoardBatch
from dump_activations.pipeline.oom import PinnedMemoryError
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

Forward = Callable[[Tensor, Buffers], Sequence[Chunk]]
"""Queues a batch: tokens (B, 16) on the device, buffers to fill -> the chunks of the batch."""

_SlotT = TypeVar("_SlotT")


@dataclass(frozen=True)
class ActivationBatch:
    """A batch of boards and its activations.

    Attributes:
        boards: the batch of boards.
        tensors: key -> tensor (B, *shape) in the memory that the consumer asked for; empty if it
            asked for none.
        chunks: the batch's rows. The rows of a chunk are there once it has been waited for: on the
            host, or on a device for work that is queued afterwards in the thread's current stream.
        release: gives the memory back to the ring. `tensors` must not be used after it.
    """

    boards: BoardBatch
    tensors: Buffers
    chunks: Sequence[Chunk]
    release: Callable[[], object]


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


class _Ring(Generic[_SlotT]):
    """A bounded ring of slots, each made when it is first needed."""

    def __init__(self, make: Callable[[], _SlotT], count: int) -> None:
        self._make, self._unmade = make, count
        self._free: queue.SimpleQueue[_SlotT] = queue.SimpleQueue()

    def take(self) -> _SlotT:
        """Take the slot that has been free longest. Blocks while none is free."""
        if self._free.empty() and self._unmade:
            self._unmade -= 1
            return self._make()
        return self._free.get()

    def give_back(self, slot: _SlotT) -> None:
        """Let the slot be taken again."""
        self._free.put(slot)


class HostTransfer:
    """Captures batches in host memory, where the model runs and the consumer reads them."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype) -> None:
        self.copying: Stopwatch | CudaStopwatch = Stopwatch()
        self._ring = _Ring(partial(_empty_on_pages, shapes, dtype), HOST_SLOTS)

    def run(self, boards: BoardBatch, forward: Forward) -> ActivationBatch:
        """Queue a batch. Blocks while every slot is taken."""
        slot = self._ring.take()
        buffers = _cut(slot, len(boards.indices))
        chunks = forward(boards.boards_BS, buffers)
        return ActivationBatch(boards, buffers, chunks, partial(self._ring.give_back, slot))

    def close(self) -> None:
        """Do nothing: all work is done once its chunks were waited for."""


class PinnedSlots:
    """The host slots of a GPU's run, page-locked, as a context manager that gives them back.

    torch's own pinned memory comes in powers of two and stays with the process. CUDA page-locks
    memory of the exact size, which takes a second for some GB and happens on a thread of its own:
    CUDA keeps an error for the thread that met it, and would raise it at the caller's next kernel.
    Where that is forbidden (confidential VMs) or scarce (WSL2), torch's pinned memory is taken, and
    else ordinary memory, with a note.

    Args:
        shapes: shapes of a full batch's tensors, all in the storage dtype `dtype`.
        dtype: storage dtype.
        device: copies to them.
        count: slots to make; fewer where `share` has no room for them.
        share: bytes that this process may page-lock.

    Raises:
        PinnedMemoryError: `share` has no room for two. Iterating raises it too: no memory is left.
    """

    def __init__(
        self, shapes: Shapes, dtype: torch.dtype, device: torch.device, *, count: int, share: int
    ) -> None:
        self._shapes, self._dtype, self._device = shapes, dtype, device
        nbytes = sum(_whole_pages(shape, dtype) for shape in shapes.values())
        self.count = min(count, share // nbytes)
        if self.count < _FEWEST_HOST_SLOTS:
            raise PinnedMemoryError(
                f"{_FEWEST_HOST_SLOTS} x {size_text(nbytes)} needed, this process may take "
                f"{size_text(share)}"
            )
        self._locker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pinning")
        self._locked = self._locker.submit(_lock, self.count * nbytes, device)

    def __iter__(self) -> Iterator[Buffers]:
        """Wait for the memory and yield each slot, whose tensors start on a page."""
        memory, start = self._locked.result().memory, 0
        for _ in range(self.count):
            slot = {}
            for key, shape in self._shapes.items():
                nbytes = math.prod(shape) * self._dtype.itemsize
                slot[key] = memory[start : start + nbytes].view(self._dtype).view(shape)
                start += _whole_pages(shape, self._dtype)
            yield slot

    @property
    def are_pinned(self) -> bool:
        """True where copies to them are queued, and the program continues meanwhile."""
        return self._locked.result().is_pinned

    def __enter__(self) -> "PinnedSlots":
        return self

    def __exit__(self, *_: object) -> None:
        """Give the memory back. Tensors in it stay readable."""
        self._locker.shutdown(wait=True)
        if self._locked.exception() is None and self._locked.result().is_registered:
            with current(self._device):
                # The consumer may copy from it in streams that the run has not heard of.
                torch.cuda.synchronize(self._device)
                torch.cuda.cudart().cudaHostUnregister(self._locked.result().memory.data_ptr())


@dataclass(frozen=True)
class _Memory:
    """Host memory, uint8 (nbytes,), and how CUDA sees it."""

    memory: Tensor
    is_pinned: bool
    is_registered: bool = False


def _lock(nbytes: int, device: torch.device) -> _Memory:
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise PinnedMemoryError(f"{size_text(nbytes)}: {error.strerror}") from None
    # Without this, copy-on-write after fork() could give us a page that the GPU has not mapped.
    pages.madvise(mmap.MADV_DONTFORK)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    with current(device):
        code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, _PORTABLE)
        if int(code) == 0:
            return _Memory(memory, is_pinned=True, is_registered=True)
        return _pinned_or_pageable(nbytes)


def _pinned_or_pageable(nbytes: int) -> _Memory:
    try:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=_HOST, pin_memory=True)
    except RuntimeError:
        return _Memory(torch.empty(nbytes, dtype=torch.uint8, device=_HOST), is_pinned=False)
    return _Memory(memory, is_pinned=True)


class _DeviceSlot:
    """One batch's memory on the device, with the events of its last forward pass and last copy."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> None:
        self.buffers = {
            key: torch.empty(shape, dtype=dtype, device=device) for key, shape in shapes.items()
        }
        self.copied, self.filled = torch.cuda.Event(), torch.cuda.Event()
        self._device = device
        self._boards = _Memory(torch.empty(0, dtype=torch.uint8, device=_HOST), is_pinned=False)
        # A host thread that waits sleeps, instead of spinning on a core that others need.
        self._boards_copied = torch.cuda.Event(blocking=True)

    def bring(self, boards_BS: Tensor) -> Tensor:
        """Queue the copy of boards, uint8 (B, 16), by way of page-locked memory."""
        self._boards_copied.synchronize()
        if self._boards.memory.nbytes < boards_BS.nbytes:
            self._boards = _pinned_or_pageable(boards_BS.nbytes)
        staged_BS = self._boards.memory[: boards_BS.nbytes].view(-1, CELLS)
        staged_BS.copy_(boards_BS)
        tokens_BS = staged_BS.to(self._device, non_blocking=self._boards.is_pinned)
        self._boards_copied.record()
        return tokens_BS


@dataclass(frozen=True)
class _HostSlot:
    """One batch's page-locked buffers, and the event of the last copy into them."""

    buffers: Buffers
    copied: torch.cuda.Event


class CudaTransfer:
    """Captures batches on the device and copies them to pinned host slots on a side stream.

    The forward of one batch runs while the batch before it is copied. A device slot is used again
    once its copy is done (the device waits), a host slot once its consumer released it (the
    calling thread waits). The forward passes run in the stream that is current when this is made.

    Without host slots nothing is copied. A consumer that takes batches on the device has each until
    the one after the next is captured, in the same slot. Before that, the forward's stream has to
    wait for the consumer's work.

    Args:
        shapes: shapes of a full batch's tensors, all in the storage dtype `dtype`.
        dtype: storage dtype.
        device: runs the model.
        host_slots: take the copies; None copies nothing.
        on_device: hand batches to the consumer on the device.
    """

    def __init__(
        self,
        shapes: Shapes,
        dtype: torch.dtype,
        device: torch.device,
        *,
        host_slots: PinnedSlots | None = None,
        on_device: bool = False,
    ) -> None:
        self._device = device
        self._on_device = on_device
        self._compute = torch.cuda.current_stream(device)
        self._side = torch.cuda.Stream(device)
        self.copying: Stopwatch | CudaStopwatch = CudaStopwatch(self._side)
        # Used in turn, each allocated at its first use. The one being copied is the last used.
        count = _DEVICE_SLOTS if on_device or host_slots is not None else 1
        self._device_slots = cycle(_DeviceSlot(shapes, dtype, device) for _ in range(count))
        self._ring: _Ring[_HostSlot] | None = None
        if host_slots is not None:
            self._copies_are_queued = host_slots.are_pinned
            if not self._copies_are_queued:
                note(f"{device} cannot page-lock host memory here; copies to the host are slower")
            buffers = iter(host_slots)
            # Writers sleep on this event instead of spinning on a core that others need.
            self._ring = _Ring(
                lambda: _HostSlot(next(buffers), torch.cuda.Event(blocking=True)), host_slots.count
            )

    def run(self, boards: BoardBatch, forward: Forward) -> ActivationBatch:
        """Queue a batch and its copy. Blocks while every host slot is taken."""
        slot, rows = next(self._device_slots), len(boards.indices)
        self._compute.wait_event(slot.copied)
        forward(slot.bring(boards.boards_BS), _cut(slot.buffers, rows))
        if self._ring is not None:
            return self._copy(slot, boards, self._ring)
        if not self._on_device:
            return ActivationBatch(boards, {}, [Chunk(0, rows)], _nothing)
        slot.filled.record(self._compute)
        whole = Chunk(0, rows, partial(self._wait_on_device, slot.filled))
        return ActivationBatch(boards, _cut(slot.buffers, rows), [whole], _nothing)

    def _copy(
        self, source: _DeviceSlot, boards: BoardBatch, ring: _Ring[_HostSlot]
    ) -> ActivationBatch:
        target, rows = ring.take(), len(boards.indices)
        host = _cut(target.buffers, rows)
        self._side.wait_stream(self._compute)
        with torch.cuda.stream(self._side), self.copying:
            for key, tensor in _cut(source.buffers, rows).items():
                host[key].copy_(tensor, non_blocking=self._copies_are_queued)
            source.copied.record(self._side)
            target.copied.record(self._side)
        whole = Chunk(0, rows, partial(self._wait, target.copied))
        return ActivationBatch(boards, host, [whole], lambda: ring.give_back(target))

    def _wait(self, event: torch.cuda.Event) -> None:
        with current(self._device):
            event.synchronize()

    def _wait_on_device(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def close(self) -> None:
        """Wait for all that is queued, so that the buffers may be freed and times are complete."""
        self._compute.synchronize()
        self._side.synchronize()


def _nothing() -> None:
    pass


def _whole_pages(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE


def _empty_on_pages(shapes: Shapes, dtype: torch.dtype) -> Buffers:
    # As in pinned memory, tensors start on a page, for direct writes.
    buffers = {}
    for key, shape in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        memory = torch.empty(nbytes + mmap.PAGESIZE, dtype=torch.uint8, device=_HOST)
        start = -memory.data_ptr() % mmap.PAGESIZE
        buffers[key] = memory[start : start + nbytes].view(dtype).view(shape)
    return buffers


def _cut(buffers: Buffers, rows: int) -> Buffers:
    return {key: tensor[:rows] for key, tensor in buffers.items()}
