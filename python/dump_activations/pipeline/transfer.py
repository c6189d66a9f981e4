"""The way of boards to the device that the model runs on, and of activations from it.

A batch is captured in a slot's buffers, one whole contiguous tensor a key, and handed on as an
`ActivationBatch`. A bounded ring of slots is what slows the forward down when the consumer is
slower, and what bounds memory.

Shape letters: B boards in a batch, S cells (16).
"""

import math
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from dump_activations.chunks import Chunk
from dump_activations.dtypes import CELLS
from dump_activations.pipeline.board_feed import BoardBatch
from dump_activations.pipeline.cuda_timing import CudaStopwatch
from dump_activations.pipeline.device import current
from dump_activations.pipeline.pinned import PinnedSlots
from dump_activations.pipeline.shortage import empty_pinned
from dump_activations.timing import Stopwatch

HOST_SLOTS = 3
"""So many let one batch be copied while others are written."""

_DEVICE_SLOTS = 2
_PAGE = 4096
_HOST = torch.device("cpu")

Buffers = dict[str, Tensor]
_SlotT = TypeVar("_SlotT")


@dataclass(frozen=True)
class ActivationBatch:
    """What a batch of boards became, on its way to the consumer.

    Attributes:
        boards: the batch of boards.
        tensors: key -> tensor (B, *shape) where the consumer wants it; none where it wants none.
        chunks: the batch's rows; those of a chunk count once it has been waited for. On a device
            the thread's current stream does the waiting: what it is given next finds them.
        release: gives the memory back to the ring; `tensors` must not be used after it.
    """

    boards: BoardBatch
    tensors: Buffers
    chunks: Sequence[Chunk]
    release: Callable[[], object]


class Capturing(Protocol):
    """A batch that is being captured."""

    @property
    def tokens(self) -> Tensor:
        """The boards, uint8 (B, 16), on the model's device."""

    @property
    def buffers(self) -> Buffers:
        """Where the forward pass puts the activations: key -> tensor (B, *shape)."""

    def send(self, chunks: Sequence[Chunk]) -> ActivationBatch:
        """Hand on the batch once its forward is queued; the buffers are the caller's no longer.

        Blocks while every host slot is taken.

        Args:
            chunks: all of the batch, as the forward pass fills the buffers.
        """


class Transfer(Protocol):
    """Where batches are captured, and how they get to the consumer."""

    @property
    def copying(self) -> Stopwatch | CudaStopwatch:
        """Counts the time the copies to the host take."""

    def capture(self, boards: BoardBatch) -> Capturing:
        """Begin a batch."""

    def close(self) -> None:
        """Wait until nothing is under way in the buffers."""


class _Ring(Generic[_SlotT]):
    """A bounded ring of slots, each allocated when it is first needed."""

    def __init__(self, allocate: Callable[[], _SlotT], limit: int) -> None:
        self._allocate = allocate
        self._unallocated = limit
        self._free: queue.SimpleQueue[_SlotT] = queue.SimpleQueue()

    def take(self) -> _SlotT:
        """Take a free slot; blocks while there is none."""
        if self._free.empty() and self._unallocated:
            self._unallocated -= 1
            return self._allocate()
        return self._free.get()

    def give_back(self, slot: _SlotT) -> None:
        """Let the slot be taken again, the longest free one first."""
        self._free.put(slot)


@dataclass(frozen=True)
class _HostCapture:
    """Buffers that the consumer reads as they are."""

    boards: BoardBatch
    buffers: Buffers
    release: Callable[[], None]

    @property
    def tokens(self) -> Tensor:
        """The boards as they were read."""
        return self.boards.boards_BS

    def send(self, chunks: Sequence[Chunk]) -> ActivationBatch:
        """Hand on the batch."""
        return ActivationBatch(self.boards, self.buffers, chunks, self.release)


class HostTransfer:
    """The host's own memory is where the model runs: batches are captured in the slots."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.copying: Stopwatch | CudaStopwatch = Stopwatch()
        self._ring = _Ring(lambda: _allocate(shapes, dtype), HOST_SLOTS)

    def capture(self, boards: BoardBatch) -> Capturing:
        """Begin a batch."""
        slot = self._ring.take()
        buffers = _cut(slot, len(boards.indices))
        return _HostCapture(boards, buffers, lambda: self._ring.give_back(slot))

    def close(self) -> None:
        """Nothing is ever under way on the host."""


class _DeviceSlot:
    """One batch's memory on the device, and its boards' on their way there.

    Attributes:
        buffers: key -> tensor (B, *shape).
        copied: the event of the last copy out of them.
        filled: the event of the forward pass that filled them last.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.buffers = _allocate(shapes, dtype, device=device)
        self.copied, self.filled = torch.cuda.Event(), torch.cuda.Event()
        self._boards_BS = torch.empty((0, CELLS), dtype=torch.uint8, device=_HOST)
        # Whoever waits on the host sleeps, instead of spinning on a core that others need.
        self._boards_copied = torch.cuda.Event(blocking=True)

    def bring(self, boards_BS: Tensor, device: torch.device) -> Tensor:
        """Queue the copy of boards, uint8 (B, 16), to the device, in the current stream.

        A batch's few bytes are put in page-locked memory for it, which is used again once the
        device has read it.
        """
        self._boards_copied.synchronize()
        if len(self._boards_BS) < len(boards_BS):
            self._boards_BS = empty_pinned(tuple(boards_BS.shape), torch.uint8)
        pinned_BS = self._boards_BS[: len(boards_BS)]
        pinned_BS.copy_(boards_BS)
        tokens_BS = pinned_BS.to(device, non_blocking=True)
        self._boards_copied.record()
        return tokens_BS


