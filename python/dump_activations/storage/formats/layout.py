"""Layouts: where every byte of an output file lies, computed before the first is written."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, filterfalse

from dump_activations.dtypes import DTYPES, READABLE_DTYPES, STATISTICS_PREFIX, TensorSpec
from dump_activations.storage.formats.contents import Reader

ALIGNMENT = 4096
"""Bytes. Tensor data starts on a multiple where the format allows, for direct I/O, memory maps and
device reads."""

RESERVED_NAMES = frozenset({"metadata", "__metadata__"})
"""Names under which formats keep the metadata. No tensor may have them."""

# Bytes of an element of statistics.
_STATISTICS_ALIGNMENT = 8


@dataclass(frozen=True)
class Layout:
    """The bytes of a file.

    Attributes:
        size: bytes of the whole file.
        offsets: offset of each tensor's data in bytes, by name.
        skeleton: (offset, bytes) of everything else, to be written in this order: no reader takes
            the file for a finished one before the last.
    """

    size: int
    offsets: Mapping[str, int]
    skeleton: tuple[tuple[int, bytes], ...]


LayoutFunction = Callable[
    [Sequence[TensorSpec], Mapping[str, str], Mapping[str, int] | None], Layout
]
"""(tensors, metadata, CRC-32 of each tensor or None while unknown) -> Layout. Pure; size and
offsets do not depend on the CRCs, nor on values of the metadata of equal length."""


@dataclass(frozen=True)
class Format:
    """A file format: its name, the dtypes it holds, its layout and its reader."""

    name: str
    suffix: str
    dtypes: frozenset[str]
    layout: LayoutFunction
    read: Reader


def fits(dtype: str, shape: Sequence[int], nbytes: int) -> bool:
    """Return whether a tensor takes `nbytes` bytes, or may, if its dtype cannot be read."""
    numel = math.prod(shape)
    if dtype in READABLE_DTYPES:
        return numel * READABLE_DTYPES[dtype].nbytes == nbytes
    return numel <= 8 * nbytes  # an element has a bit at least


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

    def is_statistic(spec: TensorSpec) -> bool:
        return spec.name.startswith(STATISTICS_PREFIX)

    statistics = [*filter(is_statistic, specs)]
    ordered = sorted(filterfalse(is_statistic, specs), key=key)
    ends = accumulate((spec.nbytes for spec in ordered), initial=0)
    place = max(number for number, end in enumerate(ends) if end % _STATISTICS_ALIGNMENT == 0)
    return [*ordered[:place], *statistics, *ordered[place:]]
