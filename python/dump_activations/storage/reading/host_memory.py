"""Memory for what is read, which is handed out again once nobody holds it.

Fresh pages cost as much as reading into them does.
"""

import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class RecycledMemory:
    """Blocks by name; those that were let go of are kept for the next who asks."""

    def __init__(self) -> None:
        self._free: dict[str, list[NDArray[np.uint8]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_free": {}}

    def take(self, name: str, nbytes: int) -> Tensor:
        """Return a tensor of bytes, uint8 (nbytes,); it and its views hold on to the block."""
        free = self._free.setdefault(name, [])
        block = free.pop() if free else np.empty(0, np.uint8)
        if block.nbytes < nbytes:
            block = np.empty(nbytes, np.uint8)
        lease = block[:nbytes]
        weakref.finalize(lease, free.append, block).atexit = False
        return torch.from_numpy(lease)
