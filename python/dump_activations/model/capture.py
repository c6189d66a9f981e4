"""Hooks that store activations straight into preallocated batch buffers.

Shape letters: B boards in a batch, S cells (16).
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dump_activations.errors import ActivationUnavailableError
from dump_activations.model.activations import BoardTensor
from dump_activations.model.encoder import Encoder


class _AllCaptured(Exception):  # noqa: N818 -- it ends the forward early, without an error
    """Raised by the last hook that a forward needs, so that nothing after it runs."""


class _Pass(threading.local):
    """State of the forward pass that the current thread runs.

    Attributes:
        buffers: targets by tensor name; empty outside of a pass.
        ran: indices of the hooks that have run.
    """

    def __init__(self) -> None:
        self.buffers: Mapping[str, Tensor] = {}
        self.ran: set[int] = set()


class Capture:
    """Hooks for a set of tensors on one model, as a context manager.

    Inside the context, `run` is a forward pass that fills buffers and stops as soon as all of
    them are full. Each hook is one copy that casts and places: nothing is kept or stacked. Several
    threads may run passes at once.

    Args:
        model: the model to hook.
        tensors: the tensors to capture.
        compiled_rows: number of boards in the batches that run through `torch.compile`. Batches of
            another length, which would each compile again, run eagerly. None compiles nothing.
    """

    def __init__(
        self,
        model: Encoder,
        tensors: Sequence[BoardTensor],
        *,
        compiled_rows: int | None = None,
    ) -> None:
        self._model = model
        self._hooked = [(each, i) for each in tensors for i in range(len(each.modules))]
        self._compiled_rows = compiled_rows
        if compiled_rows is not None:
            self._compiled = torch.compile(self._forward, fullgraph=True, dynamic=False)
        self._is_checked = False
        self._now = _Pass()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for number, (tensor, i) in enumerate(self._hooked):
            module = self._model.get_submodule(tensor.modules[i])
            self._handles.append(self._hook(module, tensor, i, number))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._compiled_rows is not None:
            # torch keeps what it compiled with the function's code, and refuses a ninth variant.
            torch._dynamo.reset_code(Capture._forward.__code__)  # type: ignore[attr-defined]

    def run(self, tokens_BS: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """Run the model on a batch, as far as needed, and fill the buffers.

        Args:
            tokens_BS: exponents (B, 16), any integer dtype, on the model's device.
            buffers: for each tensor's name, one (B, *shape) of any floating dtype.

        Raises:
            ActivationUnavailableError: the forward skips a hooked module, or runs one twice.
        """
        if not self._hooked:
            return
        self._now.buffers = buffers
        try:
            if not self._is_checked or len(tokens_BS) != self._compiled_rows:
                self._run_eagerly(tokens_BS)
            if len(tokens_BS) == self._compiled_rows:
                self._compiled(tokens_BS)
        finally:
            self._now.buffers = {}

    def _run_eagerly(self, tokens_BS: Tensor) -> None:
        self._now.ran = set()
        try:
            self._forward(tokens_BS)
        except _AllCaptured:
            return
        for number, (tensor, i) in enumerate(self._hooked):
            if number not in self._now.ran:
                raise _misrun(tensor, i, "does not run")
        self._is_checked = True

    def _forward(self, tokens_BS: Tensor) -> None:
        self._model(tokens_BS)

    def _hook(self, module: nn.Module, tensor: BoardTensor, i: int, number: int) -> RemovableHandle:
        def store(module: nn.Module, *values: Tensor) -> None:
            # The model may run for others at the same time: for the consumer, or for another run.
            if tensor.name not in self._now.buffers:
                return
            buffer = self._now.buffers[tensor.name]
            target = buffer[:, i] if tensor.stacked else buffer
            target.copy_(tensor.activation.transform(module, *values))
            # A compiled forward computes only what the buffers need, and cannot raise.
            if torch.compiler.is_compiling():
                return
            if number in self._now.ran:
                raise _misrun(tensor, i, "runs more than once")
            self._now.ran.add(number)
            # The first pass runs to the end, so that a module that runs again is noticed.
            if self._is_checked and len(self._now.ran) == len(self._hooked):
                raise _AllCaptured

        if tensor.activation.at == "input":
            return module.register_forward_pre_hook(lambda module, inputs: store(module, *inputs))
        return module.register_forward_hook(lambda module, _inputs, output: store(module, output))


def _misrun(tensor: BoardTensor, i: int, fault: str) -> ActivationUnavailableError:
    return ActivationUnavailableError(
        f"{tensor.name}: the model's {tensor.modules[i]} {fault} in a forward pass; leave the key "
        "out, or give a model that runs it once"
    )
