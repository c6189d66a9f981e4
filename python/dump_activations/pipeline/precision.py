"""The arithmetic of the forward pass: `--precision`."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch


class _Fp32Matmuls:
    """Has matrix products of fp32 done in this precision while any thread is inside.

    The setting is the process's, so the first thread in makes it and the last one out undoes it.
    """

    def __init__(self, precision: str) -> None:
        self._precision = precision
        self._lock = threading.Lock()
        self._inside = 0
        self._restore: Callable[[], None] = lambda: None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._restore = _restoring()
                torch.set_float32_matmul_precision(self._precision)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore()


def _restoring() -> Callable[[], None]:
    """Return what puts the process's setting back to what it is now."""
    try:
        return partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    except RuntimeError:
        # The process has set its backends one by one, which the one setting cannot tell.
        matmuls = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        before = [(matmul, matmul.fp32_precision) for matmul in matmuls]

    def restore() -> None:
        for matmul, precision in before:
            matmul.fp32_precision = precision

    return restore


_HIGHEST, _HIGH = _Fp32Matmuls("highest"), _Fp32Matmuls("high")


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Run a forward pass inside the context in a precision, whatever the caller's settings are.

    `fp32` computes in IEEE single precision; `tf32` lets CUDA round the factors of matrix products
    to 10 bits of mantissa; `bf16` runs matrix products in bf16 and keeps weights, norms and the
    residual stream in fp32.

    Args:
        precision: one of `options.PRECISIONS`.
        device: where the model runs.
    """
    # The cache of casts would be one with the caller's own autocast, and gains nothing: a pass uses
    # each weight once.
    autocast = torch.autocast(
        device.type,
        dtype=torch.bfloat16,
        enabled=precision == "bf16",
        cache_enabled=False,
    )
    with autocast, _HIGH if precision == "tf32" else _HIGHEST:
        yield
