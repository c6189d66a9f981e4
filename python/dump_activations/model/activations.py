"""The registry of activation keys: each key's name, shape, and where it comes from.

A new key is one new entry in `BOARD_ACTIVATIONS` or `WEIGHT_ACTIVATIONS`.
Importing this module does not import torch, so that usage errors are quick.

Shape letters: B boards, L layers, S cells (16), H hidden size, Q query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dump_activations.board import CELLS, MOVES
from dump_activations.errors import (
    ActivationNotImplementedError,
    ActivationUnavailableError,
    InvalidArgumentError,
    option,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dump_activations.model.config import EncoderConfig
    from dump_activations.model.encoder import Encoder


def _unchanged(output: Tensor) -> Tensor:
    return output


@dataclass(frozen=True, kw_only=True)
class BoardActivation:
    """An activation with one value a board, captured from the outputs of modules.

    Attributes:
        key: the name users ask for and the tensor's name in the file.
        shape: config -> shape of one board's value.
        modules: config -> names of the modules to hook, as `named_modules()` names them. If there
            are several, the i-th fills index i of the value's first axis.
        stacked: whether the first axis runs over the modules.
        transform: module output -> what is stored of it.
    """

    key: str
    shape: Callable[[EncoderConfig], tuple[int, ...]]
    modules: Callable[[EncoderConfig], Sequence[str]]
    stacked: Callable[[EncoderConfig], bool]
    transform: Callable[[Tensor], Tensor] = _unchanged


@dataclass(frozen=True, kw_only=True)
class WeightActivation:
    """A key that dumps the model's own parameters, whatever the boards.

    Attributes:
        key: the name users ask for.
        tensors: model -> tensors by their names in the file.
    """

    key: str
    tensors: Callable[[Encoder], Mapping[str, Tensor]]


Activation = BoardActivation | WeightActivation


def _layer_hidden(key: str, module: str) -> BoardActivation:
    """Describe hidden states (B, L, S, H) taken from one module of every block."""
    return BoardActivation(
        key=key,
        shape=lambda config: (config.num_hidden_layers, CELLS, config.hidden_size),
        modules=lambda config: [
            f"blocks.{layer}{module}" for layer in range(config.num_hidden_layers)
        ],
        stacked=lambda _: True,
    )


def _head(key: str, transform: Callable[[Tensor], Tensor] = _unchanged) -> BoardActivation:
    """Describe head outputs: a linear a move for binned_ev, one for all for action_policy."""
    return BoardActivation(
        key=key,
        shape=lambda config: config.logits_shape,
        modules=lambda config: (
            [f"ev_heads.{move}" for move in range(MOVES)]
            if config.head_type == "binned_ev"
            else ["policy_head"]
        ),
        stacked=lambda config: config.head_type == "binned_ev",
        transform=transform,
    )


def _rmsnorm_gammas(model: Encoder) -> dict[str, Tensor]:
    from torch import nn

    return {
        f"rmsnorm_gammas/{name}": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.RMSNorm)
    }


def _attention_sinks(model: Encoder) -> dict[str, Tensor]:
    """Return the sink logits (L, Q) as the checkpoint stores them: by key/value head first."""
    import torch

    if not model.config.use_attention_sinks:
        raise ActivationUnavailableError(
            f"{option('outputs')}: attn_sinks: this model has no attention sinks; leave the key out"
        )
    return {
        "attn_sinks": torch.stack(
            [
                model.get_parameter(f"blocks.{layer}.attn.sinks")
                for layer in range(model.config.num_hidden_layers)
            ]
        )
    }


BOARD_ACTIVATIONS = (
    BoardActivation(
        key="final_hidden",
        shape=lambda config: (CELLS, config.hidden_size),
        modules=lambda _: ["final_ln"],
        stacked=lambda _: False,
    ),
    BoardActivation(
        key="pooled",
        shape=lambda config: (config.hidden_size,),
        modules=lambda _: ["final_ln"],
        stacked=lambda _: False,
        transform=lambda hidden_BSH: hidden_BSH.mean(dim=1),
    ),
    _head("head_logits"),
    _head("head_probs", lambda logits: logits.float().softmax(dim=-1)),
    _layer_hidden("layer_outputs", ""),
    _layer_hidden("attn_norm", ".attn_norm"),
    _layer_hidden("mlp_input", ".mlp_norm"),
)
WEIGHT_ACTIVATIONS = (
    WeightActivation(key="rmsnorm_gammas", tensors=_rmsnorm_gammas),
    WeightActivation(key="attn_sinks", tensors=_attention_sinks),
)
_NOT_IMPLEMENTED = ("attn_weights",)
_REGISTRY: dict[str, Activation] = {
    activation.key: activation for activation in (*BOARD_ACTIVATIONS, *WEIGHT_ACTIVATIONS)
}
ACTIVATION_KEYS = tuple(_REGISTRY)


def find_activations(keys: Sequence[str]) -> list[Activation]:
    """Return the registry's entries for the given keys, each once, in the registry's order.

    Raises:
        InvalidArgumentError: an unknown key, or none at all; the text lists the valid ones.
        ActivationNotImplementedError: a key that is reserved but not implemented.
    """
    for key in keys:
        if key in _NOT_IMPLEMENTED:
            raise ActivationNotImplementedError(f"{option('outputs')}: {key} is not implemented")
        if key not in _REGISTRY:
            raise InvalidArgumentError(
                f"{option('outputs')}: unknown key {key!r}; the keys are "
                f"{', '.join(ACTIVATION_KEYS)}"
            )
    if not keys:
        raise InvalidArgumentError(
            f"{option('outputs')}: no keys; choose from {', '.join(ACTIVATION_KEYS)}"
        )
    return [activation for key, activation in _REGISTRY.items() if key in keys]
