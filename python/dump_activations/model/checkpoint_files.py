"""Which files make a checkpoint, and what is in them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dump_activations.errors import CheckpointError, CheckpointNotFoundError, option, switch
from dump_activations.model.bundle import BUNDLE_SUFFIX, read_bundle
from dump_activations.model.state_dict import without_wrappers
from dump_activations.model.weight_files import (
    SAFETENSORS_SUFFIX,
    first_few,
    read_json_object,
    read_safetensors,
    read_shards,
)
from dump_activations.paths import check_ordinary

_CONFIG_NAME = "config.json"
_TOKENIZER_NAME = "tokenizer.json"
_INDEX_NAME = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"model-\d+-of-\d+\.safetensors")
# The first of these that a directory holds is read.
WEIGHT_NAMES = (
    "model-best.safetensors",
    "model.safetensors",
    _INDEX_NAME,
    "model-final.safetensors",
    "model-stable.safetensors",
    "model-best.pt",
    "model.pt",
    "model-stable.pt",
)
_LARGEST_TOKENIZER = 64 << 10
_NAMES_LISTED = 5


@dataclass(frozen=True)
class CheckpointFiles:
    """What the files of a checkpoint hold.

    Attributes:
        config: raw config values.
        config_origin: names the files that they are from, for messages.
        weights: what the state dict holds under names without wrappers; None if there is none.
        weights_origin: names the file that it is from.
        tokenizer: the text of tokenizer.json, where there is one and it is small.
        paths: the files of the config and the weights.
    """

    config: dict[str, Any]
    config_origin: str
    weights: dict[str, Any] | None
    weights_origin: str
    tokenizer: str | None
    paths: tuple[Path, ...]


def read_checkpoint(path: Path, *, weights_required: bool) -> CheckpointFiles:
    """Read a checkpoint directory or a `.pt` bundle.

    Raises:
        CheckpointNotFoundError: no such checkpoint, or no weights in it where they are required.
        CheckpointError: one of its files is damaged, or of a kind that is not read.
        OSError: one of its files cannot be read.
    """
    if path.is_dir():
        return _read_directory(path, weights_required=weights_required)
    if not path.exists():
        raise CheckpointNotFoundError(
            f"{path}: no such checkpoint; give a directory, a .pt bundle or hf://org/repo"
        )
    check_ordinary(path, CheckpointError)
    if path.suffix == SAFETENSORS_SUFFIX:
        raise CheckpointError(f"{path}: give the directory that holds {_CONFIG_NAME} and this file")
    config, weights = read_bundle(path)
    return CheckpointFiles(
        config=_checked(config, path),
        config_origin=str(path),
        weights=without_wrappers(weights, str(path)),
        weights_origin=str(path),
        tokenizer=_read_tokenizer(path.parent),
        paths=(path,),
    )


def files_to_download(names: Sequence[str], *, where: str, weights_required: bool) -> list[str]:
    """Choose what to download of the names in a directory.

    Raises:
        CheckpointNotFoundError: they make no checkpoint, or one without weights where they are
            required.
    """
    needed = _files_needed(names, where=where, weights_required=weights_required)
    if _INDEX_NAME in needed:
        needed += filter(_SHARD_NAME.fullmatch, names)
    return [*needed, _TOKENIZER_NAME] if _TOKENIZER_NAME in names else needed


def _files_needed(names: Sequence[str], *, where: str, weights_required: bool) -> list[str]:
    """Choose the file of the config, where it has one of its own, and that of the weights."""
    weights = [name for name in WEIGHT_NAMES if name in names]
    bundles = [name for name in weights if name.endswith(BUNDLE_SUFFIX)]
    config = [_CONFIG_NAME] if _CONFIG_NAME in names else bundles[:1]
    if not config:
        raise CheckpointNotFoundError(
            f"{where}: not a checkpoint: neither {_CONFIG_NAME} nor a bundle of the names that are "
            f"looked for{_other_weights(names)}"
        )
    if weights_required and not weights:
        raise CheckpointNotFoundError(
            f"{where}: no weights; expected one of {', '.join(WEIGHT_NAMES)} "
            f"({switch('random_init')} runs the untrained model){_other_weights(names)}"
        )
    return list(dict.fromkeys([*config, *weights[:1]]))


def preferred_files(directory: Path) -> list[Path]:
    """List the files that a checkpoint's directory lacks and would be read from if it had them."""

    def needed(names: Sequence[str]) -> list[str]:
        return _files_needed(names, where=str(directory), weights_required=False)

    try:
        names = [path.name for path in directory.iterdir()]
        now = needed(names)
    except (OSError, CheckpointNotFoundError):  # No checkpoint could be read from it either.
        return []
    return [directory / name for name in WEIGHT_NAMES if needed([*names, name]) != now]


def _other_weights(names: Sequence[str]) -> str:
    seen = sorted(name for name in names if name.endswith((BUNDLE_SUFFIX, SAFETENSORS_SUFFIX)))
    return (
        f"; it has {first_few(seen, most=_NAMES_LISTED)} (a .pt is taken where {option('init')} "
        "names it)"
        if seen
        else ""
    )


def _read_directory(directory: Path, *, weights_required: bool) -> CheckpointFiles:
    names = [path.name for path in directory.iterdir()]
    needed = _files_needed(names, where=str(directory), weights_required=weights_required)
    config: dict[str, Any] = {}
    weights: Mapping[Any, Any] | None = None
    origins, read = [], []
    for path in (directory / name for name in needed):
        check_ordinary(path, CheckpointError)
        read.append(path)
        if path.name == _CONFIG_NAME:
            config = _checked(read_json_object(path), path)
            origins.append(str(path))
        elif path.suffix == BUNDLE_SUFFIX:
            bundle_config, weights = read_bundle(path, config_required=not origins)
            config |= _checked(bundle_config, path)
            origins += [str(path)] if bundle_config else []
        elif path.name == _INDEX_NAME:
            weights, shards = read_shards(path)
            read += shards
        else:
            weights = read_safetensors(path)
    weights_origin = str(directory / needed[-1])
    return CheckpointFiles(
        config=config,
        config_origin=" and ".join(origins),
        weights=None if weights is None else without_wrappers(weights, weights_origin),
        weights_origin=weights_origin,
        tokenizer=_read_tokenizer(directory),
        paths=tuple(read),
    )


def _checked(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a raw config; CheckpointError where its model is of a kind that is not read."""
    backend = config.get("model_backend")
    if backend == "transformer_engine":
        raise CheckpointError(
            f"{path}: model_backend {backend}: its blocks have other names, which are not read; "
            "save the model with the plain backend"
        )
    return config


def _read_tokenizer(directory: Path) -> str | None:
    path = directory / _TOKENIZER_NAME
    if not path.is_file() or path.stat().st_size > _LARGEST_TOKENIZER:
        return None
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None
