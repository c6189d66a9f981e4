"""The registry of activation keys, and the tensors that the requested keys become.

A new key is one new entry in `ACTIVATIONS`. This module does not import torch, so that a usage
error is reported quickly.

Shape letters: B boards, L layers, S cells (16), H hidden size, Q query heads, K key/value heads,
D size of a head, I inner size of the MLP, O the head's logits (one axis or two).
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any, Literal

from dump_activations.dtypes import CELLS, MOVES
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

Layers = str | Iterable[int | slice]
"""Text such as `0,3,-1,4:8`, or numbers and slices."""


def _unchanged(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True, kw_only=True)
class Activation:
    """A key of the registry.

    Attributes:
        key: the name that users request, and the tensor's name in the file.
        text: the content of the key, in a few words.
        alias: name of the TransformerLens hook for the same value, without its layer.
        shape: letters of one value's axes.
        per_layer: True where each layer has a value. They are stacked before the axes of `shape`.
        lacking: config -> reason why the model does not have the key; "" where it has.
    """

    key: str
    text: str
    alias: str = ""
    shape: str
    per_layer: bool = False
    lacking: Callable[[EncoderConfig], str] = lambda _: ""

    def shape_in(self, config: EncoderConfig) -> tuple[int, ...]:
        """Return the shape of one value: per board, and per layer where the key has layers."""
        if self.shape == "O":
            return config.logits_shape
        sizes = {
            "S": CELLS,
            "H": config.hidden_size,
            "Q": config.num_attention_heads,
            "K": config.kv_heads,
            "D": config.head_size,
            "I": config.intermediate_size,
        }
        return tuple(sizes[letter] for letter in self.shape)


@dataclass(frozen=True, kw_only=True)
class BoardActivation(Activation):
    """An activation with one value per board, captured at the input or the output of modules.

    Attributes:
        modules: config -> names of the modules to hook: inside a block where `per_layer`, else as
            in `named_modules()`. If there are several, the i-th fills index i of the first axis.
        at: where the value is captured.
        transform: the module's inputs, or its output -> the value to store.
    """

    modules: Callable[[EncoderConfig], Sequence[str]]
    at: Literal["input", "output"] = "output"
    transform: Callable[..., Tensor] = _unchanged

    def of_layer(self, layer: int) -> BoardActivation:
        """Return the activation of one layer alone, with the key `KEY.LAYER`."""
        return replace(
            self,
            key=f"{self.key}.{layer}",
            alias="",
            per_layer=False,
            modules=lambda config: [block_module(layer, *self.modules(config))],
        )


@dataclass(frozen=True, kw_only=True)
class WeightActivation(Activation):
    """A key for parameters of the model, which do not depend on the boards.

    Attributes:
        tensors: model, numbers of the requested layers -> tensors by their names in the file.
    """

    tensors: Callable[[Encoder, Sequence[int]], Mapping[str, Tensor]]


def _in_block(  # noqa: PLR0917 -- rows of a table
    at: Literal["input", "output"],
    key: str,
    module: str,
    text: str,
    alias: str = "",
    shape: str = "SH",
    transform: Callable[..., Tensor] = _unchanged,
) -> BoardActivation:
    """Describe the input or output of one module of every block; "" is the block itself."""
    return BoardActivation(
        key=key,
        text=text,
        alias=alias,
        shape=shape,
        per_layer=True,
        modules=lambda _: [module],
        at=at,
        transform=transform,
    )


_input = partial(_in_block, "input")
_output = partial(_in_block, "output")
_DOT = "attn.dot_product"  # its inputs are q_BSQD, k_BSKD, v_BSKD, sinks_Q


def _head(
    key: str, text: str, transform: Callable[[Tensor], Tensor] = _unchanged
) -> BoardActivation:
    """Describe head outputs: one linear per move for binned_ev, one in all for action_policy."""
    return BoardActivation(
        key=key,
        text=text,
        shape="O",
        modules=lambda config: (
            [f"ev_heads.{move}" for move in range(MOVES)]
            if config.head_type == "binned_ev"
            else ["policy_head"]
        ),
        lacking=lambda config: "this checkpoint has no head" if 0 in config.logits_shape else "",
        transform=transform,
    )


def _attention_scores(q_BSQD: Tensor, k_BSKD: Tensor, *_: Tensor | None) -> Tensor:
    from dump_activations.model.encoder import DotProduct

    return DotProduct.scores(q_BSQD, k_BSKD)


def _attention_pattern(
    q_BSQD: Tensor, k_BSKD: Tensor, _v_BSKD: Tensor, sinks_Q: Tensor | None
) -> Tensor:
    from dump_activations.model.encoder import DotProduct

    return DotProduct.pattern(q_BSQD, k_BSKD, sinks_Q)


def _rmsnorm_gammas(model: Encoder, _layers: Sequence[int]) -> dict[str, Tensor]:
    from torch import nn

    return {
        f"rmsnorm_gammas/{name}": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.RMSNorm)
    }


def _attention_sinks(model: Encoder, layers: Sequence[int]) -> dict[str, Tensor]:
    """Return the sink logits (L, Q) in the checkpoint's order: by key/value head first."""
    import torch

    sinks_LQ = torch.stack([model.get_parameter(f"blocks.{layer}.attn.sinks") for layer in layers])
    return {"attn_sinks": sinks_LQ}


