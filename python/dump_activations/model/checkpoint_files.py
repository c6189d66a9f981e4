"""The files of a checkpoint: which to read of a directory, and their content.

Checkpoints are not trusted: they cannot run code, name files outside of their directory, or take
memory beyond the size of their files.
"""

import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dump_activations.errors import CheckpointError, CheckpointNotFoundError, option, switch
from dump_activations.paths import check_ordinary

_CONFIG_NAME = "config.json"
_TOKENIZER_NAME = "tokenizer.json"
_INDEX_NAME = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"model-\d+-of-\d+\.safetensors")
# The first of these in a directory is read.
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
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# torch.compile and DistributedDataParallel name their wrappers so, around any module.
_WRAPPERS = re.compile(r"\b(?:_orig_mod|module)\.")
_LONGEST_QUOTE = 200


@dataclass(kw_only=True)
class CheckpointFiles:
    """Content of a checkpoint's files.

    Attributes:
        paths: the files that were read.
        config: raw config values.
        config_origin: the files of the config, for messages.
        weights: state dict by names without wrappers; None if there is none.
        weights_origin: the file of the weights, for messages.
        tokenizer: the text of tokenizer.json, if it is there and small.
    """

    paths: list[Path] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    config_origin: str = ""
    weights: dict[str, Any] | None = None
    weights_origin: str = ""
    tokenizer: str | None = None


def read_checkpoint(path: Path, *, weights_required: bool) -> CheckpointFiles:
    """Read a directory or a bundle.

    Raises:
        CheckpointNotFoundError: no such checkpoint, or no weights in it though they are required.
        CheckpointError: a file is not what its name says, or is damaged.
        OSError: a file cannot be read.
    """
    if path.is_dir():
        names = [file.name for file in path.iterdir()]
        needed = _files_needed(names, str(path), weights_required=weights_required)
        paths = [path / name for name in needed]
    elif not path.exists():
        raise CheckpointNotFoundError(
            f"{path}: no such checkpoint; give a directory, a .pt bundle or hf://org/repo"
        )
    elif path.suffix in (".json", ".safetensors"):
        raise CheckpointError(f"{path}: not a .pt bundle; give the directory that holds it")
    else:
        paths = [path]
    files = CheckpointFiles(paths=paths, weights_origin=str(paths[-1]))
    files.tokenizer = _read_tokenizer(paths[0].parent)
    weights: Mapping[str, Any] | None = None
    origins: list[str] = []
    for file in paths[:]:
        _check_file(file)
        config: dict[str, Any] = {}
        if file == path or file.suffix == ".pt":
            config, weights = _read_bundle(file, config_required=not origins)
        elif file.name == _CONFIG_NAME:
            config = _read_json_object(file)
        elif file.name == _INDEX_NAME:
            weights, shards = _read_shards(file)
            files.paths += shards
        else:
            weights = _read_safetensors(file)
        files.config |= config
        origins += [str(file)] if config or file.name == _CONFIG_NAME else []
    files.config_origin = " and ".join(origins)
    if weights is not None:
        files.weights = _without_wrappers(weights, files.weights_origin)
    return files


def _files_needed(names: Sequence[str], where: str, *, weights_required: bool) -> list[str]:
    """Choose the file of the config, if it has its own, and the file of the weights."""
    weights = [name for name in WEIGHT_NAMES if name in names]
    bundles = [name for name in weights if name.endswith(".pt")]
    config = [_CONFIG_NAME] if _CONFIG_NAME in names else bundles[:1]
    others = sorted(name for name in names if name.endswith((".pt", ".safetensors")))
    it_has = f"; it has {first_few(others, most=5)}" if others else ""
    if others:
        it_has += f" (to read another .pt, name it in {option('init')})"
    if not config:
        raise CheckpointNotFoundError(
            f"{where}: not a checkpoint: neither {_CONFIG_NAME} nor a bundle with one of the names "
            f"{', '.join(name for name in WEIGHT_NAMES if name.endswith('.pt'))}{it_has}"
        )
    if weights_required and not weights:
        raise CheckpointNotFoundError(
            f"{where}: no weights; expected one of {', '.join(WEIGHT_NAMES)} "
            f"({switch('random_init')} runs the untrained model){it_has}"
        )
    return list(dict.fromkeys([*config, *weights[:1]]))


def files_to_download(names: Sequence[str], where: str, *, weights_required: bool) -> list[str]:
    """Choose the files of a repository's directory to download; raise without a checkpoint."""
    needed = _files_needed(names, where, weights_required=weights_required)
    if _INDEX_NAME in needed:
        needed += filter(_SHARD_NAME.fullmatch, names)
    return [*needed, _TOKENIZER_NAME] if _TOKENIZER_NAME in names else needed


