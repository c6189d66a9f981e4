"""What a finished file says it holds, as the readers of all formats return it."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_JSON_CHARACTERS = 2 << 20
"""Of JSON that is parsed. The objects made of it may take forty times as much memory; a dump's own
has some kilobytes, and this much describes 15,000 tensors."""

MAX_AXES = 64  # as many as NumPy and torch have


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    `offset` is where its data starts, in bytes; None if the data is compressed, or not in C order.
    `dtype` is NumPy's name of it, or the format's own for one that dumps do not use.
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
"""(file, its size in bytes) -> Contents; reads headers only. The file may be anything: whatever is
not right in it raises ValueError with the reason."""


def read_exactly(file: BinaryIO, offset: int, nbytes: int) -> bytes:
    """Read bytes of a file; ValueError if it ends before."""
    file.seek(offset)
    data = file.read(nbytes)
    if len(data) != nbytes:
        raise ValueError("it is cut short")
    return data


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; ValueError for anything else, and for more than a file has reason to hold."""
    if len(text) > MAX_JSON_CHARACTERS:
        raise ValueError("its description is too large to be that of a dump")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("its description is no JSON") from None


def text_metadata(metadata: Any) -> dict[str, str]:
    """Return metadata as string to string; ValueError if it is no mapping."""
    if not isinstance(metadata, Mapping):
        raise ValueError("its metadata is no table")
    if not all(isinstance(part, str | int | float) for item in metadata.items() for part in item):
        raise ValueError("its metadata holds more than text and numbers")
    return {str(key): str(value) for key, value in metadata.items()}


def is_shape(value: Any) -> bool:
    """Say whether a list or tuple holds lengths of axes: few, and none beyond 63 bits.

    The product of others would take minutes.
    """
    return (
        isinstance(value, (list, tuple))
        and len(value) <= MAX_AXES
        and all(type(length) is int and 0 <= length < 1 << 63 for length in value)
    )


def data_ranges(tensors: Iterable[StoredTensor]) -> list[tuple[int, int]]:
    """Say where the data of tensors lies, (start, stop) each; left out where it is compressed."""
    return [(t.offset, t.offset + t.nbytes) for t in tensors if t.offset is not None]


def are_disjoint(ranges: Iterable[tuple[int, int]]) -> bool:
    """Say whether no two ranges, (start, stop), have a place in common."""
    end = 0
    for start, stop in sorted(ranges):
        if start < end:
            return False
        end = stop
    return True
