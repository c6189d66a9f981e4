"""Reads weights from `.safetensors` files and `.pt` bundles, which are not trusted."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dump_activations.errors import CheckpointError

# torch.compile and DistributedDataParallel name their wrappers so, around any module.
_WRAPPERS = re.compile(r"\b(?:_orig_mod|module)\.")

_LONGEST_QUOTE = 200


def one_line(text: str) -> str:
    """Quote text from a file, which may hold anything, in one line of bounded length."""
    text = text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the weights of a `.safetensors` file by their names, without wrapper prefixes.

    Raises:
        CheckpointError: the file is damaged or holds something else than weights.
    """
    try:
        # Not load_file, which maps the file: cut short later, it would kill the process.
        tensors = safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except Exception as error:
        # Of a damaged header torch raises whatever its dtypes and shapes lead to.
        reason = one_line(str(error))
        raise CheckpointError(f"{path}: not a readable safetensors file: {reason}") from error
    return _clean_weights(tensors, path)


def read_bundle(
    path: Path, *, config_required: bool = True
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the raw config and the weights of a `.pt` bundle. No code in it is run.

    Without `config_required`, a bundle that has no config gives an empty one.

    Raises:
        CheckpointError: the file is damaged, is no bundle, or needs code to be loaded.
    """
    try:
        _refuse_inflation(path)
        bundle = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except Exception as error:
        # torch.load raises whatever its unpickler and zip reader meet on a foreign file.
        raise CheckpointError(f"{path}: {_why_not_loaded(path)}") from error
    if not isinstance(bundle, dict) or not isinstance(bundle.get("model"), Mapping):
        raise CheckpointError(f"{path}: not a checkpoint bundle: no state dict under 'model'")
    return (
        _bundle_config(bundle, path, required=config_required),
        _clean_weights(bundle["model"], path),
    )


def _refuse_inflation(path: Path) -> None:
    """Refuse an archive whose members take more memory than its size: torch.save compresses none.

    Raises:
        zipfile.BadZipFile: it is a damaged archive.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        inflated = sum(member.file_size for member in archive.infolist())
    if inflated > path.stat().st_size:
        raise CheckpointError(
            f"{path}: its members are compressed; save it with torch.save as it is"
        )


def _why_not_loaded(path: Path) -> str:
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        foreign = []
    if not foreign:
        return "damaged, or not a checkpoint bundle written by torch.save"
    return (
        f"holds objects that could run code ({one_line(', '.join(sorted(foreign)))}), which are "
        "never loaded; save it again with 'model' and 'encoder_config' alone"
    )


def _bundle_config(bundle: dict[str, Any], path: Path, *, required: bool) -> dict[str, Any]:
    training = bundle.get("training_config")
    training = training if isinstance(training, Mapping) else {}
    for config in (bundle.get("encoder_config"), training.get("encoder"), training.get("model")):
        if isinstance(config, Mapping) and config:
            # A null is no value, hence none to win over config.json's.
            return {name: value for name, value in config.items() if value is not None}
    if required:
        raise CheckpointError(
            f"{path}: no encoder_config (nor training_config['encoder'] or ['model'])"
        )
    return {}


def _clean_weights(weights: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    clean: dict[str, Tensor] = {}
    for key, value in weights.items():
        if not isinstance(key, str) or not _is_weight(value):
            raise CheckpointError(
                f"{path}: {one_line(brief(key))} is not a dense floating-point tensor"
            )
        name = _WRAPPERS.sub("", key)
        if name in clean:
            raise CheckpointError(
                f"{path}: two tensors named {one_line(name)} once wrapper names are stripped"
            )
        clean[name] = value
    return clean


def _is_weight(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.is_floating_point()
        and value.device.type == "cpu"
        # A view that repeats a small storage would grow past what the file holds.
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )
