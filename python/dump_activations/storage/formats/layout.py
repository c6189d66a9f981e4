"""Layouts and contents: where every byte of a file lies, computed before it is written, or read.

The checks that all readers share are here too. A file that is read may be anything: ValueError
gives the reason why it is not of its format.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, BinaryIO, NamedTuple

from dump_activations.dtypes import DTYPES, READABLE_DTYPES, STATISTICS_PREFIX, TensorSpec

ALIGNMENT = 4096
"""Bytes. Tensor data starts on a multiple where the format allows, for direct I/O, memory maps and
device reads."""

RESERVED_NAMES = frozenset({"metadata", "__metadata__"})
"""Names under which formats keep the metadata. No tensor may have them."""

MAX_JSON_CHARACTERS = 2 << 20
"""Longest JSON that is parsed, which describes 15,000 tensors. Its objects may take forty times as
much memory."""

# Bytes of an element of statistics.
_STATISTICS_ALIGNMENT = 8
_MAX_AXES = 64  # of NumPy and torch


@dataclass(frozen=True)
class Layout:
    """The bytes of a file that is written."""

    size: int  # bytes of the whole file
    offsets: Mapping[str, int]  # of each tensor's data, in bytes
    # Everything else, by offset, to be written in this order: no reader takes the file for a
    # finished one before the last.
    skeleton: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file that is read.

    `offset` is in bytes, or None: compressed data, not in C order, or in several shards. `dtype` is
    NumPy's name, or the format's own for one that cannot be read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int | None


class Contents(NamedTuple):
    """All tensors by name, in the order in which the format lists them, and the metadata."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Format:
    """A file format."""

    name: str
    suffix: str  # lowercase
    dtypes: frozenset[str]  # names of the dtypes that it may hold
    # (tensors, metadata, CRC-32 of each tensor or None while unknown). Size and offsets do not
    # depend on the CRCs, nor on values of the metadata of equal length.
    layout: Callable[[Sequence[TensorSpec], Mapping[str, str], Mapping[str, int] | None], Layout]
    # (file, its size in bytes). Reads headers only.
    read: Callable[[BinaryIO, int], Contents]


def storage_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Return tensors in the order of their data in the file.

    Wide elements come first, so that each tensor is aligned to its element where a format packs
    tensors without holes. Among equals, rows that are multiples of a larger power of two come
    first, so that many slices start on a page. Statistics are small and lie as far back as they
    are aligned to their elements.
    """

    def key(spec: TensorSpec) -> tuple[int, int]:
        row_alignment = min(spec.row_nbytes & -spec.row_nbytes, ALIGNMENT)
        return -DTYPES[spec.dtype].nbytes, -row_alignment

    statistics = [spec for spec in specs if spec.name.startswith(STATISTICS_PREFIX)]
    ordered = sorted((s for s in specs if not s.name.startswith(STATISTICS_PREFIX)), key=key)
    ends = accumulate((spec.nbytes for spec in ordered), initial=0)
    place = max(number for number, end in enumerate(ends) if end % _STATISTICS_ALIGNMENT == 0)
    return [*ordered[:place], *statistics, *ordered[place:]]


def fits(dtype: str, shape: Sequence[int], nbytes: int) -> bool:
    """Return whether a tensor takes `nbytes` bytes, or may, if its dtype cannot be read."""
    numel = math.prod(shape)
    if dtype in READABLE_DTYPES:
        return numel * READABLE_DTYPES[dtype].nbytes == nbytes
    return numel <= 8 * nbytes  # an element has a bit at least


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
    """Return whether a value is a shape of at most 64 axes, with lengths of at most 63 bits."""
    return (  # of larger lengths the product would take minutes
        isinstance(value, (list, tuple))
        and len(value) <= _MAX_AXES
        and all(type(length) is int and 0 <= length < 1 << 63 for length in value)
    )


def data_ranges(tensors: Iterable[StoredTensor]) -> list[tuple[int, int]]:
    """Return (start, stop) of each tensor's data, without compressed tensors."""
    return [(t.offset, t.offset + t.nbytes) for t in tensors if t.offset is not None]


def are_disjoint(ranges: Iterable[tuple[int, int]]) -> bool:
    """Return whether no two ranges, (start, stop), overlap."""
    return all(stop <= start for (_, stop), (start, _) in pairwise(sorted(ranges)))
