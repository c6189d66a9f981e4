"""Loads a checkpoint into an Encoder: a directory, a `.pt` bundle, or `hf://org/repo`."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dump_activations.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    DumpActivationsError,
    switch,
)
from dump_activations.model.config import EncoderConfig
from dump_activations.model.encoder import Encoder
from dump_activations.model.weight_files import one_line, read_bundle, read_safetensors
from dump_activations.paths import check_ordinary

_HUB_SCHEME = "hf://"
CONFIG_NAME = "config.json"
_BUNDLE_SUFFIX = ".pt"
# The first of these that a directory holds is read.
WEIGHT_NAMES = (
    "model-best.safetensors",
    "model.safetensors",
    "model-final.safetensors",
    "model-stable.safetensors",
    "model-best.pt",
    "model.pt",
    "model-stable.pt",
)
# Two norms, four projections of the attention and three of the MLP.
_FEWEST_TENSORS_A_BLOCK = 9
_RANDOM_INIT_SEED = 0
_KEYS_LISTED = 3


@dataclass(frozen=True)
class _Checkpoint:
    """What the files hold: raw config values, and the weights where there are any.

    `config_origin` and `weights_origin` name the files for messages; `files` are all of them.
    """

    config: dict[str, Any]
    config_origin: str
    weights: dict[str, Tensor] | None
    weights_origin: str
    files: tuple[Path, ...]


def load_encoder(
    init: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    random_init: bool = False,
) -> Encoder:
    """Load a checkpoint as an fp32 Encoder in eval mode, its parameters without gradients.

    Args:
        init: a checkpoint directory, a `.pt` bundle, or `hf://org/repo[/subdir][@revision]`.
        device: where the weights go.
        random_init: give the checkpoint's architecture untrained weights (PyTorch's default
            initialisation, always the same ones) instead of its own, which it need not have.

    Raises:
        CheckpointNotFoundError: no such checkpoint, or no weights in it.
        CheckpointError: the config or the weights are damaged, contradictory or do not fit.
    """
    source = os.fspath(init)
    if not source.startswith(_HUB_SCHEME):
        model = _load(Path(source), random_init=random_init)
    else:
        from dump_activations.model.hub import download_checkpoint

        directory = download_checkpoint(source, _files_needed)
        try:
            model = _load(directory, random_init=random_init)
        except (CheckpointError, CheckpointNotFoundError) as error:
            raise type(error)(f"{source}: {error.args[0]}") from error
    model.checkpoint = source
    model.random_init = random_init
    return model.to(device).eval().requires_grad_(requires_grad=False)


def _load(path: Path, *, random_init: bool) -> Encoder:
    try:
        checkpoint = _read_directory(path) if path.is_dir() else _read_file(path)
    except OSError as error:
        if isinstance(error, DumpActivationsError):
            raise
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if checkpoint.weights is None and not random_init:
        raise CheckpointNotFoundError(
            f"{path}: no weights; expected one of {', '.join(WEIGHT_NAMES)} "
            f"({switch('random_init')} runs the untrained model)"
        )
    said = _what_weights_say(checkpoint.config, checkpoint.weights or {})
    try:
        config = EncoderConfig.from_dict(checkpoint.config | said)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.config_origin}: {error.args[0]}") from error
    model = _random_encoder(config) if random_init else _encoder_with(config, checkpoint)
    model.checkpoint_files = checkpoint.files
    return model


def _read_file(path: Path) -> _Checkpoint:
    if not path.exists():
        raise CheckpointNotFoundError(
            f"{path}: no such checkpoint; give a directory, a .pt bundle or hf://org/repo"
        )
    check_ordinary(path, CheckpointError)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: give the directory that holds {CONFIG_NAME} and this file")
    config, weights = read_bundle(path)
    return _Checkpoint(config, str(path), weights, str(path), (path,))


def _files_needed(names: Sequence[str]) -> list[str]:
    """Names of the files to read: the config's, where it has one of its own, and the weights'."""
    weights = [name for name in WEIGHT_NAMES if name in names]
    bundles = [name for name in weights if name.endswith(_BUNDLE_SUFFIX)]
    config = [CONFIG_NAME] if CONFIG_NAME in names else bundles[:1]
    return list(dict.fromkeys([*config, *weights[:1]]))


def preferred_files(directory: Path) -> list[Path]:
    """List the files that a checkpoint's directory lacks and would be read from if it had them."""
    try:
        names = [path.name for path in directory.iterdir()]
    except OSError:  # No checkpoint could be read from it either.
        return []
    needed = _files_needed(names)
    preferred = [name for name in WEIGHT_NAMES if _files_needed([*names, name]) != needed]
    return [directory / name for name in preferred] if needed else []


