"""Where the bytes of an output file lie: what every format computes before anything is written."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dump_activations.output.contents import Reader

ITEM_NBYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "uint8": 1}
"""Bytes of one element, of the dtypes that an output file may hold."""

ALIGNMENT = 4096
"""Bytes: tensor data starts on a multiple of it where the format allows, as direct I/O, memory
maps and device reads want it."""

RESERVED_NAMES = frozenset({"metadata", "__metadata__"})
"""Names under which a format keeps the metadata: no tensor may have them."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be stored, C-order and little-endian.

    `shape` has at least one axis and no axis of length 0; a row is one step along the first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.dtype in ITEM_NBYTES, self
        assert self.shape, self
        assert min(self.shape) > 0, self

    @property
    def numel(self) -> int:
        """Elements in the tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.numel * ITEM_NBYTES[self.dtype]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return self.nbytes // self.shape[0]


@dataclass(frozen=True)
class Layout:
    """The bytes of a file.

    `size` is in bytes; `offsets` says where each tensor's data starts; `pieces` are (offset, bytes)
    of all that is not tensor data, to be written in their order: the file cannot be mistaken for a
    finished one before the last.
    """

    size: int
    offsets: Mapping[str, int]
    pieces: tuple[tuple[int, bytes], ...]


LayoutFunction = Callable[
    [Sequence[TensorSpec], Mapping[str, str], Mapping[str, int] | None], Layout
]
"""(tensors, metadata, CRC-32 of each tensor or None while unknown) -> Layout. Pure; size and
offsets do not depend on the CRCs, nor on values of the metadata of equal length."""


@dataclass(frozen=True)
class Format:
    """A file format: how it is named, what it cannot hold, how it is laid out and read."""

    name: str
    suffix: str
    unsupported_dtypes: frozenset[str]
    layout: LayoutFunction
    read: Reader


def fits(dtype: str, shape: Sequence[int], nbytes: int) -> bool:
    """Whether a tensor takes up so many bytes; true of any number for a dtype not stored here."""
    return dtype not in ITEM_NBYTES or math.prod(shape) * ITEM_NBYTES[dtype] == nbytes


def storage_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Tensors in the order of their data in the file.

    Wide elements first, so that each tensor is aligned to its element where a format packs tensors
    without holes; among equals those whose rows are multiples of the larger power of two first, so
    that as many slices as possible start on a page.
    """

    def key(spec: TensorSpec) -> tuple[int, int]:
        row_alignment = min(spec.row_nbytes & -spec.row_nbytes, ALIGNMENT)
        return -ITEM_NBYTES[spec.dtype], -row_alignment

    return sorted(specs, key=key)