@dataclass(frozen=True)
class _HostSlot:
    """One batch's page-locked buffers, and the event of the last copy into them."""

    buffers: Buffers
    copied: torch.cuda.Event


class CudaTransfer:
    """Batches are captured on the device and copied to pinned host slots on a side stream.

    The forward of one batch runs while the batch before it is copied. A device slot is used again
    once its copy is done (the device waits), a host slot once its consumer released it (the
    calling thread waits). The forward passes are in the stream that is current.

    Without host slots nothing is copied. A consumer that takes batches on the device has each until
    the one after the next is captured, in the same slot: before, the current stream has to wait for
    what the consumer still does with it.

    Args:
        shapes: key -> shape of a full batch's tensor, (B, *shape).
        dtype: storage dtype of all of them.
        device: where the model runs.
        host_slots: what batches are copied to.
        on_device: whether the consumer takes them where they are; else it takes what is copied.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        *,
        host_slots: PinnedSlots | None = None,
        on_device: bool = False,
    ) -> None:
        self._device = device
        self._on_device = on_device
        self._stream = torch.cuda.Stream(device)
        self.copying: Stopwatch | CudaStopwatch = CudaStopwatch(self._stream)
        # Used in turn, each allocated at its first: the one being copied is the last to be used.
        self._device_slots = cycle(
            _DeviceSlot(shapes, dtype, device)
            for _ in range(_DEVICE_SLOTS if on_device or host_slots else 1)
        )
        self._host_ring: _Ring[_HostSlot] | None = None
        if host_slots is not None:
            slots = iter(host_slots)
            self._host_ring = _Ring(
                # Writers sleep on this event instead of spinning on a core that others need.
                lambda: _HostSlot(next(slots), torch.cuda.Event(blocking=True)),
                host_slots.count,
            )

    def capture(self, boards: BoardBatch) -> Capturing:
        """Begin a batch."""
        slot = next(self._device_slots)
        torch.cuda.current_stream(self._device).wait_event(slot.copied)
        return _CudaCapture(self, slot, boards, slot.bring(boards.boards_BS, self._device))

    def send(self, source: _DeviceSlot, boards: BoardBatch) -> ActivationBatch:
        """Hand on a batch whose forward pass is queued."""
        rows = len(boards.indices)
        if self._host_ring is not None:
            return self._copy(source, boards, self._host_ring)
        if not self._on_device:
            return ActivationBatch(boards, {}, [Chunk(0, rows)], _nothing)
        source.filled.record()
        whole = Chunk(0, rows, partial(self._wait_on_device, source.filled))
        return ActivationBatch(boards, _cut(source.buffers, rows), [whole], _nothing)

    def _copy(
        self, source: _DeviceSlot, boards: BoardBatch, ring: _Ring[_HostSlot]
    ) -> ActivationBatch:
        target, rows = ring.take(), len(boards.indices)
        host = _cut(target.buffers, rows)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream), self.copying:
            for key, tensor in _cut(source.buffers, rows).items():
                host[key].copy_(tensor, non_blocking=True)
            source.copied.record(self._stream)
            target.copied.record(self._stream)
        whole = Chunk(0, rows, partial(self._wait, target.copied))
        return ActivationBatch(boards, host, [whole], lambda: ring.give_back(target))

    def _wait(self, event: torch.cuda.Event) -> None:
        with current(self._device):
            event.synchronize()

    def _wait_on_device(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def close(self) -> None:
        """Wait for all that is queued, so that the buffers may be freed and times are complete."""
        torch.cuda.synchronize(self._device)


@dataclass(frozen=True)
class _CudaCapture:
    """A batch in a device slot."""

    transfer: CudaTransfer
    slot: _DeviceSlot
    boards: BoardBatch
    tokens: Tensor

    @property
    def buffers(self) -> Buffers:
        """Where the forward pass puts the activations."""
        return _cut(self.slot.buffers, len(self.boards.indices))

    def send(self, chunks: Sequence[Chunk]) -> ActivationBatch:
        """Hand on the batch; the stream orders what follows after the forward pass."""
        del chunks
        return self.transfer.send(self.slot, self.boards)


def make_transfer(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    host_slots: PinnedSlots | None,
    on_device: bool,
) -> Transfer:
    """Make what a device needs; the arguments are those of `CudaTransfer`."""
    if device.type == "cuda":
        return CudaTransfer(shapes, dtype, device, host_slots=host_slots, on_device=on_device)
    return HostTransfer(shapes, dtype)


def _nothing() -> None:
    pass


def _allocate(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, *, device: torch.device = _HOST
) -> Buffers:
    """Allocate a tensor a key, on the device or in ordinary host memory."""
    if device == _HOST:
        return {key: _empty_on_pages(shape, dtype) for key, shape in shapes.items()}
    return {key: torch.empty(shape, dtype=dtype, device=device) for key, shape in shapes.items()}


def _empty_on_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate host memory that starts on a page, as pinned memory does, for direct writes."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = torch.empty(nbytes + _PAGE, dtype=torch.uint8, device=_HOST)
    start = -memory.data_ptr() % _PAGE
    return memory[start : start + nbytes].view(dtype).view(shape)


def _cut(buffers: Buffers, rows: int) -> Buffers:
    return {key: tensor[:rows] for key, tensor in buffers.items()}
