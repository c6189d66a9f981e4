"""Buffers that a forward pass fills, and their way to host memory.

Each batch's activations are captured in device buffers, one whole contiguous tensor a key, and
handed on as a `HostBatch`. A bounded ring of host slots is what slows the forward down when the
consumer is slower, and what bounds memory.

Shape letters: B boards in a batch.
"""

import math
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from dump_activations.cuda_timing import CudaStopwatch
from dump_activations.parts import Part
from dump_activations.timing import Stopwatch

_HOST_SLOTS = 3
_DEVICE_SLOTS = 2
_PAGE = 4096
_HOST = torch.device("cpu")

Buffers = dict[str, Tensor]
Slot = TypeVar("Slot")


@dataclass(frozen=True)
class HostBatch:
    """One batch's activations on their way to host memory.

    Attributes:
        tensors: key -> tensor (B, *shape) in host memory.
        parts: the batch's rows; those of a part count once it has been waited for.
        release: gives the memory back to the ring; `tensors` must not be used after it.
    """

    tensors: Buffers
    parts: Sequence[Part]
    release: Callable[[], None]


class Transfer(Protocol):
    """Where a batch is captured, and how it gets to the host."""

    @property
    def copying(self) -> Stopwatch | CudaStopwatch:
        """Counts the time the copies take."""

    def buffers(self, rows: int) -> Buffers:
        """Return the buffers to capture the next batch in, cut to its number of boards."""

    def to_host(self, parts: Sequence[Part]) -> HostBatch:
        """Pass on the batch that is being captured. Blocks while every host slot is taken.

        Args:
            parts: all of the batch, as the forward pass fills its buffers.
        """

    def close(self) -> None:
        """Wait until nothing is under way in the buffers."""


class _Ring(Generic[Slot]):
    """A bounded ring of slots, each allocated when it is first needed."""

    def __init__(self, allocate: Callable[[], Slot], limit: int) -> None:
        self._allocate = allocate
        self._unallocated = limit
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()

    def take(self) -> Slot:
        """Take a free slot; blocks while there is none."""
        if self._free.empty() and self._unallocated:
            self._unallocated -= 1
            return self._allocate()
        return self._free.get()

    def give_back(self, slot: Slot) -> None:
        """Let the slot be taken again, the longest free one first."""
        self._free.put(slot)


class HostTransfer:
    """The host's own memory is where the model runs: batches are captured in the slots."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.copying: Stopwatch | CudaStopwatch = Stopwatch()
        self._ring = _Ring(lambda: _allocate(shapes, dtype), _HOST_SLOTS)
        self._current: Buffers | None = None

    def buffers(self, rows: int) -> Buffers:
        """Return the buffers to capture the next batch in, cut to its number of boards."""
        if self._current is None:
            self._current = self._ring.take()
        return _cut(self._current, rows)

    def to_host(self, parts: Sequence[Part]) -> HostBatch:
        """Pass on the batch that is being captured."""
        slot, self._current = self._current, None
        assert slot is not None
        return HostBatch(_cut(slot, parts[-1].stop), parts, lambda: self._ring.give_back(slot))

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
    calling thread waits).
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self.copying: Stopwatch | CudaStopwatch = CudaStopwatch(self._stream)
        self._device_ring = _Ring(
            lambda: _CudaSlot(_allocate(shapes, dtype, device=device), torch.cuda.Event()),
            _DEVICE_SLOTS,
        )
        # Writers sleep on this event instead of spinning on a core that others need.
        self._host_ring = _Ring(
            lambda: _CudaSlot(
                _allocate(shapes, dtype, pinned=True), torch.cuda.Event(blocking=True)
            ),
            _HOST_SLOTS,
        )
        self._current: _CudaSlot | None = None

    def buffers(self, rows: int) -> Buffers:
        """Return the buffers to capture the next batch in, cut to its number of boards."""
        if self._current is None:
            self._current = self._device_ring.take()
            torch.cuda.current_stream(self._device).wait_event(self._current.copied)
        return _cut(self._current.buffers, rows)

    def to_host(self, parts: Sequence[Part]) -> HostBatch:
        """Start the copy of the batch whose forward pass was queued last, and pass it on."""
        source, self._current = self._current, None
        assert source is not None
        rows = parts[-1].stop
        target = self._host_ring.take()
        host = _cut(target.buffers, rows)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream), self.copying:
            for key, tensor in _cut(source.buffers, rows).items():
                host[key].copy_(tensor, non_blocking=True)
            source.copied.record(self._stream)
            target.copied.record(self._stream)
        self._device_ring.give_back(source)
        whole = Part(0, rows, partial(self._wait, target.copied))
        return HostBatch(host, [whole], lambda: self._host_ring.give_back(target))

    def _wait(self, event: torch.cuda.Event) -> None:
        # A thread that names no device would set up the first one, whichever the run's is.
        with torch.cuda.device(self._device):
            event.synchronize()

    def close(self) -> None:
        """Wait for all that is queued, so that the buffers may be freed and times are complete."""
        torch.cuda.synchronize(self._device)


def make_transfer(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> Transfer:
    """Allocate the buffers for batches on a device.

    Args:
        shapes: key -> shape of a full batch's tensor, (B, *shape).
        dtype: storage dtype of all of them.
        device: where the model runs.
    """
    if device.type == "cuda":
        return CudaTransfer(shapes, dtype, device)
    return HostTransfer(shapes, dtype)


def _allocate(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    *,
    device: torch.device = _HOST,
    pinned: bool = False,
) -> Buffers:
    """Allocate a tensor a key, on the device or in host memory."""
    if device == _HOST and not pinned:
        return {key: _empty_on_pages(shape, dtype) for key, shape in shapes.items()}
    return {
        key: torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
        for key, shape in shapes.items()
    }


def _empty_on_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate host memory that starts on a page, as pinned memory does, for direct writes."""
    nbytes = math.prod(shape) * dtype.itemsize
    memory = torch.empty(nbytes + _PAGE, dtype=torch.uint8, device=_HOST)
    start = -memory.data_ptr() % _PAGE
    return memory[start : start + nbytes].view(dtype).view(shape)


def _cut(buffers: Buffers, rows: int) -> Buffers:
    return {key: tensor[:rows] for key, tensor in buffers.items()}