ACTIVATIONS: tuple[Activation, ...] = (
    BoardActivation(
        key="final_hidden",
        text="output of the final RMSNorm",
        shape="SH",
        modules=lambda _: ["final_ln"],
    ),
    BoardActivation(
        key="pooled",
        text="mean of final_hidden over the cells",
        shape="H",
        modules=lambda _: ["final_ln"],
        transform=lambda hidden_BSH: hidden_BSH.mean(dim=1),
    ),
    _head("head_logits", "logits of the head, per move"),
    _head("head_probs", "softmax of head_logits", lambda logits: logits.float().softmax(dim=-1)),
    _input("resid_pre", "", "residual stream into the block", "hook_resid_pre"),
    _output("attn_norm", "attn_norm", "output of the attention norm"),
    _input("attn_q", _DOT, "queries, after the qk-norm", "attn.hook_q", "SQD", lambda q, *_: q),
    _input("attn_k", _DOT, "keys, after the qk-norm", "attn.hook_k", "SKD", lambda _q, k, *_: k),
    _input("attn_v", _DOT, "values", "attn.hook_v", "SKD", lambda _q, _k, v, _sinks: v),
    _input(
        *("attn_scores", _DOT, "scaled dot products, before the softmax"),
        *("attn.hook_attn_scores", "QSS", _attention_scores),
    ),
    _input(
        *("attn_pattern", _DOT, "attention weights, after the softmax"),
        *("attn.hook_pattern", "QSS", _attention_pattern),
    ),
    _output("attn_z", _DOT, "values weighted by the pattern, per head", "attn.hook_z", "SQD"),
    _output("attn_out", "attn", "output of the attention", "hook_attn_out"),
    _input("resid_mid", "mlp_norm", "residual stream between attention and MLP", "hook_resid_mid"),
    _output("mlp_input", "mlp_norm", "output of the MLP norm"),
    _output("mlp_pre", "mlp.w_gate", "gate of the MLP, before the SiLU", "mlp.hook_pre", "SI"),
    _output("mlp_pre_linear", "mlp.w_up", "linear branch of the MLP", "mlp.hook_pre_linear", "SI"),
    _input(
        "mlp_post", "mlp.w_down", "gate times linear branch, into w_down", "mlp.hook_post", "SI"
    ),
    _output("mlp_out", "mlp", "output of the MLP", "hook_mlp_out"),
    _output("layer_outputs", "", "residual stream out of the block", "hook_resid_post"),
    WeightActivation(
        key="rmsnorm_gammas", text="weights of every RMSNorm", shape="", tensors=_rmsnorm_gammas
    ),
    WeightActivation(
        key="attn_sinks",
        text="logits of the attention sinks",
        shape="Q",
        per_layer=True,
        lacking=lambda config: (
            "" if config.use_attention_sinks else "this model has no attention sinks"
        ),
        tensors=_attention_sinks,
    ),
)
_NOT_IMPLEMENTED = {"attn_weights": "attn_pattern"}
_GLOB_CHARACTERS = "*?["
_LAYER_ALIAS = re.compile(r"blocks\.(\d{1,4})\.(.+)")
_EMBEDDING_ALIAS = "hook_embed"


