"""The registry of activation keys: each key's name, shape, and where it comes from.

A new key is one new entry in `ACTIVATIONS`. Importing this module does not import torch, so that
usage errors are quick.

Shape letters: B boards, L layers, S cells (16), H hidden size, Q query heads, K key/value heads,
D size of a head, I inner size of the MLP, O the head's logits (one axis or two).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

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


def _unchanged(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True, kw_only=True)
class Activation:
    """A key of the registry.

    Attributes:
        key: the name users ask for and the tensor's name in the file.
        text: what the key holds, in a few words.
        alias: the TransformerLens hook, without its layer, that holds the same.
        shape: letters of one value's axes.
        per_layer: whether there is a value a layer, stacked before the axes of `shape`.
        lacking: config -> why a model does not have it; empty if it has.
    """

    key: str
    text: str
    alias: str = ""
    shape: str
    per_layer: bool = False
    lacking: Callable[[EncoderConfig], str] = lambda _: ""

    def shape_in(self, config: EncoderConfig) -> tuple[int, ...]:
        """Return one value's shape: of a board, or of a layer of one where there are layers."""
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
    """An activation with one value a board, captured where values enter or leave modules.

    Attributes:
        modules: config -> names of the modules to hook: in a block where `per_layer`, else as
            `named_modules()` names them. If there are several, the i-th fills index i of the
            value's first axis.
        at: whether the modules' inputs are captured or their output.
        transform: the inputs or the output -> what is stored of them.
    """

    modules: Callable[[EncoderConfig], Sequence[str]]
    at: Literal["input", "output"] = "output"
    transform: Callable[..., Tensor] = _unchanged


@dataclass(frozen=True, kw_only=True)
class WeightActivation(Activation):
    """A key that dumps the model's own parameters, whatever the boards.

    Attributes:
        tensors: model, numbers of the wanted layers -> tensors by their names in the file.
    """

    tensors: Callable[[Encoder, Sequence[int]], Mapping[str, Tensor]]


def _in_block(
    key: str,
    text: str,
    at: Literal["input", "output"],
    module: str,
    shape: str = "SH",
    *,
    alias: str = "",
    transform: Callable[..., Tensor] = _unchanged,
) -> BoardActivation:
    """Describe what enters or leaves one module of every block; "" is the block itself."""
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


def _head(
    key: str, text: str, transform: Callable[[Tensor], Tensor] = _unchanged
) -> BoardActivation:
    """Describe head outputs: a linear a move for binned_ev, one for all for action_policy."""
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
    """Return the sink logits (L, Q) as the checkpoint stores them: by key/value head first."""
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
    _in_block("resid_pre", "residual stream into the block", "input", "", alias="hook_resid_pre"),
    _in_block("attn_norm", "output of the attention norm", "output", "attn_norm"),
    _in_block(
        "attn_q",
        "queries, after the qk-norm",
        "input",
        "attn.dot_product",
        "SQD",
        alias="attn.hook_q",
        transform=lambda q_BSQD, _k, _v, _sinks: q_BSQD,
    ),
    _in_block(
        "attn_k",
        "keys, after the qk-norm",
        "input",
        "attn.dot_product",
        "SKD",
        alias="attn.hook_k",
        transform=lambda _q, k_BSKD, _v, _sinks: k_BSKD,
    ),
    _in_block(
        "attn_v",
        "values",
        "input",
        "attn.dot_product",
        "SKD",
        alias="attn.hook_v",
        transform=lambda _q, _k, v_BSKD, _sinks: v_BSKD,
    ),
    _in_block(
        "attn_scores",
        "scaled dot products, before the softmax",
        "input",
        "attn.dot_product",
        "QSS",
        alias="attn.hook_attn_scores",
        transform=_attention_scores,
    ),
    _in_block(
        "attn_pattern",
        "attention weights, after the softmax",
        "input",
        "attn.dot_product",
        "QSS",
        alias="attn.hook_pattern",
        transform=_attention_pattern,
    ),
    _in_block(
        "attn_z",
        "values weighted by the pattern, per head",
        "output",
        "attn.dot_product",
        "SQD",
        alias="attn.hook_z",
    ),
    _in_block("attn_out", "output of the attention", "output", "attn", alias="hook_attn_out"),
    _in_block(
        "resid_mid",
        "residual stream between attention and MLP",
        "input",
        "mlp_norm",
        alias="hook_resid_mid",
    ),
    _in_block("mlp_input", "output of the MLP norm", "output", "mlp_norm"),
    _in_block(
        "mlp_pre",
        "gate of the MLP, before the SiLU",
        "output",
        "mlp.w_gate",
        "SI",
        alias="mlp.hook_pre",
    ),
    _in_block(
        "mlp_pre_linear",
        "linear branch of the MLP",
        "output",
        "mlp.w_up",
        "SI",
        alias="mlp.hook_pre_linear",
    ),
    _in_block(
        "mlp_post",
        "gate times linear branch, into w_down",
        "input",
        "mlp.w_down",
        "SI",
        alias="mlp.hook_post",
    ),
    _in_block("mlp_out", "output of the MLP", "output", "mlp", alias="hook_mlp_out"),
    _in_block(
        "layer_outputs", "residual stream out of the block", "output", "", alias="hook_resid_post"
    ),
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


def find_activations(
    outputs: Sequence[str], config: EncoderConfig | None = None
) -> list[Activation]:
    """Return the registry's entries for what was asked for, each once, in the registry's order.

    Args:
        outputs: keys, TransformerLens names, or globs of either.
        config: of the model that is to give them. A glob leaves out what it does not have.

    Raises:
        InvalidArgumentError: nothing asked for, a name that is none, or a glob of nothing.
        ActivationNotImplementedError: a key that is reserved but not implemented.
        ActivationUnavailableError: a key asked for by name that the model does not have.
    """
    if not outputs:
        raise InvalidArgumentError(f"{option('outputs')}: no keys; choose from {_all_keys()}")
    found = {activation.key for name in outputs for activation in _matches(name, config)}
    return [activation for activation in ACTIVATIONS if activation.key in found]


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
        raise InvalidArgumentError(f"{option('outputs')}: unknown key {name!r}; {_nearest(name)}")
    for key, reason in lacking.items():
        if reason:
            raise ActivationUnavailableError(
                f"{option('outputs')}: {key}: {reason}; leave the key out"
            )
    return found


def _nearest(name: str) -> str:
    names = [name for each in ACTIVATIONS for name in (each.key, each.alias) if name]
    near = get_close_matches(name, names)
    return f"did you mean {' or '.join(near)}?" if near else f"the keys are {_all_keys()}"


def _all_keys() -> str:
    return ", ".join(activation.key for activation in ACTIVATIONS)
