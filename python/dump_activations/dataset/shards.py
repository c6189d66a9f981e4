"""The shards of a dataset: finds them, opens them, and reads the layouts of their rows."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dump_activations import _rust
from dump_activations.dataset.headers import read_layout, row_dtype
from dump_activations.errors import warn

# Marks of copies, in lower case, that `find` of the extension leaves out too: `steps-0 (1).npy`,
# `steps-0 copy 2.npy`, `steps-0 - Copy.npy`, `steps-0 (conflicted copy ...).npy` and
# `steps-0.sync-conflict-....npy`.
_COPY_MARKS = (" (", " copy", ".sync-conflict-")


class Shard(NamedTuple):
    """One file of a dataset: its path, its rows, and the global step index of its first row."""

    path: Path
    rows: int
    first: int


def open_shards(path: str | os.PathLike[str]) -> _rust.Dataset:
    """Open a directory's `steps-*.npy` in lexicographic order, or else its `steps.npy`.

    Warns of copies that synchronisers made, which are left out, and of odd numbers.

    Raises:
        DatasetNotFoundError: there is no such directory, or no shard in it.
        DatasetError: a shard's header, fields or size are not those of a dataset of steps.
    """
    directory = Path(os.path.expanduser(path))  # noqa: PTH111 - `~nobody` is a name, not an error
    names = [each.name for each in directory.glob("steps-*.npy")]
    copies = sorted(name for name in names if any(mark in name.lower() for mark in _COPY_MARKS))
    if copies:
        warn(
            f"{directory}: {len(copies)} files are left out, because they are named like copies: "
            f"{copies[0]}{' and others' if copies[1:] else ''}; remove or rename them"
        )
    dataset = _rust.Dataset(directory, read_layout)
    _warn_of_numbers(dataset.path, dataset.names)
    return dataset


def _warn_of_numbers(path: Path, names: Sequence[str]) -> None:
    """Warn where numbered shards are not in the order of their numbers, or some are missing."""
    matches = [re.fullmatch(r"steps-([0-9]+)\.npy", name) for name in names]
    numbers = [int(match[1]) for match in matches if match]
    if len(numbers) < len(names):
        return
    # Packers count from 0 or from 1.
    expected = range(min(numbers[0], 1), min(numbers[0], 1) + len(numbers))
    odd = next((i for i, (n, e) in enumerate(zip(numbers, expected, strict=True)) if n != e), None)
    if odd is None:
        return
    if numbers != sorted(set(numbers)):
        problem = f"shards are read in the order of their names, not their numbers: {names[odd]}"
    else:
        problem = (
            f"shard number {expected[odd]} before {names[odd]} is missing; step indices count the "
            "rows of the shards that are there"
        )
    warn(f"{path}: {problem}")


def row_layouts(dataset: _rust.Dataset) -> list[tuple[Path, np.dtype[np.void]]]:
    """Return each distinct layout of rows: the first shard that has it, and the rows' dtype."""
    first: dict[str, Path] = {}
    for descr, (path, _, _) in zip(dataset.descrs, dataset.shards, strict=True):
        first.setdefault(descr, path)
    return [(path, row_dtype(path, descr)) for descr, path in first.items()]


def layout_sha256(dataset: _rust.Dataset) -> str:
    """Digest the shards' names, row counts and row layouts, but no row."""
    shards = [
        [name, rows, descr]
        for name, (_, rows, _), descr in zip(
            dataset.names, dataset.shards, dataset.descrs, strict=True
        )
    ]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()
