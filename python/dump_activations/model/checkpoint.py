"""Loads a checkpoint into an Encoder: a directory, a `.pt` bundle, or `hf://org/repo`.

Checkpoints are not trusted: they cannot run code, name files outside of their directory, or take
memory beyond the size of their files.
"""

import json
import os
import re
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dump_activations.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    DumpActivationsError,
    option,
    switch,
    warn,
)
from dump_activations.model.config import EncoderConfig, HeadType
from dump_activations.model.encoder import Encoder, empty_encoder, random_encoder
from dump_activations.paths import check_ordinary
from dump_activations.progress import begin

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
_TRUNK = frozenset({"tok_emb", "pos_emb", "blocks", "final_ln"})
_HEADS: dict[str, HeadType] = {"ev_heads": "binned_ev", "policy_head": "action_policy"}
# Two norms, four projections of the attention and three of the MLP.
_FEWEST_TENSORS_PER_BLOCK = 9
_LONGEST_QUOTE = 200


@dataclass(frozen=True, kw_only=True)
class _Files:
    """Content of a checkpoint's files.

    Attributes:
        config: raw config values.
        config_origin: the files of the config, for messages.
        weights: state dict by names without wrappers; None if there is none.
        weights_origin: the file of the weights, for messages.
        tokenizer: the text of tokenizer.json, if it is there and small.
        paths: the files of the config and the weights.
    """

    config: dict[str, Any]
    config_origin: str
    weights: dict[str, Any] | None
    weights_origin: str
    tokenizer: str | None
    paths: tuple[Path, ...]


def load_encoder(
    init: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    random_init: bool = False,
    seed: int = 0,
) -> Encoder:
    """Load a checkpoint as an fp32 Encoder in eval mode, its parameters without gradients.

    Weights that the model has no module for are left out, with one warning.

    Args:
        init: a checkpoint directory, a `.pt` bundle, or `hf://org/repo[/subdir][@revision]`.
        device: where the weights go.
        random_init: give the checkpoint's architecture untrained weights (PyTorch's default
            initialisation). The checkpoint then needs no weights of its own.
        seed: of the untrained weights.

    Raises:
        CheckpointNotFoundError: no such checkpoint, or no weights in it.
        CheckpointError: the config or the weights are damaged, contradictory or do not fit.
        InvalidArgumentError: a malformed `hf://` address.
    """
    source, commit = os.fsdecode(init), None
    with torch.device("cpu"):  # in place of the caller's default device
        if "://" not in source:
            model = _load(Path(source), random_init=random_init, seed=seed)
        else:
            from dump_activations.model.hub import download_checkpoint

            choose = partial(_files_to_download, where=source, weights_required=not random_init)
            directory, commit = download_checkpoint(source, choose)
            begin("loading the checkpoint")
            try:
                model = _load(directory, random_init=random_init, seed=seed)
            except (CheckpointError, CheckpointNotFoundError) as error:
                raise type(error)(f"{source}: {error.args[0]}") from error
    model.checkpoint, model.hub_commit, model.random_init = source, commit, random_init
    return model.to(device).eval().requires_grad_(requires_grad=False)


def _load(path: Path, *, random_init: bool, seed: int) -> Encoder:
    try:
        files = _read_checkpoint(path, weights_required=not random_init)
    except OSError as error:
        if isinstance(error, DumpActivationsError):
            raise
        raise CheckpointError(f"{error.filename or path}: {error.strerror or error}") from error
    fields = files.config
    if files.weights:
        fields = fields | _config_of_weights(fields, files.weights)
    try:
        config = EncoderConfig.from_dict(fields)
    except CheckpointError as error:
        raise CheckpointError(f"{files.config_origin}: {error.args[0]}") from error
    model = random_encoder(config, seed=seed) if random_init else _encoder_with(config, files)
    model.checkpoint_files, model.tokenizer = files.paths, files.tokenizer
    return model


# Directory rules.


def _read_checkpoint(path: Path, *, weights_required: bool) -> _Files:
    if path.is_dir():
        directory, names = path, [file.name for file in path.iterdir()]
        needed = _files_needed(names, where=str(path), weights_required=weights_required)
    elif not path.exists():
        raise CheckpointNotFoundError(
            f"{path}: no such checkpoint; give a directory, a .pt bundle or hf://org/repo"
        )
    elif path.suffix in (".json", ".safetensors"):
        raise CheckpointError(f"{path}: not a .pt bundle; give the directory that holds it")
    else:
        directory, needed = path.parent, [path.name]
    config: dict[str, Any] = {}
    weights: Mapping[Any, Any] | None = None
    origins: list[str] = []
    read: list[Path] = []
    for file in (directory / name for name in needed):
        check_ordinary(file, CheckpointError)
        read.append(file)
        if file == path or file.suffix == ".pt":
            bundle_config, weights = _read_bundle(file, config_required=not origins)
            config |= _checked(bundle_config, file)
            origins += [str(file)] if bundle_config else []
        elif file.name == _CONFIG_NAME:
            config = _checked(_read_json_object(file), file)
            origins.append(str(file))
        elif file.name == _INDEX_NAME:
            weights, shards = _read_shards(file)
            read += shards
        else:
            weights = _read_safetensors(file)
    weights_origin = str(directory / needed[-1])
    return _Files(
        config=config,
        config_origin=" and ".join(origins),
        weights=None if weights is None else _without_wrappers(weights, weights_origin),
        weights_origin=weights_origin,
        tokenizer=_read_tokenizer(directory),
        paths=tuple(read),
    )


