"""Inspection: read a finished file's headers, and find damage."""

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dump_activations import _rust
from dump_activations.dtypes import DTYPES, TensorSpec
from dump_activations.errors import OutputError
from dump_activations.paths import check_ordinary
from dump_activations.remote.mirror import fetch, open_binary
from dump_activations.storage.digests import (
    INTEGRITY_KEY,
    METADATA_NAME,
    Digest,
    integrity_text,
    parse_integrity,
)
from dump_activations.storage.formats.layout import (
    Contents,
    Format,
    StoredTensor,
    are_disjoint,
    data_ranges,
    read_exactly,
)
from dump_activations.storage.formats.registry import format_of
from dump_activations.storage.parallel import chunks_in_parallel, chunks_of
from dump_activations.storage.reading.keys import Catalog

READ_NBYTES = 32 << 20
"""Bytes that a thread reads at a time."""

STRUCTURE = "structure"
"""Name, among damaged tensors, of all bytes that are neither tensor nor metadata."""

_LONGEST_REASON = 300


@dataclass(frozen=True)
class Inspection:
    """A dump and its contents: one file, or shards whose tensors are listed as one.

    Attributes:
        path: the file, or the name of the whole dump.
        format: its format.
        size: bytes of all files.
        contents: tensors and metadata. A tensor of boards has no offset where it is in shards.
        stamp: inode number and time in ns of the file that was read; zeros for shards.
        shards: the shards in order; empty for one file.
    """

    path: Path
    format: Format
    size: int
    contents: Contents
    stamp: tuple[int, int] = (0, 0)
    shards: tuple["Inspection", ...] = ()

    @property
    def files(self) -> tuple["Inspection", ...]:
        """The files, in the order of their boards."""
        return self.shards or (self,)

    @cached_property
    def catalog(self) -> Catalog:
        """Keys of the dump; OutputError if its tensors share no first axis."""
        return Catalog(self.path, self.contents)

    @cached_property
    def digests(self) -> dict[str, Digest]:
        """Stored digests by tensor name, with `nbytes` 0; empty if there are none or damaged."""
        if not self.shards:
            try:
                return parse_integrity(self.contents.metadata.get(INTEGRITY_KEY, "{}"))
            except ValueError:
                return {}
        found: dict[str, Digest] = {}
        for name in self._tensors:
            # Each shard has a tensor without an axis of boards whole.
            of_boards = self.catalog.find(name).of_boards
            for shard in self.shards if of_boards else self.shards[:1]:
                if name in shard.digests:
                    digest = replace(shard.digests[name], nbytes=shard.tensor(name).nbytes)
                    found[name] = found.get(name, Digest()) + digest
        return {name: replace(digest, nbytes=0) for name, digest in found.items()}

    def tensor(self, name: str) -> StoredTensor:
        """Return a tensor; KeyError if there is none of the name."""
        return self._tensors[name]

    @cached_property
    def _tensors(self) -> dict[str, StoredTensor]:
        return {tensor.name: tensor for tensor in self.contents.tensors}


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Read the headers of one file.

    Raises:
        InvalidArgumentError: the suffix names no format.
        OutputError: the file cannot be read, or is not of its format.
    """
    path = Path(path)
    file_format = format_of(path)
    with _open(path) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        try:
            contents = file_format.read(file, size)
        except ValueError as error:
            reason = str(error)[:_LONGEST_REASON]  # it may quote the file
            raise OutputError(f"{path} is not a whole {file_format.name} file: {reason}") from None
    return Inspection(path, file_format, size, contents, (status.st_ino, status.st_mtime_ns))


@contextmanager
def open_again(inspection: Inspection) -> Iterator[BinaryIO]:
    """Open an inspected file; OutputError if its size is another by now."""
    with _open(inspection.path) as file:
        if os.fstat(file.fileno()).st_size != inspection.size:
            raise OutputError(f"{inspection.path} is another file than it was just now")
        yield file


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    check_ordinary(path, OutputError)
    with OutputError.when(f"cannot read {path}"), open_binary(path) as file:
        yield file


def read_bytes(inspection: Inspection, tensor: str, start: int, out: NDArray[np.uint8]) -> None:
    """Fill `out`, (n,), with a stored tensor's bytes from `start` on, through all shards.

    Raises:
        OutputError: the file cannot be read, or was cut short.
    """
    view = out.data
    for file in inspection.files:
        stored = file.tensor(tensor)
        if view and start < stored.nbytes:
            assert stored.offset is not None
            inside = view[: stored.nbytes - start]
            with open_again(file) as opened:
                opened.seek(stored.offset + start)
                if opened.readinto(inside) != len(inside):  # type: ignore[attr-defined]
                    raise OutputError(f"{file.path} was cut short while it was read")
            view = view[len(inside) :]
            start += len(inside)
        start -= stored.nbytes


def each_file(
    inspection: Inspection, progress: Callable[[int, int], object]
) -> Iterator[tuple[Inspection, Callable[[int, int], None]]]:
    """Yield each file of a dump, with a progress function that adds the files before it."""
    sizes = [sum(tensor.nbytes for tensor in file.contents.tensors) for file in inspection.files]
    for file, before in zip(inspection.files, accumulate(sizes, initial=0), strict=False):

        def count(done: int, _of_file: int, before: int = before) -> None:
            progress(before + done, sum(sizes))

        yield file, count


def find_damage(
    inspection: Inspection,
    *,
    threads: int,
    progress: Callable[[int, int], object] | None = None,
) -> list[str]:
    """Read one file and return the names of tensors that differ from what was written.

    `METADATA_NAME` and `STRUCTURE` are among them if other bytes are damaged. `INTEGRITY_KEY` alone
    is returned if the digests are damaged, or of other tensors: nothing can be compared then.
    `progress` is called in this thread with the bytes read and the bytes in all.

    Raises:
        OutputError: the file cannot be read, or carries no digests.
    """
    metadata = dict(inspection.contents.metadata)
    text = metadata.pop(INTEGRITY_KEY, None)
    if text is None:
        raise OutputError(f"{inspection.path} carries no digests to verify it by")
    try:
        stored = parse_integrity(text)
        specs = _written_specs(inspection.contents.tensors, stored)
    except ValueError:
        return [INTEGRITY_KEY]
    with open_again(inspection) as file:
        found = _digests(file.fileno(), inspection, threads, progress)
        is_whole = _has_layout(file, inspection, specs, stored)
    damaged = [name for name, digest in found.items() if replace(digest, nbytes=0) != stored[name]]
    if text != integrity_text(specs, metadata, stored):
        damaged.append(METADATA_NAME)
    if not is_whole:
        damaged.append(STRUCTURE)
    return damaged


def _written_specs(
    tensors: Sequence[StoredTensor], digests: Mapping[str, Digest]
) -> list[TensorSpec]:
    """Return the specs of digested tensors; ValueError if the tensors cannot be those."""
    ranges = data_ranges(tensors)
    if (
        sorted(tensor.name for tensor in tensors) != sorted(digests)
        or not all(each.dtype in DTYPES and each.shape and each.nbytes for each in tensors)
        or len(ranges) < len(tensors)  # one is compressed
        or not are_disjoint(ranges)
    ):
        raise ValueError("other tensors than were written")
    return [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]


def _digests(
    fd: int,
    inspection: Inspection,
    threads: int,
    progress: Callable[[int, int], object] | None,
) -> dict[str, Digest]:
    tensors = inspection.contents.tensors
    found = {tensor.name: Digest() for tensor in tensors}

    def digest(name: str, start: int, stop: int) -> Digest:
        tensor = inspection.tensor(name)
        assert tensor.offset is not None
        span = np.array([tensor.offset + start])
        fetch({inspection.path: (span, span + (stop - start))})
        counts = _rust.digest_span(fd, tensor.offset + start, stop - start, tensor.dtype)
        return Digest(stop - start, *counts)

    def take(name: str, following: Digest) -> None:
        found[name] += following

    chunks = [chunks_of(tensor.name, tensor.nbytes, READ_NBYTES) for tensor in tensors]
    chunks_in_parallel(digest, chain(*chunks), threads, take, progress)
    return found


def _has_layout(
    file: BinaryIO,
    inspection: Inspection,
    specs: Sequence[TensorSpec],
    digests: Mapping[str, Digest],
) -> bool:
    """Return whether every byte that is not tensor data is as it was laid out."""
    crc32s = {name: digest.crc32 for name, digest in digests.items()}
    offsets = {tensor.name: tensor.offset for tensor in inspection.contents.tensors}
    try:
        layout = inspection.format.layout(specs, inspection.contents.metadata, crc32s)
        return (
            layout.size == inspection.size
            and layout.offsets == offsets
            and all(read_exactly(file, at, len(data)) == data for at, data in layout.skeleton)
        )
    except (ValueError, struct.error):  # names or texts that cannot be laid out, or it was cut
        return False
