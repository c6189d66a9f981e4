"""What a state dict from outside says of the model, and what of it the model takes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dump_activations.errors import CheckpointError, warn
from dump_activations.model.config import EncoderConfig, HeadType
from dump_activations.model.weight_files import first_few, one_line

# torch.compile and DistributedDataParallel name their wrappers so, around any module.
_WRAPPERS = re.compile(r"\b(?:_orig_mod|module)\.")
_TRUNK = frozenset({"tok_emb", "pos_emb", "blocks", "final_ln"})
_HEADS: dict[str, HeadType] = {"ev_heads": "binned_ev", "policy_head": "action_policy"}
_MODULES_LISTED = 8


def without_wrappers(weights: Mapping[Any, Any], origin: str) -> dict[str, Any]:
    """Name a state dict's entries as the model alone would.

    Raises:
        CheckpointError: two entries have one name then, or one has no name.
    """
    clean: dict[str, Any] = {}
    for key, value in weights.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{origin}: its weights have names of type {type(key).__name__}")
        name = _WRAPPERS.sub("", key)
        if name in clean:
            raise CheckpointError(
                f"{origin}: two tensors named {one_line(name)} once wrapper names are stripped"
            )
        clean[name] = value
    return clean


def config_of_weights(config: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config fields that the weights know better."""
    said: dict[str, Any] = {}
    vocabulary = config.get("input_vocab_size", EncoderConfig.input_vocab_size)
    rows = _rows(weights.get("tok_emb.weight"))
    if vocabulary is None or (isinstance(vocabulary, int) and 0 < vocabulary < rows):
        said["input_vocab_size"] = rows
    asked = config.get("head_type") or EncoderConfig.head_type
    if not isinstance(asked, str):
        return said
    heads = [_HEADS[module] for module in _HEADS if module in map(_module, weights)]
    if asked not in heads:
        said["head_type"] = heads[0] if heads else "none"
    bins = _rows(weights.get("ev_heads.0.weight"))
    if bins and "binned_ev" in heads:
        said["output_n_bins"] = bins
    return said


def take_weights(
    config: EncoderConfig, weights: Mapping[str, Any], origin: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Pick the weights of the trunk and of the config's head; name the modules of all others.

    Raises:
        CheckpointError: one of those picked is no dense floating-point tensor.
    """
    used = _TRUNK | {module for module, head in _HEADS.items() if head == config.head_type}
    taken = {name: value for name, value in weights.items() if _module(name) in used}
    for name, value in taken.items():
        if not _is_weight(value):
            raise CheckpointError(f"{origin}: {one_line(name)} is no dense floating-point tensor")
    return taken, sorted({_module(name) for name in weights} - used)


def misfits(
    expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], others: Sequence[str]
) -> str:
    """Say in one line how the weights differ from a model's names and shapes; "" if they do not.

    Args:
        expected: the model's state dict.
        weights: those picked for it.
        others: modules whose weights were not picked.
    """
    found = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": sorted(name for name in weights if name not in expected),
        "misshapen": [
            f"{name} {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    if any(found.values()):
        found["not of this model"] = list(others)
    return "; ".join(f"{kind} {first_few(names)}" for kind, names in found.items() if names)


def warn_of_others(others: Sequence[str], origin: str) -> None:
    """Warn once of modules whose weights are left out."""
    if others:
        warn(
            f"{origin}: {first_few(others, most=_MODULES_LISTED)}: left out, as the model has no "
            "such part"
        )


def warn_of_nonfinite(weights: Mapping[str, Tensor], origin: str) -> None:
    """Warn once of weights that are NaN or infinite, naming the first tensors that have any."""
    found = [
        f"{name} ({int(tensor.isnan().sum()):,} NaN, {int(tensor.isinf().sum()):,} infinite)"
        for name, tensor in weights.items()
        # A sum is a tenth of the work; one that overflows is no finding.
        if not tensor.sum().isfinite() and not tensor.isfinite().all()
    ]
    if found:
        warn(f"{origin}: weights that are not finite: {first_few(found)}")


def _module(name: str) -> str:
    return name.partition(".")[0]


def _rows(weight: object) -> int:
    return weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else 0


def _is_weight(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.is_floating_point()
        and value.device.type == "cpu"
    )
