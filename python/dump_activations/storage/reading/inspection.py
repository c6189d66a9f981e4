"""Inspection: the headers of one finished file, and whether it is still the same file."""

import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dump_activations.errors import OutputError, check_ordinary
from dump_activations.remote.mirror import is_mirror, open_binary
from dump_activations.storage.digests import INTEGRITY_KEY, Digest, parse_integrity
from dump_activations.storage.formats.layout import Format, StoredTensor
from dump_activations.storage.formats.registry import format_of
from dump_activations.storage.reading.keys import Catalog

READ_NBYTES = 32 << 20
"""Bytes that a thread reads at a time."""

_LONGEST_REASON = 300


@dataclass(frozen=True)
class Inspection:
    """A file and its contents."""

    path: Path
    format: Format
    size: int  # bytes
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]  # the file's own
    stamp: tuple[int, int]  # inode number, and time in ns

    @cached_property
    def catalog(self) -> Catalog:
        """Keys of the file; OutputError if its tensors share no first axis."""
        return Catalog(self.path, self.tensors, self.metadata)

    @cached_property
    def digests(self) -> dict[str, Digest]:
        """Stored digests by tensor name, with `nbytes` 0; empty if there are none or damaged."""
        try:
            return parse_integrity(self.metadata.get(INTEGRITY_KEY, "{}"))
        except ValueError:
            return {}


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Read the headers of one file; OutputError where it is not of its format."""
    path = Path(path)
    file_format = format_of(path)
    with _open(path) as file:
        status = os.fstat(file.fileno())
        try:
            contents = file_format.read(file, status.st_size)
        except ValueError as error:
            reason = str(error)[:_LONGEST_REASON]  # it may quote the file
            raise OutputError(f"{path} is not a whole {file_format.name} file: {reason}") from None
    return Inspection(path, file_format, status.st_size, *contents, _stamp(status))


@contextmanager
def open_again(file: Inspection) -> Iterator[BinaryIO]:
    """Open an inspected file; OutputError if it was changed."""
    with _open(file.path) as opened:
        same_again(file, os.fstat(opened.fileno()))
        yield opened


def offset_in(file: Inspection, name: str) -> int:
    """Return where a tensor's data begins; OutputError if it is compressed or not in C order."""
    offset = file.tensors[name].offset
    if offset is None:
        raise OutputError(
            f"{file.path}: {name} is compressed or not in C order; save it uncompressed to read it"
        )
    return offset


def read_span(file: Inspection, name: str, start: int, out: NDArray[np.uint8]) -> None:
    """Fill `out`, (n,), with the bytes of a stored tensor from `start` on."""
    with open_again(file) as opened:
        opened.seek(offset_in(file, name) + start)
        if opened.readinto(out.data) != len(out):  # type: ignore[attr-defined]
            raise OutputError(f"{file.path} was cut short while it was read")


def same_again(file: Inspection, status: os.stat_result) -> Inspection:
    """Return the inspection of a file as it is now; OutputError if it was changed.

    A new time or inode number alone is not a change: `touch` and network mounts renew them. If both
    are new, only digests in an equal header prove that the content is the same.
    """
    # A mirror's time changes with each block. Each request checks the remote file's version.
    if _stamp(status) == file.stamp or is_mirror(file.path):
        return file
    with suppress(OutputError):
        found = inspect(file.path)
        both_are_new = all(map(operator.ne, found.stamp, file.stamp))
        if replace(found, stamp=file.stamp) == file and (file.digests or not both_are_new):
            return found
    raise OutputError(f"{file.path} was replaced or changed since it was opened")


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_ino, status.st_mtime_ns


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    check_ordinary(path, OutputError)
    with OutputError.when(f"cannot read {path}"), open_binary(path) as file:
        yield file
