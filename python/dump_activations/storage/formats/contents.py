"""Contents of a finished file, as every format's reader returns them, and checks they share."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_JSON_CHARACTERS = 2 << 20
"""Longest JSON that is parsed, which describes 15,000 tensors. Its objects may take forty times as
much memory."""

MAX_AXES = 64  # of NumPy and torch


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    `offset` is the start of its data in bytes; None if the data is compressed, not in C order, or
    in several shards. `dtype` is NumPy's name, or the format's own for one that cannot be read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int | None


@dataclass(frozen=True)
class Contents:
    """All tensors, in the order in which the format lists them, and the metadata."""

    tensors: list[StoredTensor]
    metadata: dict[str, str]


Reader = Callable[[BinaryIO, int], Contents]
"""(file, its size in bytes) -> Contents; reads headers only. The file may be anything: ValueError
gives the reason why it is not of the format."""


def read_exactly(file: BinaryIO, offset: int, nbytes: int) -> bytes:
    """Read bytes of a file; ValueError if it ends before."""
    file.seek(offset)
    data = file.read(nbytes)
    if len(data) != nbytes:
        raise ValueError("it is cut short")
    return data


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; ValueError for anything else, and for more than `MAX_JSON_CHARACTERS`."""
    if len(text) > MAX_JSON_CHARACTERS:
        raise ValueError("its description is larger than a dump's")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("its description is not JSON") from None


def text_metadata(metadata: Any) -> dict[str, str]:
    """Return metadata as string to string; ValueError if it holds anything but text and numbers."""
    if not isinstance(metadata, Mapping):
        raise ValueError("its metadata is not a table")
    if not all(isinstance(part, str | int | float) for item in metadata.items() for part in item):
        raise ValueError("its metadata holds more than text and numbers")
    return {str(key): str(value) for key, value in metadata.items()}


def is_shape(value: Any) -> bool:
    """Return whether a value is a shape of at most 64 axes, with lengths of at most 63 bits.

    The product of larger ones would take minutes.
    """
    return (
        isinstance(value, (list, tuple))
        and len(value) <= MAX_AXES
        and all(type(length) is int and 0 <= length < 1 << 63 for length in value)
    )


def data_ranges(tensors: Iterable[StoredTensor]) -> list[tuple[int, int]]:
    """Return (start, stop) of each tensor's data, without compressed tensors."""
    return [(t.offset, t.offset + t.nbytes) for t in tensors if t.offset is not None]


def are_disjoint(ranges: Iterable[tuple[int, int]]) -> bool:
    """Return whether no two ranges, (start, stop), overlap."""
    end = 0
    for start, stop in sorted(ranges):
        if start < end:
            return False
        end = stop
    return True
