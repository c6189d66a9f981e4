"""The model of a run: loaded from a checkpoint's files, or an Encoder that a caller hands in.

Checkpoints are not trusted: they cannot run code, name files outside of their directory, or take
memory beyond the size of their files.
"""

import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dump_activations.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidArgumentError,
    check_ordinary,
    locate,
    option,
    printable,
    switch,
    warn,
)
from dump_activations.model.config import HEAD_MODULES, EncoderConfig
from dump_activations.model.encoder import (
    Encoder,
    empty_encoder,
    random_encoder,
    replicate,
    weights_sha256,
)
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
_LONGEST_QUOTE = 200
_TRUNK = ("tok_emb", "pos_emb", "blocks", "final_ln")
# Two norms, four projections of the attention and three of the MLP.
_FEWEST_TENSORS_PER_BLOCK = 9
_WAY_OUT = (
    "give a checkpoint's path, or an Encoder as load_encoder returns it: with every block, "
    "adapters merged (merge_and_unload), not traced, sharded, quantised or parametrized"
)


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
        InvalidArgumentError: a malformed `hf://` address, or another URL.
    """
    source, commit = os.fsdecode(init), None
    if "://" in source:
        from dump_activations.model.hub import download_checkpoint

        def choose(names: Sequence[str]) -> list[str]:
            needed = _choose_files(names, source, weights_required=not random_init)
            if _INDEX_NAME in needed:
                needed += filter(_SHARD_NAME.fullmatch, names)
            return [*needed, _TOKENIZER_NAME] if _TOKENIZER_NAME in names else needed

        path, commit = download_checkpoint(source, choose)
        begin("loading the checkpoint")
    else:
        path = locate(source)
    try:
        with torch.device("cpu"):  # in place of the caller's default device
            model = _load(path, random_init=random_init, seed=seed)
    except (CheckpointError, CheckpointNotFoundError) as error:
        if commit is None:
            raise
        raise type(error)(f"{source}: {error.args[0]}") from error
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror or error}") from error
    model.checkpoint, model.random_init, model.hub_commit = source, random_init, commit
    return model.to(device).eval().requires_grad_(requires_grad=False)


def _load(path: Path, *, random_init: bool, seed: int) -> Encoder:
    paths = _paths_in(path, weights_required=not random_init)
    fields: dict[str, Any] = {}
    origins: list[str] = []
    weights: Mapping[str, Any] = {}
    shards: list[Path] = []
    for file in paths:
        _check_file(file)
        found: dict[str, Any] | None = None
        if file.name == _CONFIG_NAME:
            found = _read_json_object(file)
        elif file.name == _INDEX_NAME:
            weights, shards = _read_shards(file)
        elif file.suffix == ".safetensors":
            weights = _read_safetensors(file)
        else:
            found, weights = _read_bundle(file, config_required=not origins)
        if found is not None:
            fields |= found
            origins.append(str(file))
    origin, weights_origin = " and ".join(origins), str(paths[-1])
    weights = _without_wrappers(weights, weights_origin)
    if weights:
        fields |= _config_of_weights(fields, weights)
    try:
        config = EncoderConfig.from_dict(fields)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error.args[0]}") from error
    if random_init:
        model = random_encoder(config, seed=seed)
    else:
        model = _encoder_with(config, weights, origin, weights_origin)
    model.checkpoint_files = (*paths, *shards)
    model.tokenizer = _read_tokenizer(paths[0].parent)
    return model


def _paths_in(path: Path, *, weights_required: bool) -> list[Path]:
    """List the files to read: the config's first, the weights' last."""
    if path.is_dir():
        names = [file.name for file in path.iterdir()]
        needed = _choose_files(names, str(path), weights_required=weights_required)
        return [path / name for name in needed]
    if not path.exists():
        raise CheckpointNotFoundError(
            f"{path}: no such checkpoint; give a directory, a .pt bundle or hf://org/repo"
        )
    if path.suffix in (".json", ".safetensors"):
        raise CheckpointError(f"{path}: not a .pt bundle; give the directory that holds it")
    return [path]


def prepare_model(
    init: str | os.PathLike[str] | nn.Module,
    device: torch.device,
    *,
    random_init: bool = False,
    seed: int = 0,
) -> Encoder:
    """Return a run's own model in eval mode on a device, with `weights_sha256` set.

    `init` is a checkpoint as `load_encoder` takes it, or what `unwrap_model` takes.
    """
    # Digest the weights on the host, so that none comes back from the device.
    if isinstance(init, str | os.PathLike):
        model = load_encoder(init, random_init=random_init, seed=seed)
        model.weights_sha256 = weights_sha256(model)
        return model.to(device)
    if random_init:
        raise InvalidArgumentError(
            f"{option('random_init')}: the model is loaded already; give load_encoder "
            "random_init=True"
        )
    model = unwrap_model(init)
    replica = replicate(model, device)
    replica.weights_sha256 = weights_sha256(model)
    return replica


def unwrap_model(model: object) -> Encoder:
    """Take an Encoder out of the wrappers of training scripts, and check that it can be run.

    torch.compile, DistributedDataParallel, DataParallel and AveragedModel are taken off. Refused
    are other modules, weights that are not plain tensors, and modules that differ from the config.
    """
    inner = model
    while isinstance(inner, nn.Module) and not isinstance(inner, Encoder):
        wrapped = getattr(inner, "_orig_mod", getattr(inner, "module", None))
        if not isinstance(wrapped, nn.Module):
            break
        inner = wrapped
    if not isinstance(inner, Encoder):
        raise InvalidArgumentError(f"the model is a {type(model).__name__}; {_WAY_OUT}")
    for name, tensor in inner.state_dict(keep_vars=True).items():
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.is_meta:
            raise InvalidArgumentError(
                f"the model's {one_line(name)} must be a plain tensor with values; got a "
                f"{type(tensor).__name__} on {getattr(tensor, 'device', 'no device')}; {_WAY_OUT}"
            )
    problems = misfits(empty_encoder(inner.config).state_dict(), inner.state_dict())
    # Modules of its own that a subclass adds do no harm.
    if problems and not problems.startswith("unexpected"):
        raise InvalidArgumentError(
            f"the model's weights do not fit its config: {problems}; {_WAY_OUT}"
        )
    return inner


def _choose_files(names: Sequence[str], where: str, *, weights_required: bool) -> list[str]:
    """Choose the files of a checkpoint's directory: of the config, and of the weights."""
    weights = [name for name in WEIGHT_NAMES if name in names]
    bundles = [name for name in WEIGHT_NAMES if name.endswith(".pt")]
    config = [name for name in (_CONFIG_NAME, *bundles) if name in names][:1]
    others = sorted(name for name in names if name.endswith((".pt", ".safetensors")))
    hint = f"(to read another .pt, name it in {option('init')})"
    it_has = f"; it has {first_few(others, most=5)} {hint}" if others else ""
    if not config:
        raise CheckpointNotFoundError(
            f"{where}: not a checkpoint: neither {_CONFIG_NAME} nor a bundle with one of the names "
            f"{', '.join(bundles)}{it_has}"
        )
    if weights_required and not weights:
        raise CheckpointNotFoundError(
            f"{where}: no weights; expected one of {', '.join(WEIGHT_NAMES)} "
            f"({switch('random_init')} runs the untrained model){it_has}"
        )
    return list(dict.fromkeys([*config, *weights[:1]]))


