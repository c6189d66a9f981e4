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
from dataclasses import KW_ONLY, dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any, Literal

from dump_activations.dtypes import CELLS
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

Layers = str | int | slice | Iterable[int | slice]
"""Text such as `0,3,-1,4:8`, a number or a slice, or several of them."""


def _first(_module: object, value: Tensor, *_: object) -> Tensor:
    return value


@dataclass(frozen=True)
class Activation:
    """A key of the registry."""

    key: str  # the name that users request, and the tensor's in the file
    text: str  # the content, in a few words
    alias: str = ""  # name of the TransformerLens hook for the same value, without its layer
    shape: str = "SH"  # letters of one value's axes
    _: KW_ONLY
    per_layer: bool = True  # stacked before the axes of `shape`
    # The reason why the model does not have the key; "" where it has.
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


@dataclass(frozen=True)
class BoardActivation(Activation):
    """An activation with one value per board, captured at the input or the output of a module."""

    module: str = ""  # Inside a block where `per_layer`, else as `get_submodule` takes it.
    # The module, and its inputs or its output -> the value to store.
    transform: Callable[..., Tensor] = _first
    _: KW_ONLY
    at: Literal["input", "output"]

    def of_layer(self, layer: int) -> BoardActivation:
        """Return the activation of one layer alone, with the key `KEY.LAYER`."""
        module = f"blocks.{layer}.{self.module}".rstrip(".")
        key = f"{self.key}.{layer}"
        return replace(self, key=key, alias="", per_layer=False, module=module)


@dataclass(frozen=True)
class WeightActivation(Activation):
    """A key for parameters of the model, which do not depend on the boards."""

    _: KW_ONLY
    # Model, numbers of the requested layers -> tensors by their names in the file.
    tensors: Callable[[Encoder, Sequence[int]], Mapping[str, Tensor]]


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


_input = partial(BoardActivation, at="input")
_output = partial(BoardActivation, at="output")
_final = partial(_output, module="final_ln", per_layer=False)
_head = partial(
    _output,
    shape="O",
    module="head",
    per_layer=False,
    lacking=lambda config: "this checkpoint has no head" if 0 in config.logits_shape else "",
)
# Inputs of the dot product are q_BSQD, k_BSKD, v_BSKD and sinks_Q.
_into_dot = partial(_input, module="attn.dot_product")

ACTIVATIONS: tuple[Activation, ...] = (
    _final("final_hidden", "output of the final RMSNorm"),
    _final(
        "pooled",
        "mean of final_hidden over the cells",
        shape="H",
        transform=lambda _, hidden_BSH: hidden_BSH.mean(dim=1),
    ),
    _head("head_logits", "logits of the head, per move"),
    _head(
        "head_probs",
        "softmax of head_logits",
        transform=lambda _, logits: logits.float().softmax(dim=-1),
    ),
    _input("resid_pre", "residual stream into the block", "hook_resid_pre"),
    _output("attn_norm", "output of the attention norm", module="attn_norm"),
    _into_dot("attn_q", "queries, after the qk-norm", "attn.hook_q", "SQD"),
    _into_dot(
        *("attn_k", "keys, after the qk-norm", "attn.hook_k", "SKD"),
        transform=lambda _, *inputs: inputs[1],
    ),
    _into_dot(*("attn_v", "values", "attn.hook_v", "SKD"), transform=lambda _, *inputs: inputs[2]),
    _into_dot(
        *("attn_scores", "scaled dot products, before the softmax"),
        *("attn.hook_attn_scores", "QSS"),
        transform=lambda dot_product, *inputs: dot_product.scores(*inputs[:2]),
    ),
    _into_dot(
        *("attn_pattern", "attention weights, after the softmax", "attn.hook_pattern", "QSS"),
        transform=lambda dot_product, q, k, _v, sinks: dot_product.pattern(q, k, sinks),
    ),
    _output(
        *("attn_z", "values weighted by the pattern, per head", "attn.hook_z", "SQD"),
        module="attn.dot_product",
    ),
    _output("attn_out", "output of the attention", "hook_attn_out", module="attn"),
    _input(
        *("resid_mid", "residual stream between attention and MLP", "hook_resid_mid"),
        module="mlp_norm",
    ),
    _output("mlp_input", "output of the MLP norm", module="mlp_norm"),
    _output("mlp_pre", "gate of the MLP, before the SiLU", "mlp.hook_pre", "SI", "mlp.w_gate"),
    _output("mlp_pre_linear", "linear branch of the MLP", "mlp.hook_pre_linear", "SI", "mlp.w_up"),
    _input(
        *("mlp_post", "gate times linear branch, into w_down", "mlp.hook_post", "SI"),
        module="mlp.w_down",
    ),
    _output("mlp_out", "output of the MLP", "hook_mlp_out", module="mlp"),
    _output("layer_outputs", "residual stream out of the block", "hook_resid_post"),
    WeightActivation(
        *("rmsnorm_gammas", "weights of every RMSNorm", "", ""),
        per_layer=False,
        tensors=_rmsnorm_gammas,
    ),
    WeightActivation(
        *("attn_sinks", "logits of the attention sinks", "", "Q"),
        lacking=lambda config: (
            "" if config.use_attention_sinks else "this model has no attention sinks"
        ),
        tensors=_attention_sinks,
    ),
)
_NOT_IMPLEMENTED = {"attn_weights": "attn_pattern"}
_LAYER_ALIAS = re.compile(r"blocks\.(\d{1,4})\.(.+)")


