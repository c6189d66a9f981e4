"""Hands batches of activations from the device that the model runs on to the consumer.

A batch is captured in a slot's buffers, one contiguous tensor per key, and yielded as an
`ActivationBatch`. The ring of slots is bounded: it slows the forward down when the consumer is
slower, and it bounds memory.

Shape letters: B boards in a batch, S cells (16).
"""

import math
import mmap
import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dump_activations.errors import size_text
from dump_activations.pipeline.feed import BoardBatch
from dump_activations.pipeline.plan import Plan
from dump_activations.progress import Chunk

HOST_SLOTS = 3
"""Slots of a run whose batches are written: one is copied to while others are written."""

Shapes = Mapping[str, tuple[int, ...]]
"""Key -> shape of a full batch's tensor, (B, *shape)."""

Buffers = dict[str, Tensor]
"""Key -> tensor (B, *shape)."""

# The slot that was released last comes first: its memory is in the cache, and a consumer that keeps
# up never touches the others.
Ring = queue.LifoQueue[Buffers]
"""The slots that are free."""


@dataclass(frozen=True)
class ActivationBatch:
    """A batch of boards and its activations.

    Attributes:
        tensors: key -> tensor (B, *shape) in the memory that the consumer asked for.
        chunks: the batch's rows. The rows of a chunk are there once it has been waited for: on the
            host, or on a device for work that is queued afterwards in the thread's current stream.
        release: gives the memory back to the ring. The next batch may then overwrite `tensors`.
    """

    boards: BoardBatch
    tensors: Buffers
    chunks: Sequence[Chunk]
    release: Callable[[], object] = lambda: None


def host_ring(plan: Plan, rows: int) -> Ring:
    """Map slots in host memory, where the model runs and the consumer reads them."""
    shapes, dtype = shapes_of(plan, rows), plan.storage_dtype
    return ring(mapped(HOST_SLOTS * slot_nbytes(shapes, dtype)), shapes, dtype, HOST_SLOTS)


def mapped(nbytes: int, advice: int = mmap.MADV_NORMAL) -> Tensor:
    """Map memory, uint8 (nbytes,), that starts on a page and takes none until it is written to."""
    try:
        pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size_text(nbytes)}: {error.strerror}") from None
    pages.madvise(advice)
    return torch.frombuffer(pages, dtype=torch.uint8)


def ring(memory: Tensor, shapes: Shapes, dtype: torch.dtype, count: int) -> Ring:
    """Cut memory into slots whose tensors start on a page, as direct writes need."""
    free, start = Ring(), 0
    for _ in range(count):
        slot = {}
        for key, shape in shapes.items():
            nbytes = math.prod(shape) * dtype.itemsize
            slot[key] = memory[start : start + nbytes].view(dtype).view(shape)
            start += -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        free.put(slot)
    return free


def shapes_of(plan: Plan, rows: int) -> Shapes:
    """Return the shapes of a plan's tensors for a batch of `rows` boards."""
    return {tensor.name: (rows, *tensor.shape) for tensor in plan.board_tensors}


def slot_nbytes(shapes: Shapes, dtype: torch.dtype) -> int:
    """Return the bytes of a slot, in whole pages."""
    sizes = (math.prod(shape) * dtype.itemsize for shape in shapes.values())
    return sum(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE for nbytes in sizes)


def cut(buffers: Buffers, rows: int) -> Buffers:
    """View the first rows of each buffer."""
    return {key: tensor[:rows] for key, tensor in buffers.items()}
