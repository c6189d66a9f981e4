"""Tensors as files store them: the table of dtypes, specs, and the board's constants."""

import math
from dataclasses import KW_ONLY, dataclass

CELLS = 16
MOVES = 4

LABEL_PREFIX = "labels/"
"""The tensor of label NAME is `labels/NAME`."""

STATISTICS_PREFIX = "stats/"
"""Statistic NAME of tensor T is the tensor `stats/T/NAME`."""


@dataclass(frozen=True)
class DType:
    """One element of a stored tensor, by the name that NumPy and torch have for it.

    Attributes:
        choice: what the option `dtype` calls it; None where activations cannot be stored so.
        safetensors: its code in a `.safetensors` header.
        torch_storage: the class of its storage in a `.pt` pickle; None where torch saves another
            way.
        npy: its descriptor in a `.npy` header; None where NumPy has no such dtype.
    """

    name: str
    choice: str | None
    nbytes: int
    _: KW_ONLY
    safetensors: str
    torch_storage: str | None
    npy: str | None


_TABLE = (
    DType("float64", None, 8, safetensors="F64", torch_storage="DoubleStorage", npy="<f8"),
    DType("float32", "fp32", 4, safetensors="F32", torch_storage="FloatStorage", npy="<f4"),
    DType("float16", "fp16", 2, safetensors="F16", torch_storage="HalfStorage", npy="<f2"),
    DType("bfloat16", "bf16", 2, safetensors="BF16", torch_storage="BFloat16Storage", npy=None),
    DType("int64", None, 8, safetensors="I64", torch_storage="LongStorage", npy="<i8"),
    DType("uint8", None, 1, safetensors="U8", torch_storage="ByteStorage", npy="|u1"),
)

# Dtypes of other programs' files. Dumps never store them.
_ONLY_READ = (
    DType("int32", None, 4, safetensors="I32", torch_storage="IntStorage", npy="<i4"),
    DType("int16", None, 2, safetensors="I16", torch_storage="ShortStorage", npy="<i2"),
    DType("int8", None, 1, safetensors="I8", torch_storage="CharStorage", npy="|i1"),
    DType("uint64", None, 8, safetensors="U64", torch_storage=None, npy="<u8"),
    DType("uint32", None, 4, safetensors="U32", torch_storage=None, npy="<u4"),
    DType("uint16", None, 2, safetensors="U16", torch_storage=None, npy="<u2"),
    DType("bool", None, 1, safetensors="BOOL", torch_storage="BoolStorage", npy="|b1"),
)

DTYPES = {dtype.name: dtype for dtype in _TABLE}
"""Dtypes that a dump stores, by name."""

READABLE_DTYPES = DTYPES | {dtype.name: dtype for dtype in _ONLY_READ}
"""Dtypes of stored tensors that can be read, by name."""

STORAGE_DTYPES = {dtype.choice: dtype for dtype in _TABLE if dtype.choice is not None}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be stored, C-order and little-endian.

    `shape` has at least one axis and no axis of length 0; a row is one step along the first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.dtype in DTYPES, self
        assert self.shape, self
        assert min(self.shape) > 0, self

    @property
    def numel(self) -> int:
        """Elements in the tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.numel * DTYPES[self.dtype].nbytes

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row."""
        return self.nbytes // self.shape[0]
