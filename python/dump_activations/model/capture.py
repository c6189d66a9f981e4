"""Hooks that store activations straight into preallocated batch buffers.

Shape letters: B boards in a batch, S cells (16).
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dump_activations.model.board_tensors import BoardTensor
from dump_activations.model.encoder import Encoder


class _AllCaptured(Exception):  # noqa: N818 -- ends the forward early, it is no error
    """Raised from the last hook that a forward needs: nothing after it is run."""


class _Pass(threading.local):
    """What the hooks need to know of the forward pass that their thread is running."""

    def __init__(self) -> None:
        self.buffers: Mapping[str, Tensor] = {}
        self.hooks_left = 0


class Capture:
    """Hooks for a set of tensors on one model, as a context manager.

    Inside the context, `run` is a forward pass that fills buffers and stops as soon as all of
    them are full. Each hook is one copy that casts and places: nothing is kept or stacked. Several
    threads may run passes at once.

    Args:
        model: the model to hook.
        tensors: what to capture.
        compiled_rows: number of boards in the batches to run through `torch.compile`; batches of
            any other length, which would each compile anew, run as they are. None compiles nothing.
    """

    def __init__(
        self,
        model: Encoder,
        tensors: Sequence[BoardTensor],
        *,
        compiled_rows: int | None = None,
    ) -> None:
        self._model = model
        self._tensors = tensors
        self._compiled_rows = compiled_rows
        if compiled_rows is not None:
            self._compiled = torch.compile(self._forward, fullgraph=True, dynamic=False)
        self._hook_count = 0
        self._now = _Pass()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for tensor in self._tensors:
            for i, name in enumerate(tensor.modules):
                module = self._model.get_submodule(name)
                self._handles.append(self._hook(module, tensor, i if tensor.stacked else None))
        self._hook_count = len(self._handles)
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
        """
        if self._hook_count == 0:
            return
        self._now.buffers = buffers
        self._now.hooks_left = self._hook_count
        try:
            if len(tokens_BS) == self._compiled_rows:
                self._compiled(tokens_BS)
            else:
                self._forward(tokens_BS)
        except _AllCaptured:
            pass
        finally:
            self._now.buffers = {}

    def _forward(self, tokens_BS: Tensor) -> None:
        self._model(tokens_BS)

    def _hook(self, module: nn.Module, tensor: BoardTensor, index: int | None) -> RemovableHandle:
        def store(*values: Tensor) -> None:
            # The model may be run by others meanwhile: by the consumer, or for another run.
            if tensor.name not in self._now.buffers:
                return
            buffer = self._now.buffers[tensor.name]
            target = buffer if index is None else buffer[:, index]
            target.copy_(tensor.activation.transform(*values))
            # A compiled forward computes only what the buffers need, and cannot raise.
            if not torch.compiler.is_compiling():
                self._now.hooks_left -= 1
                if self._now.hooks_left == 0:
                    raise _AllCaptured

        if tensor.activation.at == "input":
            return module.register_forward_pre_hook(lambda _module, inputs: store(*inputs))
        return module.register_forward_hook(lambda _module, _inputs, output: store(output))