def preferred_files(directory: Path) -> list[Path]:
    """List absent files of a checkpoint's directory that would be read first if they were there."""
    paths = [directory / name for name in WEIGHT_NAMES]
    absent = list(takewhile(lambda path: not path.exists(), paths))
    has_config = (directory / _CONFIG_NAME).exists()
    return absent if has_config or len(absent) < len(paths) else []


def _read_tokenizer(directory: Path) -> str | None:
    path = directory / _TOKENIZER_NAME
    with suppress(OSError, UnicodeDecodeError):
        if path.is_file() and path.stat().st_size <= _LARGEST_TOKENIZER:
            return path.read_bytes().decode()
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
    held: dict[str, dict[str, Any]] = {}
    for file in sorted(set(map(str, weight_map.values()))):
        path = index.parent / file
        # A path in the place of a name could lead out of the directory.
        if not re.fullmatch(r"[^/\\\0]+\.safetensors", file) or not path.exists():
            raise CheckpointError(f"{index}: {one_line(file)} is not the name of a file there")
        _check_file(path)
        held[file] = _read_safetensors(path)
    missing = [name for name, file in weight_map.items() if name not in held[file]]
    if missing:
        raise CheckpointError(f"{index}: {first_few(missing)} missing from the file it names")
    weights = {name: held[file][name] for name, file in weight_map.items()}
    return weights, [index.parent / file for file in held]


