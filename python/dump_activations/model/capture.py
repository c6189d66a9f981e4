"""Hooks that store activations straight into preallocated batch buffers, eager or compiled.

Shape letters: B boards in a batch, S cells (16), H hidden size.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from dump_activations.errors import ActivationUnavailableError
from dump_activations.model.activations import BoardTensor
from dump_activations.model.encoder import Encoder


class _AllCaptured(Exception):  # noqa: N818 -- it ends the forward early, without an error
    """Raised after the last value that a forward needs, so that nothing after it runs."""


class _Pass(threading.local):
    """State of the forward pass that the current thread runs."""

    def __init__(self) -> None:
        # Blocks run by their modules, by their graphs, or to record a graph.
        self.mode: Literal["eager", "compiled", "recording"] = "eager"
        # The place of each value, by the number of its hook; empty outside of a pass.
        self.targets: Mapping[int, Tensor] = {}
        self.ran: set[int] = set()  # numbers of hooks


class Capture:
    """Hooks for a set of tensors on one model, as a context manager.

    Inside the context, `run` is a forward pass that fills buffers and stops as soon as all of
    them are full. Each hook is one copy that casts and places: nothing is kept or stacked. Several
    threads may run passes at once.

    A compiled pass runs each block as a graph that takes the block's weights and the places of its
    values as inputs. Layers with equal graphs share one compiled graph, which computes and stores
    in the same kernels. Batches of `compiled_rows` boards run compiled. Others, which would each
    compile again, run eagerly.
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
        self._graphs: dict[str, Callable[..., Tensor]] = {}
        self._graph_of: dict[nn.Module, Callable[..., Tensor]] = {}
        self._is_checked = False
        self._now = _Pass()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for number, (tensor, i) in enumerate(self._hooked):
            module = self._model.get_submodule(tensor.modules[i])
            self._handles.append(self._hook(module, tensor, i, number))
        if self._compiled_rows is not None:
            for name, block in self._model.blocks.named_children():
                within = f"blocks.{name}."
                numbers = [
                    number
                    for number, (tensor, i) in enumerate(self._hooked)
                    if f"{tensor.modules[i]}.".startswith(within)
                ]
                # As `Module.compile` does: calls of the block lead here.
                block._compiled_call_impl = partial(self._call_block, block, numbers)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for block in self._model.blocks if self._compiled_rows is not None else ():
            block._compiled_call_impl = None
        self._graphs.clear()
        self._graph_of.clear()

    def run(self, tokens_BS: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """Run the model on a batch, as far as needed, and fill the buffers.

        `tokens_BS` are exponents (B, 16), of any integer dtype, on the model's device; `buffers`
        are one (B, *shape) of any floating dtype for each tensor's name.
        """
        if not self._hooked:
            return
        self._now.targets = {
            number: buffers[tensor.name][:, i] if tensor.stacked else buffers[tensor.name]
            for number, (tensor, i) in enumerate(self._hooked)
        }
        compiled = len(tokens_BS) == self._compiled_rows
        try:
            if not self._is_checked or not compiled:
                self._forward(tokens_BS)
            if compiled:
                self._now.mode = "compiled"
                self._forward(tokens_BS)
        finally:
            self._now.mode, self._now.targets = "eager", {}

    def _forward(self, tokens_BS: Tensor) -> None:
        self._now.ran = set()
        try:
            self._model(tokens_BS)
        except _AllCaptured:
            return
        for number, (tensor, i) in enumerate(self._hooked):
            if number not in self._now.ran:
                raise _misrun(tensor, i, "does not run")
        self._is_checked = True

    def _hook(self, module: nn.Module, tensor: BoardTensor, i: int, number: int) -> RemovableHandle:
        def store(module: nn.Module, *values: Tensor) -> None:
            # The model may run for others at the same time: for the consumer, or for another run.
            if number not in self._now.targets:
                return
            self._now.targets[number].copy_(tensor.activation.transform(module, *values))
            if self._now.mode == "recording":
                return
            if number in self._now.ran:
                raise _misrun(tensor, i, "runs more than once")
            self._note([number])

        if tensor.activation.at == "input":
            return module.register_forward_pre_hook(lambda module, inputs: store(module, *inputs))
        return module.register_forward_hook(lambda module, _inputs, output: store(module, output))

    def _note(self, numbers: Sequence[int]) -> None:
        """Note hooks that have run, and end the pass after the last."""
        self._now.ran.update(numbers)
        # The first pass runs to the end, so that a module that runs again is noticed.
        if self._is_checked and len(self._now.ran) == len(self._hooked):
            raise _AllCaptured

    def _call_block(self, block: nn.Module, numbers: Sequence[int], x_BSH: Tensor) -> Tensor:
        if self._now.mode != "compiled":
            out_BSH: Tensor = block._call_impl(x_BSH)
            return out_BSH
        weights = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        targets = {number: self._now.targets[number] for number in numbers}
        if block not in self._graph_of:
            self._graph_of[block] = self._record(block, x_BSH, targets, weights)
        out_BSH = self._graph_of[block](x_BSH, *targets.values(), *weights.values())
        self._note(numbers)
        return out_BSH

    def _record(
        self,
        block: nn.Module,
        x_BSH: Tensor,
        targets: Mapping[int, Tensor],
        weights: Mapping[str, Tensor],
    ) -> Callable[..., Tensor]:
        """Record what a block computes and stores, and compile it once for all that do the same."""
        from torch.fx.experimental.proxy_tensor import make_fx

        def step(x_BSH: Tensor, *others: Tensor) -> Tensor:
            self._now.targets = dict(zip(targets, others, strict=False))
            named = dict(zip(weights, others[len(targets) :], strict=True))
            out_BSH: Tensor = functional_call(block, named, (x_BSH,))
            return out_BSH

        before = self._now.targets
        self._now.mode = "recording"
        try:
            graph = make_fx(step)(x_BSH, *targets.values(), *weights.values())
        finally:
            self._now.mode, self._now.targets = "compiled", before
        # A graph with constants of its own belongs to this block alone.
        is_shared = all(node.op != "get_attr" for node in graph.graph.nodes)
        key = graph.code if is_shared else str(id(block))
        if key not in self._graphs:
            self._graphs[key] = torch.compile(graph, fullgraph=True, dynamic=False)
        return self._graphs[key]


def _misrun(tensor: BoardTensor, i: int, fault: str) -> ActivationUnavailableError:
    return ActivationUnavailableError(
        f"{tensor.name}: the model's {tensor.modules[i]} {fault} in a forward pass; leave the key "
        "out, or give a model that runs it once"
    )
