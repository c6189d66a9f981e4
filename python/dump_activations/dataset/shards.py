"""The shards of a dataset: finds them, opens them, and reads the layouts of their rows.

The extension cuts the text of the dtype out of each header, and NumPy reads each distinct text.
"""

import ast
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dump_activations import _rust
from dump_activations.dtypes import CELLS
from dump_activations.errors import (
    DatasetError,
    DatasetNotFoundError,
    is_url,
    note,
    size_text,
    warn,
)
from dump_activations.remote import header_nbytes, local_dataset
from dump_activations.remote.mirror import fetch, is_mirror, requests_for

# Marks of copies, in lower case: `steps-0 (1).npy`, `steps-0 copy 2.npy`, `steps-0 - Copy.npy`,
# `steps-0 (conflicted copy ...).npy` and `steps-0.sync-conflict-....npy`.
_COPY_MARKS = (" (", " copy", ".sync-conflict-")
# Rows of datasets have some 50 bytes. All bytes between the board and its mask are read with them.
_MAX_ITEMSIZE = 1 << 20
# Characters of a hostile text, and field names, that an error shows.
_SHOWN = 200
_NAMES_SHOWN = 20

_BOARD_FIELDS = {
    "board": np.dtype("<u8"),
    "tile_65536_mask": np.dtype("<u2"),
    "exps": np.dtype((np.uint8, (CELLS,))),
}


class Shard(NamedTuple):
    """One file of a dataset: its path, its rows, and the global step index of its first row."""

    path: Path
    rows: int
    first: int


def open_shards(path: str | os.PathLike[str]) -> _rust.Dataset:
    """Open a directory's `steps-*.npy` in lexicographic order, or else its `steps.npy`.

    Warns of copies that synchronisers made, which are left out, and of odd numbers.
    """
    if is_url(path):
        path = local_dataset(os.fspath(path))
    directory = Path(os.path.expanduser(path))  # noqa: PTH111 - `~nobody` is a name, not an error
    try:
        listed = os.listdir(directory)  # noqa: PTH208 - names are many, and need no Path
    except (FileNotFoundError, NotADirectoryError) as error:
        problem = "no such" if isinstance(error, FileNotFoundError) else "not a"
        raise DatasetNotFoundError(
            f"{directory}: {problem} directory; name the directory that holds the shards"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"{directory}: cannot be opened: {reason}") from error
    names = [name for name in listed if name.startswith("steps-") and name.endswith(".npy")]
    copies = sorted(name for name in names if any(mark in name.lower() for mark in _COPY_MARKS))
    if copies:
        others = f" and {len(copies) - 1} more" if copies[1:] else ""
        warn(
            f"{directory}: left out {copies[0]}{others}, named like copies of shards; remove or "
            "rename them"
        )
    names = sorted({*names} - {*copies}, key=os.fsencode)
    if not names and "steps.npy" not in listed:
        raise DatasetNotFoundError(
            f"{directory}: no shards; a dataset holds steps-*.npy files or one steps.npy"
        )
    dataset = _rust.Dataset(directory, names or ["steps.npy"], read_layout)
    _warn_of_numbers(directory, names)
    if is_mirror(directory / (names or ["steps.npy"])[0]):
        _places[dataset.path] = _find_places(dataset)
    return dataset


def _warn_of_numbers(directory: Path, names: Sequence[str]) -> None:
    matches = [re.fullmatch(r"steps-([0-9]+)\.npy", name) for name in names]
    numbers = [int(match[1]) for match in matches if match]
    if not numbers or len(numbers) < len(names):
        return
    first = min(numbers[0], 1)  # Packers count from 0 or from 1.
    odd = next((i for i, number in enumerate(numbers) if number != first + i), None)
    if odd is None:
        return
    if numbers != sorted(set(numbers)):
        problem = f"shards are read in the order of their names, not their numbers: {names[odd]}"
    else:
        problem = (
            f"shard number {first + odd} before {names[odd]} is missing; step indices count the "
            "rows of the shards that are there"
        )
    warn(f"{directory}: {problem}")


