"""Loads a checkpoint into an Encoder: a directory, a `.pt` bundle, or `hf://org/repo`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dump_activations.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    DumpActivationsError,
)
from dump_activations.model.checkpoint_files import (
    CheckpointFiles,
    files_to_download,
    read_checkpoint,
)
from dump_activations.model.config import EncoderConfig
from dump_activations.model.encoder import Encoder
from dump_activations.model.state_dict import (
    config_of_weights,
    misfits,
    take_weights,
    warn_of_nonfinite,
    warn_of_others,
)
from dump_activations.progress import begin

_HUB_SCHEME = "hf://"
# Two norms, four projections of the attention and three of the MLP.
_FEWEST_TENSORS_A_BLOCK = 9
_RANDOM_INIT_SEED = 0


def load_encoder(
    init: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    random_init: bool = False,
) -> Encoder:
    """Load a checkpoint as an fp32 Encoder in eval mode, its parameters without gradients.

    Weights that the model has no part for are left out, with one warning.

    Args:
        init: a checkpoint directory, a `.pt` bundle, or `hf://org/repo[/subdir][@revision]`.
        device: where the weights go.
        random_init: give the checkpoint's architecture untrained weights (PyTorch's default
            initialisation, always the same ones) instead of its own, which it need not have.

    Raises:
        CheckpointNotFoundError: no such checkpoint, or no weights in it.
        CheckpointError: the config or the weights are damaged, contradictory or do not fit.
        InvalidArgumentError: `hf://` and no name of a repository.
    """
    return load_announced(init, lambda _: None, device=device, random_init=random_init)


def load_announced(
    init: str | os.PathLike[str],
    announce: Callable[[EncoderConfig], object],
    *,
    device: str | torch.device,
    random_init: bool,
) -> Encoder:
    """Do as `load_encoder` does, and call `announce` as soon as the config is known."""
    source = os.fspath(init)
    if not source.startswith(_HUB_SCHEME):
        model = _load(Path(source), announce, random_init=random_init)
    else:
        from dump_activations.model.hub import download_checkpoint

        choose = partial(files_to_download, where=source, weights_required=not random_init)
        directory, commit = download_checkpoint(source, choose)
        begin("loading the checkpoint")
        try:
            model = _load(directory, announce, random_init=random_init)
        except (CheckpointError, CheckpointNotFoundError) as error:
            raise type(error)(f"{source}: {error.args[0]}") from error
        model.hub_commit = commit
    model.checkpoint = source
    model.random_init = random_init
    return model.to(device).eval().requires_grad_(requires_grad=False)


def _load(path: Path, announce: Callable[[EncoderConfig], object], *, random_init: bool) -> Encoder:
    try:
        files = read_checkpoint(path, weights_required=not random_init)
    except OSError as error:
        if isinstance(error, DumpActivationsError):
            raise
        named = error.filename or path
        raise CheckpointError(f"{named}: {error.strerror or error}") from error
    said = config_of_weights(files.config, files.weights) if files.weights else {}
    try:
        config = EncoderConfig.from_dict(files.config | said)
    except CheckpointError as error:
        raise CheckpointError(f"{files.config_origin}: {error.args[0]}") from error
    announce(config)
    model = _random_encoder(config) if random_init else _encoder_with(config, files)
    model.checkpoint_files = files.paths
    model.tokenizer = files.tokenizer
    return model


def _random_encoder(config: EncoderConfig) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_INIT_SEED)
        return Encoder(config)


def _encoder_with(config: EncoderConfig, files: CheckpointFiles) -> Encoder:
    assert files.weights is not None
    weights, others = take_weights(config, files.weights, files.weights_origin)
    # On the meta device nothing is allocated until the shapes are known to be the file's; a block
    # more than the weights can fill is enough to say which are missing.
    layers = min(config.num_hidden_layers, len(weights) // _FEWEST_TENSORS_A_BLOCK + 1)
    with torch.device("meta"), _NoInitialisation():
        model = Encoder(replace(config, num_hidden_layers=layers))
    problems = misfits(model.state_dict(), weights, others)
    if problems:
        raise CheckpointError(
            f"{files.weights_origin}: the weights do not fit the config "
            f"({files.config_origin}): {problems}"
        )
    assert layers == config.num_hidden_layers
    model.load_state_dict(
        {name: tensor.to(torch.float32) for name, tensor in weights.items()}, assign=True
    )
    warn_of_others(others, files.weights_origin)
    warn_of_nonfinite(model.state_dict(), files.weights_origin)
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
