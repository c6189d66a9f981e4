"""The machine's own limits, that a dump cannot beat: model, copy and disk by themselves.

Shape letters: N boards in all, S cells (16).
"""

from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import torch
from measure import timed
from output import write_raw
from torch import Tensor, nn

from dump_activations.api.dump import writer_threads

_COPIED_NBYTES = 1 << 30


def plain_loop(model: nn.Module, tokens_NS: Tensor, batch: int) -> None:
    """Run the model on one batch after another, and nothing else."""
    with torch.inference_mode():
        for i in range(0, len(tokens_NS), batch):
            model(tokens_NS[i : i + batch])
    if tokens_NS.is_cuda:
        torch.cuda.synchronize()


def write_speed(directory: Path, nbytes: int) -> float:
    """Bytes a second of bare pwrite by as many threads as a dump has, to the last fsync.

    Through the page cache or past it, whichever is faster here.
    """
    options = Namespace(directory=directory, threads=writer_threads(1))
    seconds = [write_raw(nbytes, options, direct=False, flush=True)]
    with suppress(OSError):  # Not every file system has direct writes.
        seconds.append(write_raw(nbytes, options, direct=True, flush=True))
    return nbytes / min(seconds)


def pinned_copy_speed(repeats: int = 20) -> float:
    """Bytes a second of copies from the GPU to page-locked memory."""
    source = torch.empty(_COPIED_NBYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty(_COPIED_NBYTES, dtype=torch.uint8, pin_memory=True)

    def copy(times: int) -> None:
        for _ in range(times):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    copy(1)
    return _COPIED_NBYTES * repeats / timed(lambda: copy(repeats))
