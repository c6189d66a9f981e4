"""The pickle in a .pt file: a flat dict of tensors and `metadata`, as torch.save writes it.

A tensor is `torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)`
and a storage the persistent id ('storage', its class, key, 'cpu', numel). It is written opcode by
opcode (Python's pickletools says what each does), so that equal content gives equal bytes, and read
by an unpickler that knows these names and no others. Neither needs torch.
"""

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dump_activations.dtypes import DTYPES, TensorSpec
from dump_activations.storage.formats.contents import is_shape, text_metadata

PROTOCOL = 2  # what torch.load(weights_only=True) reads
DTYPE_NAMES = {dtype.torch_storage: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class PickledTensor:
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
        _refuse_large_memo(data)
        content = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # whatever the pickle can bring about
        raise ValueError(f"its data.pkl is no dict of tensors: {error}") from None
    if not isinstance(content, dict):
        raise ValueError("its data.pkl is no dict")
    metadata = text_metadata(content.pop("metadata", {}))
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, PickledTensor):
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
    no_hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = _tuple(
        storage + pickle.BINPERSID,
        _int(0),
        _tuple(*map(_int, spec.shape)),
        _tuple(*map(_int, _strides(spec.shape))),
        pickle.NEWFALSE,
        no_hooks,
    )
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


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
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return _StorageClass(DTYPE_NAMES.get(name, name))
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", _StorageClass(dtype=dtype), str(key), str(), int()):
                return PickledTensor(dtype, (), key)
        raise pickle.UnpicklingError("it refers to something that is no storage")


@dataclass(frozen=True)
class _StorageClass:
    dtype: str


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *_options: Any
) -> PickledTensor:
    if not isinstance(storage, PickledTensor) or not is_shape(shape):
        raise pickle.UnpicklingError("it has a tensor without a storage or a shape")
    if offset != 0 or (shape and tuple(strides) != _strides(shape)):
        raise pickle.UnpicklingError("it has a tensor that is a view of another")
    return PickledTensor(storage.dtype, tuple(shape), storage.key)


def _refuse_large_memo(data: bytes) -> None:
    """Raise ValueError for a pickle that would make the unpickler allocate more than its size."""
    for opcode, argument, _position in pickletools.genops(data):
        if "PUT" in opcode.name and argument is not None and argument > len(data):
            raise ValueError("its memo is larger than itself")
