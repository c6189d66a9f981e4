"""Checkpoints of every kind found in the field, with seeded random weights far from their init."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from reference.model import ReferenceConfig, ReferenceEncoder

StateDict = dict[str, torch.Tensor]

# A directory's weights are the first of these that exists.
WEIGHT_FILES = (
    "model-best.safetensors",
    "model.safetensors",
    "model-final.safetensors",
    "model-stable.safetensors",
    "model-best.pt",
    "model.pt",
    "model-stable.pt",
)

_REFERENCE_FIELDS = {
    "input_vocab_size": "vocab",
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "mlp",
    "layer_norm_eps": "eps",
    "head_type": "head_type",
    "output_n_bins": "n_bins",
    "use_attention_sinks": "sinks",
    "use_qk_norm": "qk_norm",
}


@dataclass(frozen=True)
class Checkpoint:
    """A value of `--init`, and the fp32 state dict and sizes that it must load as."""

    init: Path
    state_dict: StateDict
    config: ReferenceConfig


def random_state_dict(config: ReferenceConfig, *, seed: int = 0, positions: int = 16) -> StateDict:
    """Return fp32 weights: gains around 1, sinks and biases around 0, all far from them."""
    generator = torch.Generator().manual_seed(seed)

    def sample(name: str, shape: torch.Size) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator)
        if "norm" in name or name == "final_ln.weight":
            return 1 + 0.4 * noise
        if name.endswith(("sinks", "bias")) or "emb" in name:
            return noise
        return noise * (1.5 / math.sqrt(shape[-1]))

    shapes = ReferenceEncoder(config, positions=positions).state_dict()
    return {name: sample(name, value.shape) for name, value in shapes.items()}


def config_json(config: ReferenceConfig, **changes: Any) -> dict[str, Any]:
    """Return the config.json that describes `config`. A change to None takes the field out."""
    fields = {name: getattr(config, ours) for name, ours in _REFERENCE_FIELDS.items()}
    fields |= {"max_position_embeddings": 16, "dropout_prob": 0.1, "attention_dropout_prob": 0.0}
    if config.head_type == "action_policy":
        del fields["output_n_bins"]
    fields |= changes
    return {name: value for name, value in fields.items() if value is not None}


def bundle(
    state_dict: Mapping[str, torch.Tensor], config: dict[str, Any], *, place: str = "new"
) -> dict[str, Any]:
    """Return a training bundle whose config is at `encoder_config` or in `training_config`."""
    content: dict[str, Any] = {
        "model": dict(state_dict),
        "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-3}]},
        "global_step": 7,
        "metadata_version": 2,
        "dataset": {"path": "/data/dataset", "n": 3},
        "resume": {"epoch": 1, "skip": None},
        "training_config": {"batch_size": 8, "betas": (0.9, 0.95)},
    }
    if place == "new":
        content["encoder_config"] = config
    else:
        content["training_config"][place] = config
    return content


def save_checkpoint(
    directory: Path,
    state_dict: Mapping[str, torch.Tensor],
    config: dict[str, Any],
    *,
    weights: str = "model.safetensors",
) -> Path:
    """Write the directory form: config.json and one file of weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    save_weights(directory / weights, state_dict, config)
    return directory