def find_activations(
    outputs: Sequence[str], config: EncoderConfig | None = None
) -> list[Activation]:
    """Return the requested activations, each once, in the registry's order.

    Args:
        outputs: keys, TransformerLens names with or without their layer, or globs.
        config: the model's. A glob leaves out keys that the model does not have.

    Raises:
        InvalidArgumentError: no keys, an unknown name, a glob without a match, or a key that is
            requested both whole and for one layer.
        ActivationNotImplementedError: a key that is reserved but not implemented.
        ActivationUnavailableError: a key requested by name that the model does not have.
    """
    if not outputs:
        raise InvalidArgumentError(f"{option('outputs')}: no keys; choose from {_all_keys()}")
    whole: set[str] = set()
    layered: dict[str, dict[int, str]] = defaultdict(dict)
    for name in outputs:
        alias, layer = split_layer_alias(name) or (name, None)
        if config is not None and layer is not None and layer >= config.num_hidden_layers:
            raise InvalidArgumentError(
                f"{option('outputs')}: {name}: the model has layers 0 to "
                f"{config.num_hidden_layers - 1}"
            )
        for activation in _matches(alias, config):
            if layer is None:
                whole.add(activation.key)
            else:
                layered[activation.key][layer] = name
    activations: list[Activation] = []
    for activation in ACTIVATIONS:
        names = layered[activation.key]
        if activation.key in whole and names:
            raise InvalidArgumentError(
                f"{option('outputs')}: {next(iter(names.values()))} is a layer of "
                f"{activation.key}, which is requested too; leave one of them out"
            )
        if activation.key in whole:
            activations.append(activation)
        elif isinstance(activation, BoardActivation):  # as all are that have an alias
            activations += map(activation.of_layer, sorted(names))
    return activations


def split_layer_alias(name: str) -> tuple[str, int] | None:
    """Split a TransformerLens name with a layer, `blocks.2.hook_resid_post`, into alias and layer.

    Returns:
        The alias and the number of the layer; None where the name is something else.
    """
    if name == _EMBEDDING_ALIAS:
        return "hook_resid_pre", 0
    match = _LAYER_ALIAS.fullmatch(name)
    if match is None or all(each.alias != match[2] for each in ACTIVATIONS):
        return None
    return match[2], int(match[1])


def _matches(name: str, config: EncoderConfig | None) -> list[Activation]:
    if name in _NOT_IMPLEMENTED:
        raise ActivationNotImplementedError(
            f"{option('outputs')}: {name} is not implemented; {_NOT_IMPLEMENTED[name]} holds the "
            "weights"
        )
    found = [
        each
        for each in ACTIVATIONS
        if fnmatchcase(each.key, name) or (each.alias and fnmatchcase(each.alias, name))
    ]
    lacking = {each.key: each.lacking(config) for each in found} if config is not None else {}
    if any(character in name for character in _GLOB_CHARACTERS):
        found = [each for each in found if not lacking.get(each.key)]
        if not found:
            raise InvalidArgumentError(
                f"{option('outputs')}: {name!r} matches no key; the keys are {_all_keys()}"
            )
        return found
    if not found:
        names = [known for each in ACTIVATIONS for known in (each.key, each.alias) if known]
        near = get_close_matches(name, names)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the keys are {_all_keys()}"
        raise InvalidArgumentError(f"{option('outputs')}: unknown key {name!r}; {hint}")
    for key, reason in lacking.items():
        if reason:
            raise ActivationUnavailableError(
                f"{option('outputs')}: {key}: {reason}; leave the key out"
            )
    return found