def preferred_files(directory: Path) -> list[Path]:
    """List absent files of a checkpoint's directory that would be read first if they were there."""
    paths = [directory / name for name in WEIGHT_NAMES]
    absent = list(takewhile(lambda path: not path.exists(), paths))
    has_config = (directory / _CONFIG_NAME).exists()
    return absent if has_config or len(absent) < len(paths) else []


def _read_tokenizer(directory: Path) -> str | None:
    path = directory / _TOKENIZER_NAME
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_TOKENIZER:
            return None
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None


def _check_file(path: Path) -> None:
    check_ordinary(path, CheckpointError)
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(
                f"{path}: a git-LFS pointer, not the file itself; run git lfs pull"
            )


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {one_line(str(error))}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must be a JSON object; got a {type(values).__name__}")
    return values


def _read_safetensors(path: Path) -> dict[str, Any]:
    # load_file would map the file. If it were cut short later, the process would be killed.
    data = path.read_bytes()
    try:
        return safetensors.torch.load(data)
    except Exception as error:
        # For a damaged header torch raises errors of any type, about its dtypes and shapes.
        reason = one_line(str(error))
        raise CheckpointError(f"{path}: not a readable safetensors file: {reason}") from error


def _read_shards(index: Path) -> tuple[dict[str, Any], list[Path]]:
    """Read the tensors that an index of sharded safetensors names, and list their files."""
    weight_map = _read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map, which names the file of each tensor")
    names_of: dict[str, list[str]] = defaultdict(list)
    for name, file in weight_map.items():
        # A path in the place of a name could lead out of the directory.
        if not (isinstance(file, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", file)):
            raise CheckpointError(f"{index}: {one_line(str(file))} is not the name of a file there")
        names_of[file].append(name)
    weights: dict[str, Any] = {}
    for file, names in sorted(names_of.items()):
        path = index.parent / file
        if not path.exists():
            raise CheckpointError(f"{index}: no {one_line(file)}, which it names")
        _check_file(path)
        held = _read_safetensors(path)
        missing = [name for name in names if name not in held]
        if missing:
            raise CheckpointError(f"{path}: lacks {first_few(missing)}, which {index.name} names")
        weights |= {name: held[name] for name in names}
    return weights, [index.parent / file for file in sorted(names_of)]


def _read_bundle(path: Path, *, config_required: bool) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Read the raw config, {} if it may be missing, and the state dict of a `.pt` bundle."""
    try:
        _check_archive(path)
        bundle = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, CheckpointError):
        raise
    except Exception as error:
        # For a foreign file torch.load raises errors of any type.
        raise CheckpointError(f"{path}: {_why_not_loaded(path)}") from error
    weights = bundle.get("model") if isinstance(bundle, dict) else None
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"{path}: not a checkpoint bundle: no state dict under 'model'")
    tensors = [value for value in weights.values() if isinstance(value, Tensor)]
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > path.stat().st_size:
        raise CheckpointError(f"{path}: its weights are larger than the file: views of one another")
    training = bundle.get("training_config")
    training = training if isinstance(training, Mapping) else {}
    for config in (bundle.get("encoder_config"), training.get("encoder"), training.get("model")):
        if isinstance(config, Mapping) and config:
            # A null is not a value, so config.json's value stays.
            return {name: it for name, it in config.items() if it is not None}, weights
    if config_required:
        raise CheckpointError(
            f"{path}: no encoder_config (nor training_config['encoder'] or ['model'])"
        )
    return {}, weights


def _check_archive(path: Path) -> None:
    """Refuse an archive whose members would take more memory than the file's size."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise CheckpointError(
                f"{path}: not a zip archive: damaged, or saved by torch before 1.6; save it again"
            )
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > path.stat().st_size:
        raise CheckpointError(
            f"{path}: its members are larger than the file, compressed or overlapping; save it "
            "with torch.save"
        )


def _why_not_loaded(path: Path) -> str:
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        foreign = []
    if not foreign:
        return "damaged, or not a checkpoint bundle written by torch.save"
    return (
        f"holds objects that could run code ({first_few(sorted(foreign), most=8)}), which are "
        "never loaded; save it again with 'model' and 'encoder_config' alone"
    )


def _without_wrappers(weights: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Strip the names of wrappers from a state dict's keys."""
    clean: dict[str, Any] = {}
    for key, value in weights.items():
        name = _WRAPPERS.sub("", key)
        if name in clean:
            raise CheckpointError(
                f"{origin}: two tensors named {one_line(name)} once wrapper names are stripped"
            )
        clean[name] = value
    return clean


def one_line(text: str) -> str:
    """Quote text from a file in one line of bounded length."""
    text = text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def first_few(names: Sequence[str], *, most: int = 3) -> str:
    """Quote the first of some names from a file, and count the others."""
    more = len(names) - most
    return ", ".join(map(one_line, names[:most])) + (f" and {more} more" if more > 0 else "")