def _files_needed(names: Sequence[str], *, where: str, weights_required: bool) -> list[str]:
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


def _files_to_download(names: Sequence[str], *, where: str, weights_required: bool) -> list[str]:
    """Choose what to download of a repository's directory; raise where it is no checkpoint."""
    needed = _files_needed(names, where=where, weights_required=weights_required)
    if _INDEX_NAME in needed:
        needed += filter(_SHARD_NAME.fullmatch, names)
    return [*needed, _TOKENIZER_NAME] if _TOKENIZER_NAME in names else needed


def preferred_files(directory: Path) -> list[Path]:
    """List absent files of a checkpoint's directory that would be read first if they were there."""

    def needed(names: Sequence[str]) -> list[str]:
        return _files_needed(names, where=str(directory), weights_required=False)

    try:
        names = [path.name for path in directory.iterdir()]
        now = needed(names)
    except (OSError, CheckpointNotFoundError):  # No checkpoint could be read from it either.
        return []
    return [directory / name for name in WEIGHT_NAMES if needed([*names, name]) != now]


def _checked(config: dict[str, Any], path: Path) -> dict[str, Any]:
    backend = config.get("model_backend")
    if backend == "transformer_engine":
        raise CheckpointError(
            f"{path}: model_backend {backend}: its blocks have other names, which are not read; "
            "save the model with the plain backend"
        )
    return config


def _read_tokenizer(directory: Path) -> str | None:
    path = directory / _TOKENIZER_NAME
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_TOKENIZER:
            return None
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return None


# Files, which are not trusted.


def _read_json_object(path: Path) -> dict[str, Any]:
    check_ordinary(path, CheckpointError)
    _read_head(path)
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {one_line(str(error))}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must be a JSON object; got a {type(values).__name__}")
    return values


def _read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        head = file.read(len(_LFS_POINTER))
    if head == _LFS_POINTER:
        raise CheckpointError(f"{path}: a git-LFS pointer, not the file itself; run git lfs pull")
    return head


def _read_safetensors(path: Path) -> dict[str, Any]:
    _read_head(path)
    try:
        # load_file would map the file. If it were cut short later, the process would be killed.
        return safetensors.torch.load(path.read_bytes())
    except OSError:
        raise
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
        if (
            not isinstance(file, str)
            or set("/\\\0") & set(file)
            or not file.endswith(".safetensors")
        ):
            raise CheckpointError(f"{index}: {one_line(str(file))} is not the name of a file there")
        names_of[file].append(name)
    weights: dict[str, Any] = {}
    for file, names in sorted(names_of.items()):
        path = index.parent / file
        if not path.exists():
            raise CheckpointError(f"{index}: no {one_line(file)}, which it names")
        check_ordinary(path, CheckpointError)
        held = _read_safetensors(path)
        missing = [name for name in names if name not in held]
        if missing:
            raise CheckpointError(f"{path}: lacks {first_few(missing)}, which {index.name} names")
        weights |= {name: held[name] for name in names}
    return weights, [index.parent / file for file in sorted(names_of)]


def _read_bundle(
    path: Path, *, config_required: bool = True
) -> tuple[dict[str, Any], Mapping[Any, Any]]:
    """Read the raw config, {} if it may be missing, and the state dict of a `.pt` bundle."""
    try:
        _check_archive(path)
        bundle = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, CheckpointError):
        raise
    except Exception as error:
        # For a foreign file torch.load raises errors of any type.
        raise CheckpointError(f"{path}: {_why_not_loaded(path)}") from error
    if not isinstance(bundle, dict) or not isinstance(bundle.get("model"), Mapping):
        raise CheckpointError(f"{path}: not a checkpoint bundle: no state dict under 'model'")
    tensors = [value for value in bundle["model"].values() if isinstance(value, Tensor)]
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > path.stat().st_size:
        raise CheckpointError(f"{path}: its weights are larger than the file: views of one another")
    training = bundle.get("training_config")
    training = training if isinstance(training, Mapping) else {}
    for config in (bundle.get("encoder_config"), training.get("encoder"), training.get("model")):
        if isinstance(config, Mapping) and config:
            # A null is not a value, so config.json's value stays.
            fields = {name: value for name, value in config.items() if value is not None}
            return fields, bundle["model"]
    if config_required:
        raise CheckpointError(
            f"{path}: no encoder_config (nor training_config['encoder'] or ['model'])"
        )
    return {}, bundle["model"]


