"""Where the bytes of an output file lie: what every format computes before anything is written."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, filterfalse

from dump_activations.dtypes import DTYPES, STATISTICS_PREFIX, TensorSpec
from dump_activations.storage.formats.contents import Reader

# Bytes: tensor data starts on a multiple of it where the format allows, as direct I/O, memory maps
# and device reads want it.
ALIGNMENT = 4096

# Bytes of an element of statistics.
_STATISTICS_ALIGNMENT = 8

# Names under which a format keeps the metadata: no tensor may have them.
RESERVED_NAMES = frozenset({"metadata", "__metadata__"})


@dataclass(frozen=True)
class Layout:
    """The bytes of a file.

    Attributes:
        size: bytes of the whole file.
        offsets: where each tensor's data starts, in bytes.
        skeleton: (offset, bytes) of all that is not tensor data, to be written in their order: the
            file cannot be mistaken for a finished one before the last.
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
    """A file format: how it is named, what it can hold, how it is laid out and read."""

    name: str
    suffix: str
    dtypes: frozenset[str]
    layout: LayoutFunction
    read: Reader


def fits(dtype: str, shape: Sequence[int], nbytes: int) -> bool:
    """Whether a tensor takes up so many bytes, or may, of a dtype that dumps do not use."""
    numel = math.prod(shape)
    if dtype in DTYPES:
        return numel * DTYPES[dtype].nbytes == nbytes
    return numel <= 8 * nbytes  # no element is less than a bit


def storage_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Tensors in the order of their data in the file.

    Wide elements first, so that each tensor is aligned to its element where a format packs tensors
    without holes; among equals those whose rows are multiples of the larger power of two first, so
    that as many slices as possible start on a page. Statistics, of which there are few bytes, lie
    as far back as they are aligned to their elements.
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
