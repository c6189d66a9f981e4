"""The pickle in a .pt file: a flat dict of tensors and `metadata`, as torch.save writes it.

A tensor is `torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)`
and a storage the persistent id ('storage', its class, key, 'cpu', numel). It is written opcode by
opcode (Python's pickletools says what each does), so that equal content gives equal bytes, and read
by an unpickler that knows these names and no others. Neither needs torch.
"""

import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dump_activations.dtypes import DTYPES, TensorSpec
from dump_activations.pickles import check_pickle
from dump_activations.storage.formats.contents import is_shape, text_metadata

PROTOCOL = 2  # what torch.load(weights_only=True) reads
DTYPE_NAMES = {dtype.torch_storage: name for name, dtype in DTYPES.items()}
REBUILD_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
ORDERED_DICT = ("collections", "OrderedDict")


class PickledTensor(NamedTuple):
    """Stands for a tensor whose data is in the archive, in the storage named `key`."""

    dtype: str
    shape: tuple[int, ...]
    key: str


@dataclass(frozen=True)
class PickledDump:
    """The content of the pickle."""

    tensors: dict[str, PickledTensor]
    metadata: dict[str, str]


def dump_pickle(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], keys: Mapping[str, str]
) -> bytes:
    """Pickle a dump whose tensors have their data in the storages named by `keys`."""
    entries = [_text(spec.name) + _tensor(spec, keys[spec.name]) for spec in specs]
    texts = [_text(key) + _text(value) for key, value in metadata.items()]
    entries.append(_text("metadata") + _dict(texts))
    return pickle.PROTO + bytes([PROTOCOL]) + _dict(entries) + pickle.STOP


def load_pickle(data: bytes) -> PickledDump:
    """Read a dump's pickle, which may be anything; nothing that it names is run or imported.

    Raises:
        ValueError: it is something else.
    """
    try:
        check_pickle(data)
        content = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # whatever the pickle can bring about
        raise ValueError(f"its data.pkl is no dict of tensors: {error}") from None
    if not isinstance(content, dict):
        raise ValueError("its data.pkl is no dict")
    metadata = text_metadata(content.pop("metadata", {}))
    for name, value in content.items():
        if not isinstance(name, str):
            raise ValueError("its data.pkl has names that are no text")
        if not isinstance(value, PickledTensor):
            raise ValueError(f"its entry {name!r} is no tensor")
    return PickledDump(content, metadata)


def _tensor(spec: TensorSpec, key: str) -> bytes:
    storage = _tuple(
        _text("storage"),
        _global("torch", DTYPES[spec.dtype].torch_storage),
        _text(key),
        _text("cpu"),
        _int(spec.numel),
    )
    no_hooks = _global(*ORDERED_DICT) + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = _tuple(
        storage + pickle.BINPERSID,
        _int(0),
        _tuple(*map(_int, spec.shape)),
        _tuple(*map(_int, _strides(spec.shape))),
        pickle.NEWFALSE,
        no_hooks,
    )
    return _global(*REBUILD_TENSOR) + arguments + pickle.REDUCE


def _dict(entries: Sequence[bytes]) -> bytes:
    return pickle.EMPTY_DICT + pickle.MARK + b"".join(entries) + pickle.SETITEMS


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode("ascii")


def _text(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + len(data).to_bytes(4, "little") + data


def _int(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + value.to_bytes(4, "little")
    data = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(data)]) + data


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements between neighbours along each axis of a C-order tensor."""
    strides = [1]
    for length in shape[:0:-1]:
        strides.append(strides[-1] * length)
    return tuple(reversed(strides))


class _Unpickler(pickle.Unpickler):
    """Makes stand-ins that have no attributes a pickle could set."""

    def find_class(self, module: str, name: str) -> Any:
        is_storage = module == "torch" and name.endswith("Storage")
        if not is_storage and (module, name) not in (REBUILD_TENSOR, ORDERED_DICT):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _Global(module, name)

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", _Global("torch", name), str(key), str(), int()):
                return PickledTensor(DTYPE_NAMES.get(name, name), (), key)
        raise pickle.UnpicklingError("it refers to something that is no storage")


class _Global(NamedTuple):
    """Stands for a function or class that the pickle names."""

    module: str
    name: str

    def __call__(self, *arguments: Any) -> Any:
        if self == REBUILD_TENSOR:
            return _rebuild_tensor(*arguments)
        if self == ORDERED_DICT and not arguments:
            return _OrderedDict()
        raise pickle.UnpicklingError(f"it calls {self.module}.{self.name}")


class _OrderedDict(dict[Any, Any]):
    def __setstate__(self, state: Any) -> None:
        """Do without the attributes that a module's state dict has."""


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *_options: Any
) -> PickledTensor:
    if not isinstance(storage, PickledTensor) or not is_shape(shape):
        raise pickle.UnpicklingError("it has a tensor without a storage or a shape")
    if offset != 0 or (shape and tuple(strides) != _strides(shape)):
        raise pickle.UnpicklingError("it has a tensor that is a view of another")
    return PickledTensor(storage.dtype, tuple(shape), storage.key)
