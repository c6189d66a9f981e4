"""The model of a run: loaded from a checkpoint, or an Encoder that a caller hands in."""

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dump_activations.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    DumpActivationsError,
    InvalidArgumentError,
    option,
    warn,
)
from dump_activations.model.checkpoint_files import (
    CheckpointFiles,
    files_to_download,
    first_few,
    one_line,
    read_checkpoint,
)
from dump_activations.model.config import EncoderConfig, HeadType
from dump_activations.model.encoder import (
    Encoder,
    empty_encoder,
    random_encoder,
    replicate,
    weights_sha256,
)
from dump_activations.paths import locate
from dump_activations.progress import begin

_TRUNK = frozenset({"tok_emb", "pos_emb", "blocks", "final_ln"})
_HEADS: dict[str, HeadType] = {"ev_heads": "binned_ev", "policy_head": "action_policy"}
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
    source = os.fsdecode(init)
    load = _load_from_hub if "://" in source else _load_from_disk
    with torch.device("cpu"):  # in place of the caller's default device
        model = load(source, random_init=random_init, seed=seed)
    model.checkpoint, model.random_init = source, random_init
    return model.to(device).eval().requires_grad_(requires_grad=False)


def _load_from_hub(source: str, *, random_init: bool, seed: int) -> Encoder:
    from dump_activations.model.hub import download_checkpoint

    choose = partial(files_to_download, where=source, weights_required=not random_init)
    directory, commit = download_checkpoint(source, choose)
    begin("loading the checkpoint")
    try:
        model = _load_from_disk(str(directory), random_init=random_init, seed=seed)
    except (CheckpointError, CheckpointNotFoundError) as error:
        raise type(error)(f"{source}: {error.args[0]}") from error
    model.hub_commit = commit
    return model


def _load_from_disk(source: str, *, random_init: bool, seed: int) -> Encoder:
    path = locate(source)
    try:
        files = read_checkpoint(path, weights_required=not random_init)
    except DumpActivationsError:
        raise
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: {error.strerror or error}") from error
    fields = files.config
    if files.weights:
        fields = fields | _config_of_weights(fields, files.weights)
    try:
        config = EncoderConfig.from_dict(fields)
    except CheckpointError as error:
        raise CheckpointError(f"{files.config_origin}: {error.args[0]}") from error
    model = random_encoder(config, seed=seed) if random_init else _encoder_with(config, files)
    model.checkpoint_files = tuple(files.paths)
    model.tokenizer = files.tokenizer
    return model


def prepare_model(
    init: str | os.PathLike[str] | nn.Module,
    device: torch.device,
    *,
    random_init: bool = False,
    seed: int = 0,
) -> Encoder:
    """Return a run's own model in eval mode on a device, with `weights_sha256` set.

    Args:
        init: a checkpoint as `load_encoder` takes it; or an Encoder, which may be wrapped by
            torch.compile, DistributedDataParallel, DataParallel or AveragedModel. A run leaves it
            as it is.
        device: the run's device.
        random_init: load the checkpoint's architecture with untrained weights.
        seed: of the untrained weights.

    Raises:
        InvalidArgumentError: neither of these, or a model that does not match its config.
        DumpActivationsError: as `load_encoder` raises.
    """
    if isinstance(init, str | os.PathLike):
        model = load_encoder(init, random_init=random_init, seed=seed)
    elif random_init:
        raise InvalidArgumentError(
            f"{option('random_init')}: the model is loaded already; give load_encoder "
            "random_init=True"
        )
    else:
        model = unwrap_model(init)
    replica = replicate(model, device)
    # Of the model on the host, so that no weight comes back from the device.
    replica.weights_sha256 = weights_sha256(model)
    return replica


def unwrap_model(model: object) -> Encoder:
    """Take an Encoder out of the wrappers of training scripts, and check that it can be run.

    Raises:
        InvalidArgumentError: no Encoder, weights that are not plain tensors, or modules that
            differ from its config. The text says what to give instead.
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


def _encoder_with(config: EncoderConfig, files: CheckpointFiles) -> Encoder:
    assert files.weights is not None
    origin = files.weights_origin
    used = _TRUNK | {module for module, head in _HEADS.items() if head == config.head_type}
    weights = {name: value for name, value in files.weights.items() if _module_of(name) in used}
    others = sorted(set(map(_module_of, files.weights)) - used)
    for name, value in weights.items():
        is_dense = isinstance(value, Tensor) and value.layout == torch.strided
        if not (is_dense and value.is_floating_point() and value.device.type == "cpu"):
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


def _module_of(name: str) -> str:
    return name.partition(".")[0]
