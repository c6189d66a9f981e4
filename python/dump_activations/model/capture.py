"""Forward hooks that store activations straight into preallocated batch buffers.

Shape letters: B boards in a batch, S cells (16).
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dump_activations.model.activations import BoardActivation
from dump_activations.model.encoder import Encoder


class _AllCaptured(Exception):  # noqa: N818 -- ends the forward early, it is no error
    """Raised from the last hook that a forward needs: nothing after it is run."""


class _Pass(threading.local):
    """What the hooks need to know of the forward pass that their thread is running."""

    def __init__(self) -> None:
        self.buffers: Mapping[str, Tensor] = {}
        self.hooks_left = 0


class Capture:
    """Hooks for a set of activations on one model, as a context manager.

    Inside the context, `run` is a forward pass that fills buffers and stops as soon as all of
    them are full. Each hook is one copy that casts and places: nothing is kept or stacked. Several
    threads may run passes at once.

    Args:
        model: the model to hook.
        activations: what to capture.
        compiled_rows: number of boards in the batches to run through `torch.compile`; batches of
            any other length, which would each compile anew, run as they are. None compiles nothing.
    """

    def __init__(
        self,
        model: Encoder,
        activations: Sequence[BoardActivation],
        *,
        compiled_rows: int | None = None,
    ) -> None:
        self._model = model
        self._activations = activations
        self._compiled_rows = compiled_rows
        if compiled_rows is not None:
            self._compiled = torch.compile(self._forward, fullgraph=True, dynamic=False)
        self._hook_count = 0
        self._now = _Pass()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for activation in self._activations:
            stacked = activation.stacked(self._model.config)
            for i, name in enumerate(activation.modules(self._model.config)):
                hook = self._hook(activation, i if stacked else None)
                self._handles.append(self._model.get_submodule(name).register_forward_hook(hook))
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
            buffers: for each activation's key, a tensor (B, *shape) of any floating dtype.
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

    def _hook(self, activation: BoardActivation, index: int | None) -> Any:
        def store(_module: nn.Module, _args: object, output: Tensor) -> None:
            # The model may be run by others meanwhile: by the consumer, or for another run.
            if activation.key not in self._now.buffers:
                return
            buffer = self._now.buffers[activation.key]
            target = buffer if index is None else buffer[:, index]
            target.copy_(activation.transform(output))
            # A compiled forward computes only what the buffers need, and cannot raise.
            if not torch.compiler.is_compiling():
                self._now.hooks_left -= 1
                if self._now.hooks_left == 0:
                    raise _AllCaptured

        return store
