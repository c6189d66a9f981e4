"""The files of a dump as one: its file, or its shards, or several dumps of the same keys.

Shards of one dump share a fingerprint; each holds consecutive boards of the run.

Shape letters: R rows asked for.
"""

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dump_activations import _rust
from dump_activations.errors import InvalidArgumentError, OutputError, is_url, warn
from dump_activations.remote import input_path
from dump_activations.remote.mirror import Ranges, Request, fetch, is_mirror, requests_for
from dump_activations.storage.digests import INTEGRITY_KEY, Digest
from dump_activations.storage.formats.layout import StoredTensor
from dump_activations.storage.formats.registry import format_of
from dump_activations.storage.reading.inspection import (
    Inspection,
    inspect,
    offset_in,
    read_span,
    same_again,
)
from dump_activations.storage.reading.keys import Catalog, Part
from dump_activations.storage.shards import Shard, list_shards

THREADS: int | None = None
"""Threads of a read; None for one per core."""

# Metadata that describes one shard and not the dump.
_OF_ONE_SHARD = ("shard", "first_board", INTEGRITY_KEY)

# Metadata that must be equal in files that are read as one, where both have it.
_OF_THE_MODEL = ("weights_sha256", "layers", "precision")


class DumpFiles:
    """Finished files that hold the same tensors, whose rows are counted through all of them.

    `paths` are files or names of wholes, one per dump; `path` and `format` are the first's. Each
    read opens the files again.
    """

    def __init__(
        self, paths: Sequence[Path], files: Sequence[Inspection], metadata: Mapping[str, str]
    ) -> None:
        self.paths, self.path = list(paths), paths[0]
        self.files, self.format = list(files), files[0].format
        self.size = sum(file.size for file in files)
        self.metadata = dict(metadata)
        self._open: dict[tuple[str, int], _rust.StoredTensor] = {}

    def __str__(self) -> str:
        more = f" and {len(self.paths) - 1} more" * (len(self.paths) > 1)
        return f"{self.path}{more}"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}

    @property
    def catalog(self) -> Catalog:
        """Keys and tensors of the first file, which the others share."""
        return self.files[0].catalog

    @cached_property
    def boards(self) -> int:
        """Boards in all files."""
        return int(self._ends[-1])

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([file.catalog.boards for file in self.files])

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Tensors of all files by name. One of boards has no offset where there are several."""
        found = dict(self.files[0].tensors)
        for name, first in found.items() if len(self.files) > 1 else ():
            if self.catalog.find(name).of_boards:
                shape = (self.boards, *first.shape[1:])
                nbytes = sum(file.tensors[name].nbytes for file in self.files)
                found[name] = replace(first, shape=shape, nbytes=nbytes, offset=None)
        return found

    @cached_property
    def digests(self) -> dict[str, Digest]:
        """Stored digests by tensor name, with `nbytes` 0; empty if there are none or damaged."""
        if len(self.files) == 1:
            return self.files[0].digests
        found: dict[str, Digest] = {}
        for name in self.tensors:
            for file in self.files_of(name):
                if name in file.digests:
                    digest = replace(file.digests[name], nbytes=file.tensors[name].nbytes)
                    found[name] = found.get(name, Digest()) + digest
        return {name: replace(digest, nbytes=0) for name, digest in found.items()}

    def files_of(self, name: str) -> list[Inspection]:
        """Return the files that hold a tensor: the first, where it has no axis of boards."""
        if len(self.files) == 1 or not self.catalog.find(name).of_boards:
            return self.files[:1]
        first = self.files[0].tensors[name]
        for file in self.files:
            tensor = file.tensors.get(name)
            wanted = (first.dtype, (file.catalog.boards, *first.shape[1:]))
            if tensor is None or (tensor.dtype, tensor.shape) != wanted:
                raise InvalidArgumentError(f"{file.path} has no {name} like {self.files[0].path}")
        return self.files

    def read(
        self,
        part: Part,
        numbers: NDArray[np.int64],
        out: NDArray[np.uint8],
        *,
        per_row: int = 1,
        cancel: _rust.Cancel | None = None,
    ) -> None:
        """Read a part of rows, or of `per_row` cells of each row, into `out`, uint8 (R, nbytes).

        `numbers`, int64 (R,), count rows or cells through all files. `cancel` ends the read.
        """
        touched: Iterable[int] = range(len(self.files))
        if len(numbers) < len(self.files):
            touched = np.unique(np.searchsorted(self._ends, numbers // per_row, "right")).tolist()
        self._check_unchanged(touched)
        if out.size:
            nbytes, parts = out.shape[1], part.of * per_row
            stored = self._open.get((part.tensor, parts))
            if stored is None:
                places = self._places(part.tensor)
                stored = _rust.StoredTensor(part.tensor, places, parts, nbytes)
                self._open[part.tensor, parts] = stored
            # A local copy has holes, which would be read as zeros.
            requests = self.requests_for(part, numbers, nbytes, per_row=per_row)
            fetch(requests, cancel and cancel.is_asked)
            numbers = _numbers_of_parts(part, numbers, per_row)
            stored.read(numbers, out, threads=THREADS, cancel=cancel)
            self._check_unchanged(touched)

    @cached_property
    def is_remote(self) -> bool:
        """True where a file is behind a URL."""
        return any(is_mirror(file.path) for file in self.files)

    def _places(self, name: str) -> list[tuple[Path, int, int]]:
        """Return the files that hold a tensor, with its offset and its rows in each."""
        of_boards = self.catalog.find(name).of_boards
        return [
            (file.path, offset_in(file, name), file.catalog.boards if of_boards else 1)
            for file in self.files_of(name)
        ]

    def requests_for(
        self, part: Part, numbers: NDArray[np.int64], nbytes: int, *, per_row: int = 1
    ) -> list[Request]:
        """List the requests of a read, of `nbytes` per number; none once their blocks are local."""
        if not self.is_remote:
            return []
        spans: dict[Path, Ranges] = {}
        numbers, first = np.sort(_numbers_of_parts(part, numbers, per_row)), 0
        for path, offset, rows in self._places(part.tensor):
            end = first + rows * part.of * per_row
            inside = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, end)]
            begins = offset + (inside - first) * nbytes
            spans[path] = (begins, begins + nbytes)
            first = end
        return requests_for(spans)

    def _check_unchanged(self, files: Iterable[int]) -> None:
        for i in files:
            path = self.files[i].path
            with OutputError.when(f"cannot read {path}"):
                found = same_again(self.files[i], path.stat())
            if found is not self.files[i]:
                self.files[i] = found
                self._open = {}  # which would refuse another inode number

    def read_span(self, name: str, start: int, out: NDArray[np.uint8]) -> None:
        """Fill `out`, (n,), with a stored tensor's bytes from `start` on, through all files."""
        for file in self.files_of(name):
            nbytes = file.tensors[name].nbytes
            if len(out) and start < nbytes:
                read_span(file, name, start, out[: nbytes - start])
                out, start = out[nbytes - start :], nbytes
            start -= nbytes

    def check_digest(self, name: str, data: NDArray[np.uint8]) -> None:
        """Raise OutputError where a whole tensor's bytes, of all files, differ from the digests."""
        start = 0
        for file in self.files_of(name):
            digest, stop = file.digests.get(name), start + file.tensors[name].nbytes
            if digest is None:
                raise OutputError(f"{file.path} carries no digest to verify {name} by")
            if zlib.crc32(data[start:stop].data) != digest.crc32:
                raise OutputError(f"{file.path}: {name} is damaged; make the file again")
            start = stop


