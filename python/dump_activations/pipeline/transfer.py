"""Buffers that a forward pass fills, and their way to host memory.

A batch is captured in a slot's buffers, one whole contiguous tensor a key, and handed on as an
`ActivationBatch`. A bounded ring of host slots is what slows the forward down when the consumer is
slower, and what bounds memory.

Shape letters: B boards in a batch.
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
from dump_activations.pipeline.board_feed import BoardBatch
from dump_activations.pipeline.cuda_timing import CudaStopwatch
from dump_activations.pipeline.device import current
from dump_activations.pipeline.shortage import empty_pinned
from dump_activations.timing import Stopwatch

_HOST_SLOTS = 3
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
        tensors: key -> tensor (B, *shape) in host memory; none where activations are discarded.
        chunks: the batch's rows; those of a chunk count once it has been waited for.
        release: gives the memory back to the ring; `tensors` must not be used after it.
    """

    boards: BoardBatch
    tensors: Buffers
    chunks: Sequence[Chunk]
    release: Callable[[], object]


class Capturing(Protocol):
    """A batch that is being captured."""

    @property
    def buffers(self) -> Buffers:
        """Where the forward pass puts the activations: key -> tensor (B, *shape)."""

    def send(self, boards: BoardBatch, chunks: Sequence[Chunk]) -> ActivationBatch:
        """Hand on the batch once its forward is queued; the buffers are the caller's no longer.

        Blocks while every host slot is taken.

        Args:
            boards: what the buffers were filled from.
            chunks: all of the batch, as the forward pass fills the buffers.
        """


class Transfer(Protocol):
    """Where batches are captured, and how they get to the consumer."""

    @property
    def copying(self) -> Stopwatch | CudaStopwatch:
        """Counts the time the copies take."""

    def capture(self, rows: int) -> Capturing:
        """Begin a batch of so many boards."""

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

    buffers: Buffers
    release: Callable[[], None]

    def send(self, boards: BoardBatch, chunks: Sequence[Chunk]) -> ActivationBatch:
        """Hand on the batch."""
        return ActivationBatch(boards, self.buffers, chunks, self.release)


class HostTransfer:
    """The host's own memory is where the model runs: batches are captured in the slots."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.copying: Stopwatch | CudaStopwatch = Stopwatch()
        self._ring = _Ring(lambda: _allocate(shapes, dtype), _HOST_SLOTS)

    def capture(self, rows: int) -> Capturing:
        """Begin a batch of so many boards."""
        slot = self._ring.take()
        return _HostCapture(_cut(slot, rows), lambda: self._ring.give_back(slot))

    def close(self) -> None:
        """Nothing is ever under way on the host."""


@dataclass(frozen=True)
class _CudaSlot:
    """One batch's buffers, and the event of the last copy out of or into them."""

    buffers: Buffers
    copied: torch.cuda.Event


class CudaTransfer:
    """Batches are captured on the device and copied to pinned host slots on a side stream.

    The forward of one batch runs while the batch before it is copied. A device slot is used again
    once its copy is done (the device waits), a host slot once its consumer released it (the
    calling thread waits). Without `keep` nothing is copied.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        *,
        keep: bool,
    ) -> None:
        self._device = device
        self._keep = keep
        self._stream = torch.cuda.Stream(device)
        self.copying: Stopwatch | CudaStopwatch = CudaStopwatch(self._stream)
        # Used in turn, each allocated at its first: the one being copied is the last to be used.
        self._device_slots = cycle(
            _CudaSlot(_allocate(shapes, dtype, device=device), torch.cuda.Event())
            for _ in range(_DEVICE_SLOTS if keep else 1)
        )
        # Writers sleep on this event instead of spinning on a core that others need.
        self._host_ring = _Ring(
            lambda: _CudaSlot(
                _allocate(shapes, dtype, pinned=True), torch.cuda.Event(blocking=True)
            ),
            _HOST_SLOTS,
        )

    def capture(self, rows: int) -> Capturing:
        """Begin a batch of so many boards."""
        slot = next(self._device_slots)
        torch.cuda.current_stream(self._device).wait_event(slot.copied)
        return _CudaCapture(self, slot, rows)

    def copy(self, source: _CudaSlot, boards: BoardBatch, rows: int) -> ActivationBatch:
        """Start the copy of a batch whose forward pass is queued."""
        if not self._keep:
            return ActivationBatch(boards, {}, [Chunk(0, rows)], _nothing)
        target = self._host_ring.take()
        host = _cut(target.buffers, rows)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream), self.copying:
            for key, tensor in _cut(source.buffers, rows).items():
                host[key].copy_(tensor, non_blocking=True)
            source.copied.record(self._stream)
            target.copied.record(self._stream)
        whole = Chunk(0, rows, partial(self._wait, target.copied))
        return ActivationBatch(boards, host, [whole], lambda: self._host_ring.give_back(target))

    def _wait(self, event: torch.cuda.Event) -> None:
        with current(self._device):
            event.synchronize()

    def close(self) -> None:
        """Wait for all that is queued, so that the buffers may be freed and times are complete."""
        torch.cuda.synchronize(self._device)


@dataclass(frozen=True)
class _CudaCapture:
    """A batch in a device slot."""

    transfer: CudaTransfer
    slot: _CudaSlot
    rows: int

    @property
    def buffers(self) -> Buffers:
        """Where the forward pass puts the activations."""
        return _cut(self.slot.buffers, self.rows)

    def send(self, boards: BoardBatch, chunks: Sequence[Chunk]) -> ActivationBatch:
        """Hand on the batch; the stream orders the copy after the forward pass."""
        del chunks
        return self.transfer.copy(self.slot, boards, self.rows)


def make_transfer(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    keep: bool,
) -> Transfer:
    """Allocate the buffers for batches on a device.

    Args:
        shapes: key -> shape of a full batch's tensor, (B, *shape).
        dtype: storage dtype of all of them.
        device: where the model runs.
        keep: whether the consumer wants the activations; else they stay where they are captured.
    """
    if device.type == "cuda":
        return CudaTransfer(shapes, dtype, device, keep=keep)
    return HostTransfer(shapes, dtype)


def _nothing() -> None:
    pass


def _allocate(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    *,
    device: torch.device = _HOST,
    pinned: bool = False,
) -> Buffers:
    """Allocate a tensor a key, on the device or in host memory."""
    if pinned:
        return {key: empty_pinned(shape, dtype) for key, shape in shapes.items()}
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
