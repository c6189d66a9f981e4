"""The .pt format: a zip archive with a pickle and one storage per tensor, as torch.save writes it.

The pickle holds a flat dict of the tensors and `metadata`. A tensor is
`torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)` and a
storage the persistent id ('storage', its class, key, 'cpu', numel). Opcodes are written one by one
(Python's pickletools describes each), so that equal content gives equal bytes. They are read one by
one too: names stay names, so that a pickle cannot call anything. Neither needs torch.

There is no `.format_version` record: with it, torch.load(mmap=True) may compute offsets of storages
by the padding rules of torch's own writer instead of reading them from the archive.
"""

import operator
import pickle
import pickletools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from dump_activations.dtypes import DTYPES, READABLE_DTYPES, TensorSpec
from dump_activations.storage.formats.layout import (
    Contents,
    Format,
    Layout,
    StoredTensor,
    fits,
    is_shape,
    read_exactly,
    storage_order,
    text_metadata,
)
from dump_activations.storage.formats.zip import Member, read_members, zip_layout

ROOT = "archive"
MAX_PICKLE_NBYTES = 512 << 10
"""Largest pickle that is read: 2,000 tensors of a dump, in a second."""

_PROTOCOL = 2  # of torch.load(weights_only=True)
_NAMES = {f"torch {dtype.torch_storage}": name for name, dtype in READABLE_DTYPES.items()}
_REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
_ORDERED_DICT = "collections OrderedDict"


def layout(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], crc32s: Mapping[str, int] | None
) -> Layout:
    """Lay out a .pt file."""
    ordered = storage_order(specs)
    keys = {spec.name: str(index) for index, spec in enumerate(ordered)}
    members = [
        Member(f"{ROOT}/data.pkl", dump_pickle(specs, metadata, keys)),
        Member(f"{ROOT}/byteorder", b"little"),
        Member(f"{ROOT}/version", b"3\n"),
    ]
    members += [Member(f"{ROOT}/data/{keys[spec.name]}", b"", spec) for spec in ordered]
    return zip_layout(members, crc32s)


def dump_pickle(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], keys: Mapping[str, str]
) -> bytes:
    """Pickle a dump whose tensors have their data in the storages named by `keys`."""
    entries = [_text(spec.name) + _tensor(spec, keys[spec.name]) for spec in specs]
    texts = [_text(key) + _text(value) for key, value in metadata.items()]
    entries.append(_text("metadata") + _dict(texts))
    return pickle.PROTO + bytes([_PROTOCOL]) + _dict(entries) + pickle.STOP


def _tensor(spec: TensorSpec, key: str) -> bytes:
    kind = _global(f"torch {DTYPES[spec.dtype].torch_storage}")
    storage = _tuple(_text("storage"), kind, _text(key), _text("cpu"), _int(spec.numel))
    shape, strides = (_tuple(*map(_int, each)) for each in (spec.shape, _strides(spec.shape)))
    no_hooks = _global(_ORDERED_DICT) + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = _tuple(
        *(storage + pickle.BINPERSID, _int(0), shape, strides, pickle.NEWFALSE, no_hooks)
    )
    return _global(_REBUILD_TENSOR) + arguments + pickle.REDUCE


def _dict(entries: Sequence[bytes]) -> bytes:
    return pickle.EMPTY_DICT + pickle.MARK + b"".join(entries) + pickle.SETITEMS


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _global(name: str) -> bytes:
    return pickle.GLOBAL + name.replace(" ", "\n").encode("ascii") + b"\n"


def _text(text: str) -> bytes:
    data = text.encode()
    return pickle.BINUNICODE + len(data).to_bytes(4, "little") + data