def find_activations(
    outputs: Sequence[str], config: EncoderConfig | None = None
) -> list[Activation]:
    """Return the requested activations, each once, in the registry's order.

    `outputs` are keys, TransformerLens names with or without their layer, or globs. A glob leaves
    out keys that the model does not have. A key that is named must be one of the model's.
    """
    if not outputs:
        raise InvalidArgumentError(f"{option('outputs')}: no keys; choose from {_all_keys()}")
    # By key, and by layer or None for the whole key: the name that asks for it.
    asked: dict[str, dict[int | None, str]] = defaultdict(dict)
    for name in outputs:
        alias, layer = split_layer_alias(name) or (name, None)
        if config is not None and layer is not None and layer >= config.num_hidden_layers:
            raise InvalidArgumentError(
                f"{option('outputs')}: {name}: the model has layers 0 to "
                f"{config.num_hidden_layers - 1}"
            )
        for activation in _matches(alias, config):
            asked[activation.key][layer] = name
    found: list[Activation] = []
    for activation in ACTIVATIONS:
        names = asked[activation.key]
        layers = sorted(layer for layer in names if layer is not None)
        if None in names and layers:
            raise InvalidArgumentError(
                f"{option('outputs')}: {names[layers[0]]} is a layer of {activation.key}, which is "
                "requested too; leave one of them out"
            )
        if None in names:
            found.append(activation)
        elif isinstance(activation, BoardActivation):  # as all are that have an alias
            found += map(activation.of_layer, layers)
    return found


def split_layer_alias(name: str) -> tuple[str, int] | None:
    """Split `blocks.2.hook_resid_post` into alias and layer; None for names of other forms."""
    if name == "hook_embed":
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
    reasons = {} if config is None else {each.key: each.lacking(config) for each in found}
    is_glob = any(character in name for character in "*?[")
    if is_glob:
        found = [each for each in found if not reasons.get(each.key)]
    if not found:
        names = [known for each in ACTIVATIONS for known in (each.key, each.alias) if known]
        near = [] if is_glob else get_close_matches(name, names)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the keys are {_all_keys()}"
        problem = f"{name!r} matches no key" if is_glob else f"unknown key {name!r}"
        raise InvalidArgumentError(f"{option('outputs')}: {problem}; {hint}")
    for each in found:
        if reason := reasons.get(each.key):
            raise ActivationUnavailableError(
                f"{option('outputs')}: {each.key}: {reason}; leave the key out"
            )
    return found


def _all_keys() -> str:
    return ", ".join(activation.key for activation in ACTIVATIONS)


def parse_layers(name: str, layers: Layers | None) -> tuple[int | slice, ...] | None:
    """Parse the value of an option that chooses layers; None stands for all of them."""
    if layers is None:
        return None
    try:
        items = layers.split(",") if isinstance(layers, str) else layers
        if not isinstance(items, Iterable):
            items = (items,)
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
    """Return the numbers of the chosen layers among `count`, each once and ascending."""
    numbers, found = range(count), set[int]()
    for item in parse_layers("layers", layers) or [slice(None)]:
        if isinstance(item, int) and not -count <= item < count:
            raise InvalidArgumentError(
                f"{option('layers')}: no layer {item}: the model has {count}, 0 to {count - 1}"
            )
        found.update(numbers[item] if isinstance(item, slice) else [numbers[item]])
    if not found:
        raise InvalidArgumentError(
            f"{option('layers')}: the slices select none of the {count} layers"
        )
    return tuple(sorted(found))


@dataclass(frozen=True)
class BoardTensor:
    """A tensor with one value per board."""

    name: str  # the tensor's in the file
    activation: BoardActivation
    shape: tuple[int, ...]  # of one board's value
    modules: tuple[str, ...]  # to hook, as `named_modules()` names them
    stacked: bool  # The i-th module fills index i of the first axis. Else one module fills all.


def board_tensors(
    activation: BoardActivation, config: EncoderConfig, *, layers: Sequence[int], split: bool
) -> list[BoardTensor]:
    """Return the tensors of one activation: of the chosen layers stacked, or one for each."""
    key, shape = activation.key, activation.shape_in(config)
    if not activation.per_layer:
        return [BoardTensor(key, activation, shape, (activation.module,), stacked=False)]
    layered = [activation.of_layer(layer) for layer in layers]
    if split:
        return [
            BoardTensor(each.key, each, shape, (each.module,), stacked=False) for each in layered
        ]
    modules = tuple(each.module for each in layered)
    return [BoardTensor(key, activation, (len(layers), *shape), modules, stacked=True)]
