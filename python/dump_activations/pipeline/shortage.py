"""What torch raises for want of memory or threads, as one error that says of what."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager

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
        raise PinnedMemoryError(str(error).partition("\n")[0]) from None


def shortage(error: BaseException | None) -> str | None:
    """Say of what there was too little, where that is what an error means."""
    if isinstance(error, PinnedMemoryError):
        return f"pinned host memory ({error})"
    if isinstance(error, MemoryError):
        return "host memory"
    if not isinstance(error, RuntimeError) or isinstance(error, DumpActivationsError):
        return None
    text = str(error)
    return next((of for of, found in _SHORTAGES.items() if re.search(found, text)), None)


class _NamedShortage(AbstractContextManager[None]):
    """Raises one error for what is meant by those that torch and Python have.

    Callers try again where they catch it, while it is alive: it keeps no frame of what failed, and
    so none of its memory.

    Args:
        advise: error -> what follows the name of what there is too little of.
        but: an error that is another's to name.
    """

    def __init__(
        self, advise: Callable[[BaseException], str], but: tuple[type[BaseException], ...] = ()
    ) -> None:
        self._advise = advise
        self._but = but

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        del traceback
        what = shortage(error)
        if error is None or what is None or isinstance(error, self._but):
            return
        text = f"out of {what}{self._advise(error)}"
        if what == _THREADS:
            text = "no more threads can be started; end other programs, or raise `ulimit -u`"
        named = DeviceError(text)
        for note in getattr(error, "__notes__", []):
            named.add_note(note)
        _drop_tracebacks(error)
        raise named from error


def _drop_tracebacks(error: BaseException | None) -> None:
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def batch_shortage_named(batch_size: int) -> AbstractContextManager[None]:
    """Say that a smaller batch may fit where there is too little of something for this one."""

    def advise(error: BaseException) -> str:
        smaller = option("batch_size", max(batch_size // 2, 1))
        if getattr(error, "__notes__", []):
            smaller += f" and {switch('overwrite')}"
        return f" at {option('batch_size', batch_size)}; free some, or try {smaller}"

    return _NamedShortage(advise)


def model_shortage_named(device: torch.device) -> AbstractContextManager[None]:
    """Say that it is the model that does not fit."""
    return _NamedShortage(
        lambda _: f": the model does not fit on {device}; free some, or take another",
        but=(PinnedMemoryError,),
    )
