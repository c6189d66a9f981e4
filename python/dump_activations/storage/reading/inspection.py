"""Reads a finished file back: what it holds, and whether it still holds what was written."""

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

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

_LONGEST_REASON = 300

READ_NBYTES = 32 << 20
"""Bytes that a thread reads at a time."""

STRUCTURE = "structure"
"""Stands among the damaged tensors for all that is neither tensor nor metadata."""


@dataclass(frozen=True)
class Inspection:
    """A file and what it says it holds."""

    path: Path
    format: Format
    size: int
    contents: Contents

    @cached_property
    def digests(self) -> dict[str, Digest]:
        """The file's own digests by tensor name, with `nbytes` 0; none if they are damaged."""
        try:
            return parse_integrity(self.contents.metadata.get(INTEGRITY_KEY, "{}"))
        except ValueError:
            return {}


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Read the headers of a file.

    Raises:
        InvalidArgumentError: the suffix names no format.
        OutputError: the file cannot be read, or is not of its format.
    """
    path = Path(path)
    file_format = format_of(path)
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            contents = file_format.read(file, size)
        except ValueError as error:
            reason = str(error)[:_LONGEST_REASON]  # it may quote the file
            raise OutputError(f"{path} is no whole {file_format.name} file: {reason}") from None
    return Inspection(path, file_format, size, contents)


def find_damage(
    inspection: Inspection,
    *,
    threads: int,
    progress: Callable[[int, int], object] | None = None,
) -> list[str]:
    """Read the whole file; returns the names of tensors that are not as they were written.

    `METADATA_NAME` and `STRUCTURE` are among them if other bytes are damaged. `INTEGRITY_KEY` alone
    is returned where the digests are, or are those of other tensors: nothing can be compared then.

    Args:
        inspection: the file.
        threads: how many read at once.
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


@contextmanager
def open_again(inspection: Inspection) -> Iterator[BinaryIO]:
    """Open a file that was inspected; OutputError where it is another by now."""
    with _open(inspection.path) as file:
        if os.fstat(file.fileno()).st_size != inspection.size:
            raise OutputError(f"{inspection.path} is another file than it was just now")
        yield file


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file; OutputError for what is none, and for what the system says inside."""
    check_ordinary(path, OutputError)
    try:
        with path.open("rb") as file:
            yield file
    except OutputError:
        raise
    except OSError as error:
        raise OutputError.of_system(f"cannot read {path}", error) from error


def _written_specs(
    tensors: Sequence[StoredTensor], digests: Mapping[str, Digest]
) -> list[TensorSpec]:
    """Return what the tensors were written from; ValueError if they cannot be what was digested."""
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
    """Digests by tensor name, with `nbytes` 0."""

    def digest(run: tuple[StoredTensor, int]) -> Digest:
        tensor, start = run
        nbytes = min(READ_NBYTES, tensor.nbytes - start)
        assert tensor.offset is not None
        found = _rust.digest_span(fd, tensor.offset + start, nbytes, tensor.dtype)
        return Digest(nbytes, *found)

    runs = [(tensor, start) for tensor in tensors for start in range(0, tensor.nbytes, READ_NBYTES)]
    whole = {tensor.name: Digest() for tensor in tensors}
    done, in_all = 0, sum(tensor.nbytes for tensor in tensors)
    with ThreadPoolExecutor(threads) as executor:
        for (tensor, _start), found in zip(runs, executor.map(digest, runs), strict=True):
            whole[tensor.name] += found
            done += found.nbytes
            if progress is not None:
                progress(done, in_all)
    return {name: replace(digest, nbytes=0) for name, digest in whole.items()}


def _has_layout(
    file: BinaryIO,
    inspection: Inspection,
    specs: Sequence[TensorSpec],
    digests: Mapping[str, Digest],
) -> bool:
    """Say whether every byte that is not tensor data is the one that was laid out."""
    crc32s = {name: digest.crc32 for name, digest in digests.items()}
    offsets = {tensor.name: tensor.offset for tensor in inspection.contents.tensors}
    try:
        layout = inspection.format.layout(specs, inspection.contents.metadata, crc32s)
        return (
            layout.size == inspection.size
            and layout.offsets == offsets
            and all(read_exactly(file, at, len(data)) == data for at, data in layout.skeleton)
        )
    except (ValueError, struct.error):  # no such names or texts can be laid out, or it was cut
        return False
