"""Memory that is all 0xFF bytes until something is written to it."""

import ctypes
import weakref

import numpy as np
import torch
from torch import Tensor

_PAGE = 4096


def unwrite(tensor: Tensor) -> None:
    """Make a tensor's memory as if it had never been written."""
    tensor.untyped_storage().fill_(0xFF)


def unwritten(like: Tensor) -> Tensor:
    """Allocate a tensor of another's shape and dtype."""
    tensor = torch.empty_like(like)
    unwrite(tensor)
    return tensor


class PinnedMemory:
    """Page-locked memory.

    Of torch's, in blocks that are handed out again as soon as nobody holds them, and memory of the
    program's own that it has registered.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}
        self._addresses: set[int] = set()
        self.registered: dict[int, int] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        first = tensor.data_ptr()
        return tensor.untyped_storage().data_ptr() in self._addresses or any(
            start <= first and first + tensor.nbytes <= start + nbytes
            for start, nbytes in self.registered.items()
        )

    def register(self, address: int, nbytes: int) -> int:
        """Page-lock memory of the program's; return CUDA's code of an error, or 0."""
        assert address % _PAGE == nbytes % _PAGE == 0
        assert address not in self.registered
        ctypes.memset(address, 0xFF, nbytes)
        self.registered[address] = nbytes
        return 0

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def allocate(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        size = 1 << nbytes.bit_length()
        free = self._free.setdefault(size, [])
        block = free.pop() if free else self._lock(size)
        # The tensor and its views hold on to it; so does a queued copy that reads or writes them.
        lease = block[:nbytes]
        weakref.finalize(lease, free.append, block).atexit = False
        tensor = torch.from_numpy(lease).view(dtype).view(shape)
        unwrite(tensor)
        return tensor

    def _lock(self, nbytes: int) -> np.ndarray:
        memory = np.empty(nbytes + _PAGE, np.uint8)
        start = -memory.ctypes.data % _PAGE
        self._addresses.add(memory.ctypes.data + start)
        return memory[start : start + nbytes]
