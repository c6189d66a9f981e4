"""What torch raises for want of memory or threads, as one error that says of what."""

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dump_activations.errors import DeviceError, DumpActivationsError, option, switch

_THREADS = "threads"
_SHORTAGES = {
    _THREADS: "can't start new thread",
    "device memory for the workspace of cuBLAS": "CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)",
    "device memory for the workspace of cuDNN": "CUDNN_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)",
    "device memory": "CUDA.*out of memory",
    "host memory": "out of memory|can't allocate memory",
}


class PinnedMemoryError(MemoryError):
    """The system has no page-locked memory left."""


def empty_pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate page-locked host memory.

    Raises:
        PinnedMemoryError: there is none left.
    """
    try:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
    except RuntimeError as error:
        if shortage(error) is None:
            raise
        raise PinnedMemoryError(str(error)) from None


def shortage(error: BaseException) -> str | None:
    """Say of what there was too little, where that is what an error means."""
    if isinstance(error, DumpActivationsError):
        return None
    if isinstance(error, PinnedMemoryError):
        return "pinned host memory"
    if isinstance(error, MemoryError):
        return "host memory"
    text = str(error)
    return next((of for of, found in _SHORTAGES.items() if re.search(found, text)), None)


@contextmanager
def batch_shortage_named(batch_size: int) -> Iterator[None]:
    """Say that a smaller batch may fit where there is too little of something for this one."""

    def advise(error: BaseException) -> str:
        smaller = option("batch_size", max(batch_size // 2, 1))
        if getattr(error, "__notes__", []):
            smaller += f" and {switch('overwrite')}"
        return f" at {option('batch_size', batch_size)}; free some, or try {smaller}"

    with _named(advise):
        yield


@contextmanager
def model_shortage_named(device: torch.device) -> Iterator[None]:
    """Say that it is the model that does not fit."""
    with _named(lambda _: f": the model does not fit on {device}; free some, or take another"):
        yield


@contextmanager
def _named(advise: Callable[[BaseException], str]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        what = shortage(error)
        if what is None:
            raise
        if what == _THREADS:
            text = "no more threads can be started; end other programs, or raise `ulimit -u`"
        else:
            text = f"out of {what}{advise(error)}"
        named = DeviceError(text)
        for note in getattr(error, "__notes__", []):
            named.add_note(note)
        _forget_locals(error)
        raise named from error


def _forget_locals(error: BaseException | None) -> None:
    """Free what the frames of an error hold, so that a retry finds the memory that it needs.

    Callers retry where they catch it, while the error is alive.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