def save_weights(
    path: Path, state_dict: Mapping[str, torch.Tensor], config: dict[str, Any]
) -> None:
    """Write weights in the form the suffix names: safetensors, or a bundle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(dict(state_dict), path)
    else:
        torch.save(bundle(state_dict, config), path)


def load_demo(directory: Path) -> Checkpoint:
    """Read the embedded checkpoint, without the package."""
    fields = json.loads((directory / "config.json").read_text())
    config = ReferenceConfig(
        **{ours: fields[name] for name, ours in _REFERENCE_FIELDS.items() if name in fields}
    )
    return Checkpoint(directory, load_file(directory / "model.safetensors"), config)


def _plain(config: ReferenceConfig, **changes: Any) -> Callable[[Path], Checkpoint]:
    """Return the maker of a config.json, with `changes`, and model.safetensors."""

    def make(directory: Path) -> Checkpoint:
        positions = changes.get("max_position_embeddings") or 16
        state_dict = random_state_dict(config, positions=positions)
        save_checkpoint(directory, state_dict, config_json(config, **changes))
        return Checkpoint(directory, state_dict, config)

    return make


def _bundle_file(place: str) -> Callable[[Path], Checkpoint]:
    def make(directory: Path) -> Checkpoint:
        directory.mkdir(parents=True)
        state_dict = random_state_dict(BASE)
        path = directory / "run-3.pt"
        torch.save(bundle(state_dict, config_json(BASE), place=place), path)
        return Checkpoint(path, state_dict, BASE)

    return make


def _bundle_directory(directory: Path) -> Checkpoint:
    state_dict = random_state_dict(BASE)
    save_weights(directory / "model.pt", state_dict, config_json(BASE))
    return Checkpoint(directory, state_dict, BASE)


def _bundle_beats_config(directory: Path) -> Checkpoint:
    """Write a config.json that differs from the bundle where no shape of a weight gives it away."""
    config = replace(BASE, eps=0.5, heads=8, kv_heads=4, hidden=64)
    state_dict = random_state_dict(config)
    misleading = config_json(
        config, layer_norm_eps=1e-6, num_attention_heads=4, num_key_value_heads=2
    )
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(misleading))
    torch.save(bundle(state_dict, config_json(config)), directory / "model-best.pt")
    return Checkpoint(directory, state_dict, config)


def _prefixed(prefix_of: Callable[[int], str]) -> Callable[[Path], Checkpoint]:
    def make(directory: Path) -> Checkpoint:
        state_dict = random_state_dict(BASE)
        wrapped = {prefix_of(i) + key: value for i, (key, value) in enumerate(state_dict.items())}
        save_checkpoint(directory, wrapped, config_json(BASE))
        return Checkpoint(directory, state_dict, BASE)

    return make


def _stored_as(dtype: torch.dtype, weights: str) -> Callable[[Path], Checkpoint]:
    def make(directory: Path) -> Checkpoint:
        stored = {key: value.to(dtype) for key, value in random_state_dict(BASE).items()}
        save_checkpoint(directory, stored, config_json(BASE), weights=weights)
        return Checkpoint(directory, {key: value.float() for key, value in stored.items()}, BASE)

    return make


BASE = ReferenceConfig(kv_heads=2)
_POLICY = replace(BASE, head_type="action_policy")
_OPTIONAL_FIELDS = (
    *("input_vocab_size", "num_key_value_heads", "head_type", "output_n_bins"),
    *("use_attention_sinks", "use_qk_norm", "max_position_embeddings"),
    *("dropout_prob", "attention_dropout_prob"),
)

VARIANTS: dict[str, Callable[[Path], Checkpoint]] = {
    "mha": _plain(replace(BASE, kv_heads=4)),
    "mha-by-default": _plain(replace(BASE, kv_heads=4), num_key_value_heads=None),
    "gqa-4-2": _plain(BASE),
    "gqa-4-1": _plain(replace(BASE, kv_heads=1)),
    "gqa-6-2": _plain(replace(BASE, hidden=48, heads=6, kv_heads=2, layers=3)),
    "gqa-6-3": _plain(replace(BASE, hidden=48, heads=6, kv_heads=3)),
    "sinks-mha": _plain(replace(BASE, sinks=True, kv_heads=4)),
    "sinks-gqa-4-2": _plain(replace(BASE, sinks=True)),
    "sinks-gqa-6-2": _plain(replace(BASE, sinks=True, hidden=48, heads=6, kv_heads=2)),
    "qk-norm": _plain(replace(BASE, qk_norm=True, eps=1e-2)),
    "qk-norm-sinks-policy": _plain(replace(_POLICY, qk_norm=True, sinks=True, layers=3)),
    "policy": _plain(_POLICY),
    "one-layer": _plain(replace(BASE, layers=1)),
    "large-eps": _plain(replace(BASE, eps=0.3)),
    "more-positions": _plain(BASE, max_position_embeddings=24),
    "minimal-config": _plain(replace(BASE, kv_heads=4), **dict.fromkeys(_OPTIONAL_FIELDS)),
    "unknown-fields": _plain(BASE, model_type="2048former", rope_theta=[1.0], dropout_prob=0.9),
    "vocabulary-of-weights-wins": _plain(BASE, input_vocab_size=16),
    "binned-ev-of-weights-wins": _plain(BASE, head_type="action_policy"),
    "policy-of-weights-wins": _plain(_POLICY, head_type="binned_ev"),
    "policy-of-weights-wins-over-bins": _plain(_POLICY, head_type="binned_ev", output_n_bins=9),
    "bins-of-weights-missing": _plain(BASE, output_n_bins=None),
    "bins-of-weights-win": _plain(BASE, output_n_bins=64),
    "bundle-new": _bundle_file("new"),
    "bundle-old-encoder": _bundle_file("encoder"),
    "bundle-old-model": _bundle_file("model"),
    "bundle-directory": _bundle_directory,
    "bundle-beats-config": _bundle_beats_config,
    "prefix-nested": _prefixed(lambda _: "module._orig_mod.module."),
    "prefix-mixed": _prefixed(lambda i: ("_orig_mod.module.", "module.", "")[i % 3]),
    "fp16": _stored_as(torch.float16, "model.safetensors"),
    "bf16": _stored_as(torch.bfloat16, "model.safetensors"),
    "bf16-bundle": _stored_as(torch.bfloat16, "model.pt"),
}