def _numbers_of_parts(part: Part, numbers: NDArray[np.int64], per_row: int) -> NDArray[np.int64]:
    """Return the numbers among all parts of rows or cells of one part."""
    if part.of == 1:
        return numbers
    return numbers + ((part.of - 1) * (numbers // per_row) + part.at) * per_row


def inspect_dump(*paths: str | os.PathLike[str]) -> DumpFiles:
    """Read the headers of a dump: of the file of this name, or else of all its shards.

    Several dumps are read as one, with the metadata of the first. InvalidArgumentError where they
    do not belong together, OutputError where a file or a shard of one is wrong or missing.
    """
    local = [input_path(path) if is_url(path) else Path(path).expanduser() for path in paths]
    dumps = [_inspect_one(path) for path in local]
    if len(dumps) == 1:
        return dumps[0]
    files = [file for dump in dumps for file in dump.files]
    first, of_model = files[0], dict[str, str | None]()
    for file in files:
        apart = f"{file.path} cannot be read as one with {first.path}"
        if file.catalog.keys != first.catalog.keys:
            raise InvalidArgumentError(
                f"{apart}: its keys differ in their names, layers, shapes or dtypes"
            )
        for name in _OF_THE_MODEL:
            theirs = file.metadata.get(name)
            ours = of_model[name] = of_model.get(name) or theirs
            if theirs not in (ours, None):
                raise InvalidArgumentError(f"{apart}: its {name} is {theirs}, not {ours}")
    return DumpFiles([dump.path for dump in dumps], files, dumps[0].metadata)


def _inspect_one(path: Path) -> DumpFiles:
    if path.is_dir():
        raise OutputError(f"{path} is a directory, not a dump; name a dump's file in it")
    format_of(path)
    if not os.path.lexists(path) and (shards := find_shards(path)) is not None:
        return _inspect_shards(shards)
    found = inspect(path)  # which raises where there is no such file
    shard = None
    with suppress(OutputError):  # A file can be read in a directory that cannot be listed.
        shard = next(iter(list_shards(path).values()), None)
    if shard is not None:
        warn(
            f"{path} is read; shards of the same name lie next to it, {shard.name}: remove the "
            "dump that is out of date"
        )
    return DumpFiles([path], [found], found.metadata)


@dataclass(frozen=True)
class DumpShards:
    """The shards of one dump in its directory."""

    whole: Path  # name of the whole dump
    count: int  # shards of the dump
    finished: Mapping[Shard, Path]  # in order
    partial: Mapping[Shard, Path]  # unfinished ones that are there, in order

    @cached_property
    def boards(self) -> tuple[int, int | None]:
        """Boards in the finished shards, and in the dump; None before a shard is finished."""
        found = [inspect(path) for path in self.finished.values()]
        done = sum(each.tensors["indices"].shape[0] for each in found)
        return done, int(found[0].metadata["n_samples"]) if found else None

    @property
    def missing(self) -> list[Shard]:
        """Shards that are not finished."""
        shards = [Shard(self.whole, number, self.count) for number in range(1, self.count + 1)]
        return [shard for shard in shards if shard not in self.finished]


def find_shards(whole: Path) -> DumpShards | None:
    """List the shards of a dump, finished or not; None if there are none."""
    finished, partial = list_shards(whole), list_shards(whole, ".partial")
    first_of = {shard.count: path for shard, path in reversed(list((finished or partial).items()))}
    if len(first_of) > 1:
        raise OutputError(
            f"{' and '.join(map(str, sorted(first_of.values())))} are shards of different dumps; "
            "move or remove one of the dumps"
        )
    return DumpShards(whole, min(first_of), finished, partial) if first_of else None


def _inspect_shards(shards: DumpShards) -> DumpFiles:
    """Inspect all shards; OutputError, naming a shard, where they are not one whole dump."""
    if shards.missing:
        raise OutputError(
            f"{shards.missing[0].path} is missing: {len(shards.finished)} of {shards.count} shards "
            "are finished; run the same dump command again, which writes the others"
        )
    files = [inspect(path) for path in shards.finished.values()]
    first, next_board = files[0], 0
    ours = first.metadata
    for shard, file in zip(shards.finished, files, strict=True):
        theirs = file.metadata
        if theirs.get("fingerprint") != ours.get("fingerprint"):
            raise OutputError(
                f"{file.path} and {first.path} are shards of different dumps: their fingerprints "
                "differ; move or remove one of the dumps"
            )
        for name, value in {"shard": shard.text, "first_board": str(next_board)}.items():
            if theirs.get(name) != value:
                raise OutputError(
                    f"{file.path} is not shard {shard.text} of its dump: its {name} is "
                    f"{theirs.get(name)}, not {value}"
                )
        rows = [{(n, t.dtype, t.shape[1:]) for n, t in f.tensors.items()} for f in (first, file)]
        if rows[0] != rows[1]:
            raise OutputError(f"{file.path} has other tensors than {first.path}")
        next_board += file.catalog.boards
    if str(next_board) != (boards := ours.get("n_samples")):
        raise OutputError(f"{files[-1].path} is the last shard, at board {next_board} of {boards}")
    of_all = {key: text for key, text in ours.items() if key not in _OF_ONE_SHARD}
    return DumpFiles([shards.whole], files, of_all)