def _all_keys() -> str:
    return ", ".join(activation.key for activation in ACTIVATIONS)


def parse_layers(name: str, layers: Layers | None) -> tuple[int | slice, ...] | None:
    """Parse a choice of layers; None stands for all of them.

    Args:
        name: the option to name in errors.
        layers: the option's value.

    Raises:
        InvalidArgumentError: something else than numbers and slices, or nothing.
    """
    if layers is None:
        return None
    try:
        items = layers.split(",") if isinstance(layers, str) else layers
        parsed = tuple(map(_parse_item, items))
        if not parsed:
            raise ValueError("no layers")
    except (TypeError, ValueError):
        raise InvalidArgumentError(
            f"{option(name)} must be numbers and slices (without a step of 0) such as "
            f"{option(name, '0,3,-1,4:8')}; got {brief(layers)}"
        ) from None
    return parsed


def _parse_item(item: Any) -> int | slice:
    """Return a number or a slice; raise TypeError or ValueError for anything else."""
    if isinstance(item, str) and ":" in item:
        item = slice(*(int(text) if text.strip() else None for text in item.split(":")))
    if isinstance(item, slice):
        item.indices(0)  # raises for a step of 0 and bounds that are not integers
        return item
    return int(item) if isinstance(item, str) else operator.index(item)


def find_layers(layers: Layers | None, count: int) -> tuple[int, ...]:
    """Return the numbers of the chosen layers among `count`, each once and ascending.

    Raises:
        InvalidArgumentError: a layer that the model does not have, or slices that select none.
    """
    numbers = range(count)
    found: set[int] = set()
    for item in parse_layers("layers", layers) or [slice(None)]:
        if isinstance(item, slice):
            found.update(numbers[item])
        elif -count <= item < count:
            found.add(numbers[item])
        else:
            raise InvalidArgumentError(
                f"{option('layers')}: no layer {item}: the model has {count}, 0 to {count - 1}"
            )
    if not found:
        raise InvalidArgumentError(
            f"{option('layers')}: the slices select none of the {count} layers"
        )
    return tuple(sorted(found))


@dataclass(frozen=True)
class BoardTensor:
    """A tensor with one value per board.

    Attributes:
        name: the tensor's name in the file.
        activation: the activation to capture.
        shape: shape of one board's value.
        modules: the modules to hook, as `named_modules()` names them.
        stacked: True where the i-th module fills index i of the value's first axis. Otherwise
            there is one module, which fills the whole value.
    """

    name: str
    activation: BoardActivation
    shape: tuple[int, ...]
    modules: tuple[str, ...]
    stacked: bool


def board_tensors(
    activation: BoardActivation, config: EncoderConfig, *, layers: Sequence[int], split: bool
) -> list[BoardTensor]:
    """Return the tensors of one activation.

    Args:
        activation: the activation to capture.
        config: the model's.
        layers: numbers of the chosen layers.
        split: True for one tensor per layer, `KEY.LAYER`; False for one with all layers stacked.
    """
    key, shape = activation.key, activation.shape_in(config)
    inner = tuple(activation.modules(config))
    if not activation.per_layer:
        return [BoardTensor(key, activation, shape, inner, stacked=len(inner) > 1)]
    names = [block_module(layer, inner[0]) for layer in layers]
    if split:
        return [
            BoardTensor(f"{key}.{layer}", activation, shape, (name,), stacked=False)
            for layer, name in zip(layers, names, strict=True)
        ]
    return [BoardTensor(key, activation, (len(layers), *shape), tuple(names), stacked=True)]


def block_module(layer: int, inner: str) -> str:
    """Return the full name of a module inside a block; "" is the block itself."""
    return f"blocks.{layer}.{inner}".rstrip(".")
