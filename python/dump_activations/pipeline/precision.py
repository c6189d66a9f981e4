"""The arithmetic of the forward pass: `--precision`."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from dump_activations.model.encoder import Encoder
from dump_activations.model.prepared import replicate


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


def in_precision(model: Encoder, precision: str, device: torch.device) -> Encoder:
    """Return the model as it is run in a precision: its weights are cast here, once a run.

    `bf16` rounds the factors of matrix products to bf16 and keeps norms, embeddings and the
    residual stream in fp32; `bf16-true` has everything in bf16, as a model that is served. The
    others run the model as it is.

    Args:
        model: on `device`; it is left as it is.
        precision: one of `options.PRECISIONS`.
        device: where the model runs.
    """
    if precision == "bf16-true":
        return replicate(model, device, lambda _: torch.bfloat16)
    if precision == "bf16":
        return replicate(model, device, _narrow_products)
    return model


def _narrow_products(module: nn.Module) -> torch.dtype | None:
    return torch.bfloat16 if isinstance(module, nn.Linear) else None


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Run a forward pass inside the context in a precision, whatever the caller's settings are.

    fp32 values are computed with in IEEE single precision, but that `tf32` lets CUDA round the
    factors of matrix products to 10 bits of mantissa.

    Args:
        precision: one of `options.PRECISIONS`.
        device: where the model runs.
    """
    not_cast = torch.autocast(device.type, enabled=False)
    with not_cast, _HIGH if precision == "tf32" else _HIGHEST:
        yield
