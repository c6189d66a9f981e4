"""Reads training bundles, `.pt` files that torch.save wrote, which are not trusted."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dump_activations.errors import CheckpointError
from dump_activations.model.weight_files import one_line, read_head
from dump_activations.pickles import check_pickle

BUNDLE_SUFFIX = ".pt"
_ZIP_START = b"PK\x03\x04"
_LOCAL_HEADER_SIZE = 30


def read_bundle(
    path: Path, *, config_required: bool = True
) -> tuple[dict[str, Any], Mapping[Any, Any]]:
    """Read the raw config and the state dict of a `.pt` bundle. No code in it is run.

    Without `config_required`, a bundle that has no config gives an empty one.

    Raises:
        CheckpointError: the file is damaged, is no bundle, or needs code to be loaded.
    """
    try:
        _check_archive(path)
        bundle = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, CheckpointError):
        raise
    except Exception as error:
        # torch.load raises whatever its unpickler and zip reader meet on a foreign file.
        raise CheckpointError(f"{path}: {_why_not_loaded(path)}") from error
    if not isinstance(bundle, dict) or not isinstance(bundle.get("model"), Mapping):
        raise CheckpointError(f"{path}: not a checkpoint bundle: no state dict under 'model'")
    tensors = [value for value in bundle["model"].values() if isinstance(value, Tensor)]
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > path.stat().st_size:
        raise CheckpointError(f"{path}: its weights are larger than the file: views of one another")
    return _bundle_config(bundle, path, required=config_required), bundle["model"]


def _check_archive(path: Path) -> None:
    """Refuse an archive that torch.save does not write and that could take more than its size.

    Raises:
        zipfile.BadZipFile: it is a damaged archive.
        RuntimeError: it is none of torch.save's.
    """
    if not read_head(path).startswith(_ZIP_START):
        raise CheckpointError(
            f"{path}: not a zip archive: damaged, or saved by torch before 1.6; save it again"
        )
    with zipfile.ZipFile(path) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(
            f"{path}: its members are compressed; save it with torch.save as it is"
        )
    if len({member.filename for member in members}) < len(members):
        raise CheckpointError(f"{path}: two of its members have one name")
    ends = [*(member.header_offset for member in members[1:]), path.stat().st_size]
    for member, end in zip(members, ends, strict=True):
        if member.header_offset + _LOCAL_HEADER_SIZE + member.file_size > end:
            raise CheckpointError(f"{path}: its members overlap, or lie outside the file")
    try:
        # From the reader that torch.load uses, so that both see the same bytes.
        check_pickle(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))
    except ValueError as error:
        raise CheckpointError(f"{path}: its data.pkl is refused: {one_line(str(error))}") from error


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
