"""The machine's own limits, that a dump cannot beat: model, copy and disk by themselves.

Shape letters: N boards in all, S cells (16).
"""

import ctypes
import functools
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from measure import timed
from torch import Tensor, nn

from dump_activations.api.dump import writer_threads

BLOCK = 4 << 20


def plain_loop(model: nn.Module, tokens_NS: Tensor, batch: int) -> None:
    """Run the model on one batch after another, and nothing else."""
    with torch.inference_mode():
        for i in range(0, len(tokens_NS), batch):
            model(tokens_NS[i : i + batch])
    if tokens_NS.is_cuda:
        torch.cuda.synchronize()


def write_speed(directory: Path, nbytes: int) -> float:
    """Bytes per second of bare pwrite by a dump's number of threads, to the last fsync.

    The faster of two ways here: through the page cache or past it.
    """
    threads = writer_threads(1)
    seconds = [write_raw(directory, nbytes, threads, direct=False)]
    with suppress(OSError):  # Not every file system has direct writes.
        seconds.append(write_raw(directory, nbytes, threads, direct=True))
    return nbytes / min(seconds)


def write_raw(
    directory: Path, nbytes: int, threads: int, *, direct: bool, flush: bool = True
) -> float:
    """Seconds to reserve a file, write it with several threads, and flush it."""
    path = directory / "raw.bin"
    nbytes -= nbytes % 4096
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0), 0o600)

    def write() -> None:
        os.posix_fallocate(fd, 0, nbytes)
        in_blocks(
            nbytes,
            threads,
            lambda at, block: os.pwrite(fd, memoryview(block)[: nbytes - at], at),
        )
        if flush:
            os.fsync(fd)

    try:
        return timed(write)
    finally:
        os.close(fd)
        path.unlink()


def read_raw(path: Path, threads: int) -> float:
    """Seconds to read a file with several threads."""
    with path.open("rb") as file:
        fd = file.fileno()
        nbytes = path.stat().st_size
        return timed(
            lambda: in_blocks(nbytes, threads, lambda at, block: os.preadv(fd, [block], at))
        )


def in_blocks(nbytes: int, threads: int, work: Callable[[int, mmap.mmap], object]) -> None:
    """Call `work` for the offset of each block, each thread with memory of its own."""
    lock, offsets = threading.Lock(), iter(range(0, nbytes, BLOCK))

    def following() -> int | None:
        with lock:
            return next(offsets, None)

    def run(block: mmap.mmap) -> None:
        for at in iter(following, None):
            work(at, block)

    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(run, [_noise_block() for _ in range(threads)]))


def _noise_block() -> mmap.mmap:
    block = mmap.mmap(-1, BLOCK)
    block[:] = _noise()
    return block


@functools.cache
def _noise() -> bytes:
    return np.random.default_rng(0).bytes(BLOCK)


def drop_from_cache(path: Path) -> None:
    """Drop a file from the page cache, and check that it is gone."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        for _ in range(10):  # A page that another CPU holds is not dropped at once.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if (kept := _resident_pages(file.fileno())) == 0:
                return
            time.sleep(0.1)
    sys.exit(f"{path}: {kept} pages stay in the page cache")


def _resident_pages(fd: int) -> int:
    mapped = np.frombuffer(mmap.mmap(fd, 0, prot=mmap.PROT_READ), np.uint8)
    pages = np.zeros(-(-mapped.size // mmap.PAGESIZE), np.uint8)
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    if mincore(mapped.ctypes.data, mapped.size, pages.ctypes.data):
        raise OSError(ctypes.get_errno(), "mincore")
    return int((pages & 1).sum())


def warm(path: Path) -> None:
    """Read a file into the page cache."""
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def pinned_copy_speed(nbytes: int) -> float:
    """Bytes per second of copies from the GPU to memory that torch page-locked."""
    return copy_speed(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True))


def copy_speed(target: Tensor, repeats: int = 20) -> float:
    """Bytes per second of copies from the GPU to host memory, uint8 (nbytes,)."""
    source = torch.empty(len(target), dtype=torch.uint8, device="cuda")

    def copy(times: int) -> None:
        for _ in range(times):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    copy(1)
    return len(target) * repeats / timed(lambda: copy(repeats))
