"""The arithmetic of the forward pass: `--precision`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


@contextmanager
def _fp32_matmuls(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# `fp32` computes in IEEE single precision whatever the process's own setting is; `tf32` lets CUDA
# round the factors of matrix products to 10 bits of mantissa; `bf16` runs matrix products in bf16
# and keeps weights, norms and the residual stream in fp32.
_CONTEXTS: dict[str, Callable[[torch.device], AbstractContextManager[None]]] = {
    "fp32": lambda _: _fp32_matmuls("highest"),
    "tf32": lambda _: _fp32_matmuls("high"),
    "bf16": lambda device: torch.autocast(device.type, dtype=torch.bfloat16),
}


def arithmetic(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which a forward pass runs in the given precision.

    Args:
        precision: one of `options.PRECISIONS`.
        device: where the model runs.
    """
    return _CONTEXTS[precision](device)
