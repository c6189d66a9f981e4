"""A dump by its name: the file, or else its shards as one.

Shards of one dump share a fingerprint; each holds consecutive boards of the run.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dump_activations.errors import OutputError, warn
from dump_activations.storage.digests import INTEGRITY_KEY
from dump_activations.storage.formats.contents import Contents, StoredTensor
from dump_activations.storage.formats.registry import format_of
from dump_activations.storage.reading.inspection import Inspection, inspect
from dump_activations.storage.reading.keys import Catalog
from dump_activations.storage.shards import Shard, list_shards

# Metadata that describes one shard and not the dump.
_OF_ONE_SHARD = ("shard", "first_board", INTEGRITY_KEY)


@dataclass(frozen=True)
class DumpShards:
    """The shards of one dump in its directory.

    Attributes:
        whole: the name of the whole dump.
        count: shards of the dump.
        finished: paths of the finished shards, in order.
        partial: paths of the unfinished ones that are there, in order.
    """

    whole: Path
    count: int
    finished: Mapping[Shard, Path]
    partial: Mapping[Shard, Path]

    @cached_property
    def boards(self) -> tuple[int, int | None]:
        """Boards in the finished shards, and in the dump; None before a shard is finished."""
        found = [inspect(path) for path in self.finished.values()]
        done = sum(each.tensor("indices").shape[0] for each in found)
        return done, int(found[0].contents.metadata["n_samples"]) if found else None

    @property
    def missing(self) -> list[Shard]:
        """Shards that are not finished."""
        shards = [Shard(self.whole, number, self.count) for number in range(1, self.count + 1)]
        return [shard for shard in shards if shard not in self.finished]


def inspect_dump(path: str | os.PathLike[str]) -> Inspection:
    """Read the headers of a dump: of the file of this name, or else of all its shards.

    Raises:
        InvalidArgumentError: the suffix names no format.
        OutputError: a file cannot be read or is not of its format, a shard is missing, or the
            shards do not belong together.
    """
    path = Path(path).expanduser()
    file_format = format_of(path)
    if os.path.lexists(path):
        _warn_of_shards(path)
        return inspect(path)
    shards = find_shards(path)
    if shards is None:
        return inspect(path)  # which raises that there is no such file
    if shards.missing:
        raise OutputError(
            f"{shards.missing[0].path} is missing: {len(shards.finished)} of {shards.count} shards "
            "are finished; run the same dump command again, which writes the others"
        )
    files = [inspect(each) for each in shards.finished.values()]
    _check_together(list(shards.finished), files)
    size = sum(each.size for each in files)
    return Inspection(path, file_format, size, _joined_contents(files), shards=tuple(files))


def find_shards(whole: Path) -> DumpShards | None:
    """List the shards of a dump, finished or not; None if there are none.

    Raises:
        OutputError: the directory cannot be listed, or has shards of dumps of different counts.
    """
    finished, partial = list_shards(whole), list_shards(whole, ".partial")
    first_of = {shard.count: path for shard, path in reversed(list((finished or partial).items()))}
    if len(first_of) > 1:
        raise OutputError(
            f"{' and '.join(map(str, sorted(first_of.values())))} are shards of different dumps; "
            "move or remove one of the dumps"
        )
    if not first_of:
        return None
    [count] = first_of
    return DumpShards(whole, count, finished, partial)


def _warn_of_shards(path: Path) -> None:
    shards: Mapping[Shard, Path] = {}
    with suppress(OutputError):  # A file can be read in a directory that cannot be listed.
        shards = list_shards(path)
    if shards:
        warn(
            f"{path} is read; shards of the same name lie next to it, "
            f"{next(iter(shards.values())).name}: remove whichever is out of date"
        )


def _check_together(shards: Sequence[Shard], files: Sequence[Inspection]) -> None:
    """Raise OutputError, naming a shard, where shards are not of one dump or not all of it."""
    first, next_board = files[0], 0
    catalogs = [Catalog(each.path, each.contents) for each in files]
    for shard, file, catalog in zip(shards, files, catalogs, strict=True):
        ours, theirs = (each.contents.metadata for each in (first, file))
        if theirs.get("fingerprint") != ours.get("fingerprint"):
            raise OutputError(
                f"{file.path} and {first.path} are shards of different dumps: their fingerprints "
                "differ; move or remove one of the dumps"
            )
        expected = {"shard": shard.text, "first_board": str(next_board)}
        for name, value in expected.items():
            if theirs.get(name) != value:
                raise OutputError(
                    f"{file.path} is not shard {shard.text} of its dump: its {name} is "
                    f"{theirs.get(name)}, not {value}"
                )
        if _shapes(catalog) != _shapes(catalogs[0]):
            raise OutputError(f"{file.path} has other tensors than {first.path}")
        next_board += catalog.boards
    if str(next_board) != first.contents.metadata.get("n_samples"):
        raise OutputError(
            f"{files[-1].path} is the last shard, at board {next_board} of "
            f"{first.contents.metadata.get('n_samples')}"
        )


def _shapes(catalog: Catalog) -> dict[str, tuple[object, ...]]:
    """Return the dtype of each tensor, and its shape without the first axis."""
    return {name: (each.dtype, each.shape[1:]) for name, each in catalog.tensors.items()}


def _joined_contents(files: Sequence[Inspection]) -> Contents:
    """List the tensors of shards as the whole dump's; statistics are of the first shard."""
    catalog = Catalog(files[0].path, files[0].contents)

    def joined(tensor: StoredTensor) -> StoredTensor:
        if not catalog.find(tensor.name).of_boards:
            return tensor
        shards = [each.tensor(tensor.name) for each in files]
        rows, nbytes = sum(each.shape[0] for each in shards), sum(each.nbytes for each in shards)
        return replace(tensor, shape=(rows, *tensor.shape[1:]), nbytes=nbytes, offset=None)

    metadata = files[0].contents.metadata
    return Contents(
        [joined(tensor) for tensor in catalog.tensors.values()],
        {name: text for name, text in metadata.items() if name not in _OF_ONE_SHARD},
    )
