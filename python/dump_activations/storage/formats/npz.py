"""The .npz format: a zip archive with one .npy file per tensor.

Format of a .npy file: numpy.lib.format, version 1.0. `metadata` is a 0-d array of Unicode, four
bytes per character.
"""

import io
import json
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from dump_activations.dtypes import DTYPES, READABLE_DTYPES, TensorSpec
from dump_activations.storage.formats.layout import (
    MAX_JSON_CHARACTERS,
    Contents,
    Format,
    Layout,
    StoredTensor,
    fits,
    is_shape,
    parse_json,
    storage_order,
    text_metadata,
)
from dump_activations.storage.formats.zip import (
    Member,
    StoredMember,
    read_head,
    read_members,
    zip_layout,
)

MAX_HEADER_NBYTES = 10_000
"""Longest header that is read, as in NumPy."""

_MAX_METADATA_NBYTES = MAX_HEADER_NBYTES + 4 * MAX_JSON_CHARACTERS
_HEADER_ALIGNMENT = 64  # of numpy.lib.format
_NAMES = {dtype.npy: name for name, dtype in READABLE_DTYPES.items()}


def layout(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], crc32s: Mapping[str, int] | None
) -> Layout:
    """Lay out an .npz file."""
    text = json.dumps(dict(metadata))
    head = _npy_header(f"<U{len(text)}", ()) + text.encode("utf-32-le")
    members = [Member("metadata.npy", head)]
    members += [
        Member(f"{spec.name}.npy", _npy_header(DTYPES[spec.dtype].npy, spec.shape), spec)
        for spec in storage_order(specs)
    ]
    return zip_layout(members, crc32s)


def _npy_header(descriptor: str | None, shape: tuple[int, ...]) -> bytes:
    assert descriptor is not None, "the format cannot hold this dtype"
    fields = f"{{'descr': {descriptor!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    magic = b"\x93NUMPY\x01\x00"
    prefix_nbytes = len(magic) + 2
    padding = -(prefix_nbytes + len(fields) + 1) % _HEADER_ALIGNMENT
    text = (fields + " " * padding + "\n").encode("latin-1")
    return magic + len(text).to_bytes(2, "little") + text


def read(file: BinaryIO, size: int) -> Contents:
    """Read the .npy headers in an .npz file, and its metadata."""
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for member in read_members(file, size).values():
        array = _stored_array(read_head(file, member, MAX_HEADER_NBYTES), member)
        if array.name == "metadata" and array.dtype.startswith("<U") and not array.shape:
            if member.nbytes > _MAX_METADATA_NBYTES:
                raise ValueError("its metadata is larger than a dump's")
            content = read_head(file, member, member.nbytes)
            text = content[member.nbytes - array.nbytes :].decode("utf-32-le")
            metadata = text_metadata(parse_json(text.rstrip("\0")))
        elif array.name in tensors:
            raise ValueError(f"it has two arrays {array.name}")
        else:
            tensors[array.name] = array
    return Contents(tensors, metadata)


def _stored_array(head: bytes, member: StoredMember) -> StoredTensor:
    # Here, because the command checks the output's suffix before it imports NumPy.
    import numpy as np

    stream = io.BytesIO(head)
    try:
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        read_header = readers[np.lib.format.read_magic(stream)]
        shape, is_fortran, descr = read_header(stream, max_header_size=MAX_HEADER_NBYTES)
    except Exception:  # NumPy parses a Python literal, which fails in many ways.
        raise ValueError(f"its member {member.name} is not an array") from None
    dtype = _NAMES.get(descr.str, descr.str)
    nbytes = member.nbytes - stream.tell()
    if descr.hasobject or not is_shape(shape) or not fits(dtype, shape, nbytes):
        raise ValueError(f"its array {member.name} is damaged, or holds objects")
    is_plain = not member.is_packed and (not is_fortran or len(shape) < 2)
    offset = member.start + stream.tell() if is_plain else None
    return StoredTensor(member.name.removesuffix(".npy"), dtype, shape, nbytes, offset)


_WRITABLE = frozenset(name for name, dtype in DTYPES.items() if dtype.npy is not None)
FORMAT = Format("npz", ".npz", _WRITABLE, layout, read)