def _int(value: int) -> bytes:
    if value < 1 << 31:
        return pickle.BININT + value.to_bytes(4, "little")
    data = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(data)]) + data


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the elements between neighbours along each axis of a C-order tensor."""
    return (*accumulate(shape[:0:-1], operator.mul, initial=1),)[::-1]


def read(file: BinaryIO, size: int) -> Contents:
    """Read the pickle of a .pt file without torch, and without running anything in it."""
    members = read_members(file, size)
    pickles = [name for name in members if PurePosixPath(name).name == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError("it has no data.pkl")
    data = members[pickles[0]]
    if data.is_packed or data.nbytes > MAX_PICKLE_NBYTES:
        raise ValueError("its data.pkl is compressed, or larger than a dump's")
    found, metadata = load_pickle(read_exactly(file, data.start, data.nbytes))
    root = PurePosixPath(data.name).parent
    tensors = {}
    for name, tensor in found.items():
        member = members.get(f"{root}/data/{tensor.key}")
        if member is None or not fits(tensor.dtype, tensor.shape, member.nbytes):
            raise ValueError(f"its tensor {name!r} has no storage of its size")
        offset = None if member.is_packed else member.start
        tensors[name] = StoredTensor(name, tensor.dtype, tensor.shape, member.nbytes, offset)
    return Contents(tensors, metadata)


@dataclass(frozen=True)
class PickledTensor:
    """Stands for a tensor whose data is in the archive, in the storage named `key`."""

    dtype: str
    shape: tuple[int, ...]
    key: str


class _Global(str):
    """Name of a function or class, which is never looked up: `collections OrderedDict`."""

    __slots__ = ()


def load_pickle(data: bytes) -> tuple[dict[str, PickledTensor], dict[str, str]]:
    """Read the tensors by name, and the metadata; ValueError for any other pickle."""
    try:
        content = _load(data)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"its data.pkl is not a dict of tensors: {error}") from None
    if not isinstance(content, dict):
        raise ValueError("its data.pkl is not a dict")
    metadata = text_metadata(content.pop("metadata", {}))
    for name, value in content.items():
        if not isinstance(value, PickledTensor):
            raise ValueError(f"its entry {name!r} is not a tensor")
    return content, metadata


def _load(data: bytes) -> Any:  # noqa: PLR0912 -- one branch per opcode
    """Follow the opcodes that torch.save writes for such a dict.

    Only texts become keys: hashing a deep tuple takes the whole stack, and the process with it.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _position in pickletools.genops(data):
        match opcode.name:
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = opcode.name.removeprefix("TUPLE")
                start = len(stack) - int(count) if count else marks.pop()
                stack[start:] = [tuple(stack[start:])]
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                start = marks.pop() if opcode.name == "SETITEMS" else len(stack) - 2
                target, names, values = stack[start - 1], stack[start::2], stack[start + 1 :: 2]
                if type(target) is not dict or not all(type(name) is str for name in names):
                    raise ValueError("it has keys that are not text")
                target.update(zip(names, values, strict=True))
                del stack[start:]
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "GLOBAL":
                stack.append(_Global(argument))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            case "BUILD" if type(stack[-2]) is dict:  # attributes of a module's state dict
                stack.pop()
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(f"it has the opcode {name}")
    raise ValueError("it does not end")


def _storage(pid: Any) -> PickledTensor:
    match pid:
        case ("storage", _Global() as name, str(key), str(), int()) if name.startswith("torch "):
            return PickledTensor(_NAMES.get(name, name.removeprefix("torch ")), (), key)
    raise ValueError("it refers to something that is not a storage")


def _call(function: Any, arguments: Any) -> Any:
    """Return the result of one of the two calls in a dump's pickle."""
    match function, arguments:
        case _Global(), () if function == _ORDERED_DICT:
            return {}
        case _Global(), (PickledTensor() as storage, 0, tuple(shape), tuple(strides), *_) if (
            function == _REBUILD_TENSOR and is_shape(shape)
        ):
            if shape and strides != _strides(shape):
                raise ValueError("it has a tensor that is a view of another")
            return PickledTensor(storage.dtype, shape, storage.key)
    raise ValueError(f"it calls {str(function)[:80]!r}, or has a tensor without a shape")


FORMAT = Format("pt", ".pt", frozenset(DTYPES), layout, read)
