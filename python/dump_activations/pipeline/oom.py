"""Turns the errors of torch and Python for too little memory or threads into one that says so."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from dump_activations.errors import DeviceError, DumpActivationsError, option, switch

_THREADS = "threads"
_PATTERNS = {
    _THREADS: "can't start new thread",
    "device memory for the workspace of cuBLAS": "CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)",
    "device memory for the workspace of cuDNN": "CUDNN_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)",
    "device memory": "CUDA.*out of memory",
    "host memory": "out of memory|can't allocate memory",
}


class PinnedMemoryError(MemoryError):
    """The host has too little memory for the buffers of a GPU's run."""


def out_of(error: BaseException | None) -> str | None:
    """Name the resource that ran out; None for any other error."""
    if isinstance(error, PinnedMemoryError):
        return f"pinned host memory ({error})"
    if isinstance(error, MemoryError):
        return "host memory"
    if not isinstance(error, RuntimeError) or isinstance(error, DumpActivationsError):
        return None
    text = str(error)
    return next((name for name, pattern in _PATTERNS.items() if re.search(pattern, text)), None)


class _Named(AbstractContextManager[None]):
    """Raises a DeviceError for an error that means that something ran out.

    The caller may try again in its handler, so nothing here keeps the frames of what failed, and
    the memory that they hold. A generator with `contextmanager` would keep them.

    Args:
        advice: error -> what follows the name of the resource.
    """

    def __init__(self, advice: Callable[[BaseException], str]) -> None:
        self._advice = advice

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        del traceback
        name = out_of(error)
        if error is None or name is None:
            return
        text = f"out of {name}{self._advice(error)}"
        if name == _THREADS:
            text = "no more threads can be started; end other programs, or raise `ulimit -u`"
        named = DeviceError(text)
        for note in getattr(error, "__notes__", []):
            named.add_note(note)
        cause: BaseException | None = error
        while cause is not None:
            cause.__traceback__ = None
            cause = cause.__cause__ or cause.__context__
        raise named from error


def batch_oom_named(batch_size: int) -> AbstractContextManager[None]:
    """Raise a DeviceError that advises a smaller batch where something runs out."""

    def advice(error: BaseException) -> str:
        smaller = option("batch_size", max(batch_size // 2, 1))
        if getattr(error, "__notes__", []):  # A partial file of this batch size is kept.
            smaller += f" and {switch('overwrite')}"
        return f" at {option('batch_size', batch_size)}; free some, or try {smaller}"

    return _Named(advice)


def model_oom_named(device: torch.device) -> AbstractContextManager[None]:
    """Raise a DeviceError that names the model where something runs out."""
    text = f": the model does not fit on {device}; free some, or choose another device"
    return _Named(lambda _: text)