def _check_archive(path: Path) -> None:
    """Refuse an archive whose members would take more memory than the file's size."""
    if not _read_head(path).startswith(b"PK\x03\x04"):
        raise CheckpointError(
            f"{path}: not a zip archive: damaged, or saved by torch before 1.6; save it again"
        )
    with zipfile.ZipFile(path) as archive:
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


# The state dict.


def _without_wrappers(weights: Mapping[Any, Any], origin: str) -> dict[str, Any]:
    """Strip the names of wrappers from a state dict's keys."""
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


def _config_of_weights(config: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config fields in which the weights win."""

    def rows(name: str) -> int:
        weight = weights.get(name)
        return weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else 0

    found: dict[str, Any] = {}
    vocabulary = config.get("input_vocab_size", EncoderConfig.input_vocab_size)
    embedded = rows("tok_emb.weight")
    if vocabulary is None or (isinstance(vocabulary, int) and 0 < vocabulary < embedded):
        found["input_vocab_size"] = embedded
    asked = config.get("head_type") or EncoderConfig.head_type
    if not isinstance(asked, str):
        return found
    modules = set(map(_module_of, weights))
    heads = [head for module, head in _HEADS.items() if module in modules]
    if asked not in heads:
        found["head_type"] = heads[0] if heads else "none"
    bins = rows("ev_heads.0.weight")
    if bins and "binned_ev" in heads:
        found["output_n_bins"] = bins
    return found


def _encoder_with(config: EncoderConfig, files: _Files) -> Encoder:
    assert files.weights is not None
    origin = files.weights_origin
    used = _TRUNK | {module for module, head in _HEADS.items() if head == config.head_type}
    weights = {name: value for name, value in files.weights.items() if _module_of(name) in used}
    others = sorted(set(map(_module_of, files.weights)) - used)
    for name, value in weights.items():
        if not _is_weight(value):
            raise CheckpointError(
                f"{origin}: {one_line(name)} must be a dense floating-point tensor"
            )
    # Shapes are compared on the meta device, before anything is allocated. One block more than the
    # weights can fill is enough to name the missing ones.
    layers = min(config.num_hidden_layers, len(weights) // _FEWEST_TENSORS_PER_BLOCK + 1)
    model = empty_encoder(replace(config, num_hidden_layers=layers))
    problems = misfits(model.state_dict(), weights)
    if problems:
        foreign = f"; not of this model {first_few(others)}" if others else ""
        raise CheckpointError(
            f"{origin}: the weights do not fit the config ({files.config_origin}): "
            f"{problems}{foreign}"
        )
    model.load_state_dict({name: it.to(torch.float32) for name, it in weights.items()}, assign=True)
    if others:
        warn(f"{origin}: {first_few(others, most=8)}: left out, as the model has no such module")
    _warn_of_nonfinite(model.state_dict(), origin)
    return model


def misfits(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """Say in one line how weights differ from a model's names and shapes; "" if they do not."""
    found = {
        "missing": [name for name in expected if name not in weights],
        "misshapen": [
            f"{name} {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
        "unexpected": sorted(name for name in weights if name not in expected),
    }
    return "; ".join(f"{kind} {first_few(names)}" for kind, names in found.items() if names)


def _warn_of_nonfinite(weights: Mapping[str, Tensor], origin: str) -> None:
    found = [
        f"{name} ({int(tensor.isnan().sum()):,} NaN, {int(tensor.isinf().sum()):,} infinite)"
        for name, tensor in weights.items()
        # A sum is a tenth of the work. A sum that overflows proves nothing.
        if not tensor.sum().isfinite() and not tensor.isfinite().all()
    ]
    if found:
        warn(f"{origin}: weights that are not finite: {first_few(found)}")


def _is_weight(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.is_floating_point()
        and value.device.type == "cpu"
    )


def _module_of(name: str) -> str:
    return name.partition(".")[0]


def one_line(text: str) -> str:
    """Quote text from a file in one line of bounded length."""
    text = text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def first_few(names: Sequence[str], *, most: int = 3) -> str:
    """Quote the first of some names from a file, and count the others."""
    more = len(names) - most
    return ", ".join(map(one_line, names[:most])) + (f" and {more} more" if more > 0 else "")