def _read_bundle(path: Path, *, config_required: bool) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Read the raw config, {} if it may be missing, and the state dict of a `.pt` bundle."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise CheckpointError(
                    f"{path}: not a zip archive: damaged, or saved by torch before 1.6; "
                    "save it again"
                )
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > size:
            raise CheckpointError(
                f"{path}: its members are larger than the file, compressed or overlapping; save it "
                "with torch.save"
            )
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
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > size:
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


def _config_of_weights(config: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config fields in which the weights win."""

    def rows(name: str) -> int:
        weight = weights.get(name)
        return weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else 0

    found: dict[str, Any] = {}
    vocabulary, embedded = config.get("input_vocab_size"), rows("tok_emb.weight")
    if embedded and (vocabulary is None or vocabulary in range(1, embedded)):
        found["input_vocab_size"] = embedded
    modules = set(map(_module_of, weights))
    heads = [head for head, module in HEAD_MODULES.items() if module in modules]
    if (config.get("head_type") or EncoderConfig.head_type) not in heads:
        found["head_type"] = heads[0] if heads else "none"
    if bins := rows("ev_heads.0.weight"):
        found["output_n_bins"] = bins
    return found


def _encoder_with(
    config: EncoderConfig, weights: Mapping[str, Any], config_origin: str, origin: str
) -> Encoder:
    used = {*_TRUNK, HEAD_MODULES.get(config.head_type)}
    others = sorted({_module_of(name) for name in weights} - used)
    weights = {name: value for name, value in weights.items() if _module_of(name) in used}
    for name, value in weights.items():
        is_dense = isinstance(value, Tensor) and value.layout == torch.strided
        if not (is_dense and value.is_floating_point() and value.device.type == "cpu"):
            raise CheckpointError(
                f"{origin}: {one_line(name)} must be a dense floating-point tensor"
            )
    # Compare shapes on the meta device, before anything is allocated. One block more than the
    # weights can fill is enough to name the missing ones.
    layers = min(config.num_hidden_layers, len(weights) // _FEWEST_TENSORS_PER_BLOCK + 1)
    model = empty_encoder(replace(config, num_hidden_layers=layers))
    problems = misfits(model.state_dict(), weights)
    if problems:
        foreign = f"; not of this model {first_few(others)}" if others else ""
        raise CheckpointError(
            f"{origin}: the weights do not fit the config ({config_origin}): {problems}{foreign}"
        )
    model.load_state_dict({name: it.to(torch.float32) for name, it in weights.items()}, assign=True)
    if others:
        warn(f"{origin}: {first_few(others, most=8)}: left out, as the model has no such module")
    nonfinite = [
        f"{name} ({int(tensor.isnan().sum()):,} NaN, {int(tensor.isinf().sum()):,} infinite)"
        for name, tensor in model.state_dict().items()
        # A sum is a tenth of the work. A sum that overflows proves nothing.
        if not tensor.sum().isfinite() and not tensor.isfinite().all()
    ]
    if nonfinite:
        warn(f"{origin}: weights that are not finite: {first_few(nonfinite)}")
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


def _module_of(name: str) -> str:
    return name.partition(".")[0]


def one_line(text: str) -> str:
    """Quote text from a file in one line of bounded length."""
    return printable(text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}...")


def first_few(names: Sequence[str], *, most: int = 3) -> str:
    """Quote the first of some names from a file, and count the others."""
    more = len(names) - most
    return ", ".join(map(one_line, names[:most])) + (f" and {more} more" if more > 0 else "")
