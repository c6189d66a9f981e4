"""Reads the files of a checkpoint that are not trusted: JSON, and `.safetensors`, one or many."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch

from dump_activations.errors import CheckpointError
from dump_activations.paths import check_ordinary

SAFETENSORS_SUFFIX = ".safetensors"
# Hundreds of times any real one; the largest takes some seconds to parse.
_LARGEST_HEADER = _LARGEST_JSON = 4 << 20
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LONGEST_QUOTE = 200


def one_line(text: str) -> str:
    """Quote text from a file, which may hold anything, in one line of bounded length."""
    text = text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def first_few(names: Sequence[str], *, most: int = 3) -> str:
    """Quote the first of some names from a file, and count the others."""
    more = len(names) - most
    return ", ".join(map(one_line, names[:most])) + (f" and {more} more" if more > 0 else "")


def read_head(path: Path) -> bytes:
    """Read the first bytes of a file; CheckpointError where it only stands for one in git-LFS."""
    with path.open("rb") as file:
        head = file.read(len(_LFS_POINTER))
    if head == _LFS_POINTER:
        raise CheckpointError(f"{path}: a git-LFS pointer, not the file itself; run git lfs pull")
    return head


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a small file.

    Raises:
        CheckpointError: the file is large, not JSON, or something else than an object.
    """
    check_ordinary(path, CheckpointError)
    read_head(path)
    if path.stat().st_size > _LARGEST_JSON:
        raise CheckpointError(f"{path}: more than {_LARGEST_JSON >> 20} MiB, which none should be")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {one_line(str(error))}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, not a {type(values).__name__}")
    return values


def read_safetensors(path: Path) -> dict[str, Any]:
    """Read the tensors of a `.safetensors` file by their names.

    Raises:
        CheckpointError: the file is damaged.
    """
    header_size = int.from_bytes(read_head(path)[:8], "little")
    if _LARGEST_HEADER < header_size <= path.stat().st_size:
        raise CheckpointError(
            f"{path}: its header is {header_size:,} bytes, of which a checkpoint has no need"
        )
    try:
        # Not load_file, which maps the file: cut short later, it would kill the process.
        return safetensors.torch.load(path.read_bytes())
    except OSError:
        raise
    except Exception as error:
        # Of a damaged header torch raises whatever its dtypes and shapes lead to.
        reason = one_line(str(error))
        raise CheckpointError(f"{path}: not a readable safetensors file: {reason}") from error


def read_shards(index: Path) -> tuple[dict[str, Any], list[Path]]:
    """Read the tensors that an index of sharded safetensors names, and list their files.

    Raises:
        CheckpointError: the index is damaged or names files elsewhere; a file is missing, is
            damaged, or lacks what the index says is in it.
    """
    weights: dict[str, Any] = {}
    names_of = _shards_of(index)
    paths = {file: index.parent / file for file in names_of}
    for file, path in paths.items():
        if not path.exists():
            raise CheckpointError(f"{index}: no {one_line(file)}, which it names")
        check_ordinary(path, CheckpointError)
        held = read_safetensors(path)
        missing = [name for name in names_of[file] if name not in held]
        if missing:
            raise CheckpointError(f"{path}: lacks {first_few(missing)}, which {index.name} names")
        weights |= {name: held[name] for name in names_of[file]}
    return weights, list(paths.values())


def _shards_of(index: Path) -> dict[str, list[str]]:
    names_of: dict[str, list[str]] = defaultdict(list)
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map, which says what is in which file")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise CheckpointError(f"{index}: {one_line(str(file))} is not the name of a file there")
        names_of[file].append(name)
    return dict(sorted(names_of.items()))


def _is_plain_name(file: str) -> bool:
    return file.endswith(SAFETENSORS_SUFFIX) and not set("/\\\0") & set(file)
