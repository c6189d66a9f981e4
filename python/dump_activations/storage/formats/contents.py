"""What a finished file says it holds, as the readers of all formats return it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    `offset` is where its data starts, in bytes; None if the data is compressed. `dtype` is NumPy's
    name of it, or the format's own for one that dumps do not use.
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


def text_metadata(metadata: Any) -> dict[str, str]:
    """Return metadata as string to string; ValueError if it is no mapping."""
    if not isinstance(metadata, Mapping):
        raise ValueError("its metadata is no table")
    if not all(isinstance(part, str | int | float) for item in metadata.items() for part in item):
        raise ValueError("its metadata holds more than text and numbers")
    return {str(key): str(value) for key, value in metadata.items()}


def is_shape(value: Any) -> bool:
    """Say whether a list or tuple holds lengths of axes."""
    return isinstance(value, (list, tuple)) and all(
        type(length) is int and length >= 0 for length in value
    )