def _read_directory(directory: Path) -> _Checkpoint:
    needed = _files_needed([path.name for path in directory.iterdir()])
    if not needed:
        raise CheckpointNotFoundError(
            f"{directory}: not a checkpoint: neither {CONFIG_NAME} nor a .pt bundle in it"
        )
    config: dict[str, Any] = {}
    weights: dict[str, Tensor] | None = None
    origins = []
    for path in (directory / name for name in needed):
        check_ordinary(path, CheckpointError)
        if path.name == CONFIG_NAME:
            config = _read_config(path)
            origins.append(str(path))
        elif path.suffix == _BUNDLE_SUFFIX:
            bundle_config, weights = read_bundle(path, config_required=not origins)
            config = config | bundle_config
            origins += [str(path)] if bundle_config else []
        else:
            weights = read_safetensors(path)
    if not origins:
        raise CheckpointNotFoundError(f"{directory}: no {CONFIG_NAME}")
    files = tuple(directory / name for name in needed)
    return _Checkpoint(config, " and ".join(origins), weights, str(files[-1]), files)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, not a {type(config).__name__}")
    return config


def _what_weights_say(config: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the config fields that the weights know better."""
    said: dict[str, Any] = {}
    embedding = weights.get("tok_emb.weight")
    vocabulary = config.get("input_vocab_size", EncoderConfig.input_vocab_size)
    if embedding is not None and embedding.ndim == 2 and _below(vocabulary, embedding.shape[0]):
        said["input_vocab_size"] = embedding.shape[0]
    ev_head = weights.get("ev_heads.0.weight")
    if not isinstance(config.get("head_type"), str | None):
        return said
    if ev_head is not None:
        said["head_type"] = "binned_ev"
        if ev_head.ndim == 2:
            said["output_n_bins"] = ev_head.shape[0]
    elif any(name.startswith("policy_head.") for name in weights):
        said["head_type"] = "action_policy"
    return said


def _below(vocabulary: object, rows: int) -> bool:
    return vocabulary is None or (isinstance(vocabulary, int) and 0 < vocabulary < rows)


def _random_encoder(config: EncoderConfig) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_INIT_SEED)
        return Encoder(config)


def _encoder_with(config: EncoderConfig, checkpoint: _Checkpoint) -> Encoder:
    weights = checkpoint.weights
    assert weights is not None
    # On the meta device nothing is allocated until the shapes are known to be the file's; a block
    # more than the weights can fill is enough to say which are missing.
    layers = min(config.num_hidden_layers, len(weights) // _FEWEST_TENSORS_A_BLOCK + 1)
    with torch.device("meta"), _NoInitialisation():
        model = Encoder(replace(config, num_hidden_layers=layers))
    problems = _misfits(model.state_dict(), weights)
    if problems:
        raise CheckpointError(
            f"{checkpoint.weights_origin}: the weights do not fit the config "
            f"({checkpoint.config_origin}): {problems}"
        )
    assert layers == config.num_hidden_layers
    model.load_state_dict(
        {name: tensor.to(torch.float32) for name, tensor in weights.items()}, assign=True
    )
    return model


class _NoInitialisation(TorchFunctionMode):
    """Leaves parameters as they are allocated: drawing on the meta device takes seconds."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _misfits(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    misshapen = [
        f"{name} {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    found = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": sorted(name for name in weights if name not in expected),
        "misshapen": misshapen,
    }
    return "; ".join(f"{kind} {_first_few(names)}" for kind, names in found.items() if names)


def _first_few(names: Sequence[str]) -> str:
    more = len(names) - _KEYS_LISTED
    return ", ".join(map(one_line, names[:_KEYS_LISTED])) + (
        f" and {more} more" if more > 0 else ""
    )
