"""The arithmetic of the forward pass: `--precision`, and the kernels of the attention."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from dump_activations.model.encoder import Encoder, replicate

# Kernels of the attention, in the order of preference, and torch's names of their switches. Without
# cuDNN's, which plans each shape for 0.4 s and raises where it has no plan.
_ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_ENABLED = {"flash": True, "mem_efficient": True, "math": True, "cudnn": False}

# Settings of torch that `torch.set_float32_matmul_precision` changes.
_MATMULS = (("cuda", "matmul"), ("mkldnn", "matmul"))


def in_precision(model: Encoder, precision: str, device: torch.device) -> Encoder:
    """Return the model with its weights cast as a precision needs them, once per run.

    `bf16` rounds the factors of matrix products to bf16 and keeps norms, embeddings and the
    residual stream in fp32. `bf16-true` has everything in bf16, as a served model has. The others
    run the model as it is. The caller's model is never changed.
    """
    if precision == "bf16-true":
        return replicate(model, device, lambda _: torch.bfloat16)
    if precision == "bf16":
        return replicate(
            model, device, lambda module: torch.bfloat16 if isinstance(module, nn.Linear) else None
        )
    return model


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Run a forward pass inside the context with its own settings, not the caller's.

    fp32 values are computed with in IEEE single precision, but for `tf32`, where CUDA rounds the
    factors of matrix products to 10 bits of mantissa.
    """
    fp32 = "high" if precision == "tf32" else "highest"
    with torch.autocast(device.type, enabled=False), _settings.held(fp32):
        yield


class _Settings:
    """Changes settings of the whole process while any thread is inside, and puts them back.

    Threads with the same settings share them. A thread with others waits until these have left.
    """

    def __init__(self) -> None:
        self._left = threading.Condition()
        self._inside = 0
        self._fp32 = ""
        self._exits = ExitStack()

    @contextmanager
    def held(self, fp32: str) -> Iterator[None]:
        with self._left:
            self._left.wait_for(lambda: self._inside == 0 or self._fp32 == fp32)
            if self._inside == 0:
                self._fp32 = fp32
                self._exits.enter_context(_fp32_products(fp32))
                self._exits.enter_context(_attention_kernels())
            self._inside += 1
        try:
            yield
        finally:
            with self._left:
                self._inside -= 1
                if self._inside == 0:
                    self._exits.close()
                    self._left.notify_all()


_settings = _Settings()


@contextmanager
def _fp32_products(precision: str) -> Iterator[None]:
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # The process set its backends one by one.
        before = "highest"
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    found = {each: get(*each) for each in _MATMULS}
    # A setting that equals its backend's is read as inherited, so that it follows the backend on.
    inherited = {each for each in _MATMULS if found[each] == get(each[0], "all")}
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for each in _MATMULS:
            put(*each, "none" if each in inherited else found[each])


@contextmanager
def _attention_kernels() -> Iterator[None]:
    """Allow the kernels of `_ATTENTION`, in this order.

    As `sdpa_kernel` does, which cannot be left in another thread than the one that entered it, and
    does not put back the order of kernels that the caller has turned off.
    """
    cuda = torch.backends.cuda
    before = {name: getattr(cuda, f"{name}_sdp_enabled")() for name in _ENABLED}
    order = torch._C._get_sdp_priority_order()
    wanted = [kernel.value for kernel in _ATTENTION]
    for name, enabled in _ENABLED.items():
        getattr(cuda, f"enable_{name}_sdp")(enabled)
    torch._C._set_sdp_priority_order([*wanted, *(each for each in order if each not in wanted)])
    try:
        yield
    finally:
        for name, enabled in before.items():
            getattr(cuda, f"enable_{name}_sdp")(enabled)
        torch._C._set_sdp_priority_order(order)