def row_dtype(path: Path, descr: str) -> np.dtype[np.void]:
    """Return the dtype of a shard's rows from the text in its header, padding included."""
    try:
        dtype = np.lib.format.descr_to_dtype(ast.literal_eval(descr))
        "".join(dtype.names or ()).encode()  # Messages can then show the names.
    except Exception as error:  # NumPy raises almost anything on a damaged text.
        reason = str(error).partition("\n")[0][:_SHOWN] or type(error).__name__
        raise DatasetError(
            f"{path}: NumPy refuses its dtype ({reason}); write the shard with numpy.save"
        ) from error
    if dtype.hasobject:
        raise DatasetError(
            f"{path}: its rows hold pickled Python objects, which are never loaded; "
            "save plain numbers"
        )
    if dtype.names is None:
        raise DatasetError(f"{path}: its rows must have named fields; got {str(dtype)[:_SHOWN]}")
    if dtype.itemsize > _MAX_ITEMSIZE:
        raise DatasetError(
            f"{path}: its rows must have at most {_MAX_ITEMSIZE} bytes; got {dtype.itemsize}"
        )
    return dtype


def read_layout(path: Path, descr: str) -> tuple[int, int | None, int | None, int | None]:
    """Return the bytes of a row and the offsets of `board`, `tile_65536_mask` and `exps`.

    None stands for a field that rows lack. `board` wins over `exps`.
    """
    row = row_dtype(path, descr)
    fields = {name: row.fields[name] for name in row.names or () if row.fields}
    names = ["board", "tile_65536_mask"] if "board" in fields else ["exps"]
    found = {name: fields[name] for name in names if name in fields}
    if not found:
        shown = [repr(name[:_SHOWN]) for name in [*fields][:_NAMES_SHOWN]]
        raise DatasetError(
            f"{path}: its rows must have 'board' or 'exps'; got {', '.join(shown) or 'no fields'}"
        )
    for name, (dtype, *_) in found.items():
        if dtype != _BOARD_FIELDS[name]:
            raise DatasetError(
                f"{path}: field {name!r} must be little-endian {_BOARD_FIELDS[name]}; "
                f"got {str(dtype)[:_SHOWN]}; convert it and save the shard again"
            )
    board, mask, exps = (found[name][1] if name in found else None for name in _BOARD_FIELDS)
    return row.itemsize, board, mask, exps


class _Places(NamedTuple):
    """Where the rows of a remote dataset lie: per shard, its first step and byte, bytes per row."""

    paths: list[Path]
    firsts: NDArray[np.int64]
    starts: NDArray[np.int64]
    nbytes: NDArray[np.int64]


# By directory; local datasets are not in it.
_places: dict[Path, _Places] = {}


def fetch_rows(
    dataset: _rust.Dataset, steps: NDArray[np.int64] | range, cancel: _rust.Cancel | None = None
) -> None:
    """Make rows of a remote dataset local, by their step indices (n,); a local one has them.

    Another thread ends it early by `cancel`.
    """
    places = _places.get(dataset.path)
    if places is None:
        return
    steps = np.sort(steps)
    steps = steps[(steps >= 0) & (steps < dataset.rows)]  # The read refuses the others.
    if not len(steps):
        return
    shards = np.searchsorted(places.firsts, steps, "right") - 1
    begins = places.starts[shards] + (steps - places.firsts[shards]) * places.nbytes[shards]
    touched, cuts = np.unique(shards, return_index=True)
    spans = {
        places.paths[shard]: (of_shard, of_shard + places.nbytes[shard])
        for shard, of_shard in zip(touched, np.split(begins, cuts[1:]), strict=True)
    }
    fetch(requests_for(spans), cancel and cancel.is_asked)


def note_transfer(dataset: _rust.Dataset, rows: range) -> None:
    """Note how much a read of consecutive rows of a remote dataset transfers."""
    places = _places.get(dataset.path)
    if places is None:
        return
    stops = np.append(places.firsts[1:], dataset.rows)
    cuts = (np.clip(step, places.firsts, stops) - places.firsts for step in (rows.start, rows.stop))
    begins, ends = (places.starts + cut * places.nbytes for cut in cuts)
    spans = zip(np.split(begins, len(begins)), np.split(ends, len(ends)), strict=True)
    requests = requests_for(dict(zip(places.paths, spans, strict=True)))
    if nbytes := sum(each.nbytes for each in requests):
        note(f"a scan of {len(rows):,} remote rows transfers {size_text(nbytes)}")


def _find_places(dataset: _rust.Dataset) -> _Places:
    paths, _, firsts = zip(*dataset.shards, strict=True)
    nbytes = {descr: row_dtype(paths[0], descr).itemsize for descr in {*dataset.descrs}}
    return _Places(
        list(paths),
        np.array(firsts),
        np.array([header_nbytes(path) for path in paths]),
        np.array([nbytes[descr] for descr in dataset.descrs]),
    )
