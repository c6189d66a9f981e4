"""Writes as the package does, with no byte looked at: what digests and counts cost is beyond it."""

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np

from dump_activations import _rust

LARGEST_RUN = 4 << 20


@contextmanager
def undigested() -> Iterator[None]:
    """Let every span be written by a plain pwrite inside the context."""
    memory = threading.local()

    def write_span(
        fd: int, direct_fd: int | None, offset: int, data: np.ndarray, _dtype: str
    ) -> tuple[int, int, int]:
        if direct_fd is None or offset % 4096 or data.nbytes % 4096:
            return os.pwrite(fd, data, offset) and (0, 0, 0)
        if data.ctypes.data % 512:
            if not hasattr(memory, "page_aligned"):
                memory.page_aligned = np.frombuffer(mmap.mmap(-1, LARGEST_RUN), np.uint8)
            aligned = memory.page_aligned[: data.nbytes]
            aligned[:] = data
            data = aligned
        return os.pwrite(direct_fd, data, offset) and (0, 0, 0)

    with mock.patch.object(_rust, "write_span", write_span):
        yield
