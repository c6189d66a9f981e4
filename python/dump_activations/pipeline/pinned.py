"""The host slots of a GPU's run: page-locked memory of the exact size, given back at its end.

torch's own pinned memory comes in blocks of powers of two and stays with the process: up to twice
what a run needs, for as long as its caller lives. CUDA page-locks any memory that it is told of.
"""

import math
import mmap
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from dump_activations.errors import DeviceError
from dump_activations.pipeline.device import current
from dump_activations.pipeline.host_share import share_of_host
from dump_activations.pipeline.shortage import PinnedMemoryError
from dump_activations.text import size_text

# Below this the forward would wait for each batch's consumer.
_FEWEST_SLOTS = 2
_PORTABLE = 1  # cudaHostRegisterPortable
# cudaErrorMemoryAllocation and cudaErrorOperatingSystem, which a smaller batch may not meet.
_SHORTAGES = (2, 304)


class PinnedSlots:
    """A run's host slots, each a tensor a key that starts on a page, as a context manager.

    They are page-locked on a thread of their own, which takes a second for some GB, and at once, so
    that what does not fit is found before anything is written. CUDA notes an error for the thread
    that met it: in the caller's, the next kernel would raise it.

    Args:
        shapes: key -> shape of a full batch's tensor, (B, *shape).
        dtype: storage dtype of all of them.
        device: that copies to them.
        count: how many are wanted; there are fewer where this process's share of the host's memory
            is small.

    Raises:
        PinnedMemoryError: its share has no room for two.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        *,
        count: int,
    ) -> None:
        self._shapes, self._dtype, self._device = shapes, dtype, device
        self._slot_nbytes = sum(_whole_pages(shape, dtype) for shape in shapes.values())
        share = share_of_host()
        self.count = min(count, share // max(self._slot_nbytes, 1))
        if self.count < _FEWEST_SLOTS:
            raise PinnedMemoryError(
                f"{_FEWEST_SLOTS} x {size_text(self._slot_nbytes)}, and {size_text(share)} is the "
                "share of a process here"
            )
        self._locker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pinning")
        self._locked = self._locker.submit(_lock, self.count * self._slot_nbytes, device)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Wait until they are page-locked, and yield each: key -> tensor (B, *shape).

        Raises:
            PinnedMemoryError: the system has no page-locked memory left.
        """
        memory = self._locked.result()
        start = 0
        for _ in range(self.count):
            slot = {}
            for key, shape in self._shapes.items():
                nbytes = math.prod(shape) * self._dtype.itemsize
                slot[key] = memory[start : start + nbytes].view(self._dtype).view(shape)
                start += _whole_pages(shape, self._dtype)
            yield slot

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        """Give the memory back; nothing may be under way in it. Tensors in it stay readable."""
        self._locker.shutdown(wait=True)
        if self._locked.exception() is None:
            with current(self._device):
                torch.cuda.cudart().cudaHostUnregister(self._locked.result().data_ptr())


def _whole_pages(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE


def _lock(nbytes: int, device: torch.device) -> Tensor:
    """Return page-locked memory, uint8 (nbytes,).

    Raises:
        PinnedMemoryError: the system has no more of it.
        DeviceError: CUDA refuses for another reason.
    """
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise PinnedMemoryError(f"{size_text(nbytes)}: {error.strerror}") from None
    # After a fork, the process that writes to a page first would get another one than the device's.
    pages.madvise(mmap.MADV_DONTFORK)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    with current(device):
        cudart = torch.cuda.cudart()
        error_code = cudart.cudaHostRegister(memory.data_ptr(), nbytes, _PORTABLE)
        if int(error_code) == 0:
            return memory
        reason = cudart.cudaGetErrorString(error_code)
    if int(error_code) in _SHORTAGES:
        raise PinnedMemoryError(f"{size_text(nbytes)}: {reason}")
    raise DeviceError(f"{device} cannot page-lock host memory: {reason}")
