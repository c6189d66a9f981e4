"""Inspection: read a finished file's headers, and find damage."""

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dump_activations import _rust
from dump_activations.dtypes import DTYPES, TensorSpec
from dump_activations.errors import OutputError
from dump_activations.paths import check_ordinary
from dump_activations.storage.digests import (
    INTEGRITY_KEY,
    METADATA_NAME,
    Digest,
    integrity_text,
    parse_integrity,
)
from dump_activations.storage.formats.contents import (
    Contents,
    StoredTensor,
    are_disjoint,
    data_ranges,
    read_exactly,
)
from dump_activations.storage.formats.layout import Format
from dump_activations.storage.formats.registry import format_of
from dump_activations.storage.parallel import in_parallel

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
    def digests(self) -> dict[str, Digest]:
        """Stored digests by tensor name, with `nbytes` 0; empty if there are none or damaged."""
        if self.shards:
            return self._joined_digests()
        try:
            return parse_integrity(self.contents.metadata.get(INTEGRITY_KEY, "{}"))
        except ValueError:
            return {}

    def _joined_digests(self) -> dict[str, Digest]:
        found: dict[str, Digest] = {}
        for tensor in self.contents.tensors:
            # Each shard has a tensor without an axis of boards whole.
            is_whole = tensor.nbytes == self.shards[0].tensor(tensor.name).nbytes
            for shard in self.shards[:1] if is_whole else self.shards:
                if tensor.name in shard.digests:
                    nbytes = shard.tensor(tensor.name).nbytes
                    digest = replace(shard.digests[tensor.name], nbytes=nbytes)
                    found[tensor.name] = found.get(tensor.name, Digest()) + digest
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
    with OutputError.when(f"cannot read {path}"), path.open("rb") as file:
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
    """Read a whole file and return the names of tensors that differ from what was written.

    `METADATA_NAME` and `STRUCTURE` are among them if other bytes are damaged. `INTEGRITY_KEY` alone
    is returned if the digests are damaged, or of other tensors: nothing can be compared then.

    Args:
        inspection: one file.
        threads: threads that read.
        progress: called in this thread with the bytes read and the bytes in all.

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
        found = _digest_tensors(file.fileno(), inspection.contents.tensors, threads, progress)
        is_whole = _has_layout(file, inspection, specs, stored)
    damaged = [name for name, digest in found.items() if digest != stored[name]]
    if text != integrity_text(specs, metadata, stored):
        damaged.append(METADATA_NAME)
    if not is_whole:
        damaged.append(STRUCTURE)
    return damaged


def _written_specs(
    tensors: Sequence[StoredTensor], digests: Mapping[str, Digest]
) -> list[TensorSpec]:
    """Return the specs of digested tensors; ValueError if the tensors cannot be those."""
    for tensor in tensors:
        if tensor.dtype not in DTYPES or not tensor.shape or not tensor.nbytes:
            raise ValueError(tensor.name)
    ranges = data_ranges(tensors)
    if len(ranges) != len(tensors) or not are_disjoint(ranges):
        raise ValueError("compressed, or one in another")
    specs = [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    if len(specs) != len(digests) or {spec.name for spec in specs} != digests.keys():
        raise ValueError("other tensors")
    return specs


def _digest_tensors(
    fd: int,
    tensors: Sequence[StoredTensor],
    threads: int,
    progress: Callable[[int, int], object] | None,
) -> dict[str, Digest]:
    """Return digests by tensor name, with `nbytes` 0."""
    whole = {tensor.name: Digest() for tensor in tensors}
    done, in_all = 0, sum(tensor.nbytes for tensor in tensors)

    def digest(span: tuple[StoredTensor, int]) -> Digest:
        tensor, start = span
        nbytes = min(READ_NBYTES, tensor.nbytes - start)
        assert tensor.offset is not None
        return Digest(nbytes, *_rust.digest_span(fd, tensor.offset + start, nbytes, tensor.dtype))

    def take(span: tuple[StoredTensor, int], found: Digest) -> None:
        nonlocal done
        whole[span[0].name] += found
        done += found.nbytes
        if progress is not None:
            progress(done, in_all)

    spans = [(tensor, at) for tensor in tensors for at in range(0, tensor.nbytes, READ_NBYTES)]
    in_parallel(digest, spans, threads, take)
    return {name: replace(digest, nbytes=0) for name, digest in whole.items()}


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
