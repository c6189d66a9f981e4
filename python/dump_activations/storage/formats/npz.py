"""The .npz format: a zip archive with one .npy file a tensor.

Format of a .npy file: numpy.lib.format, version 1.0. `metadata` is a 0-d array of Unicode, four
bytes a character.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from dump_activations.dtypes import DTYPES, TensorSpec
from dump_activations.storage.formats.contents import (
    Contents,
    StoredTensor,
    is_shape,
    text_metadata,
)
from dump_activations.storage.formats.layout import ALIGNMENT, Format, Layout, storage_order
from dump_activations.storage.formats.zip_layout import Member, zip_layout
from dump_activations.storage.formats.zip_reader import (
    StoredMember,
    open_archive,
    read_head,
    read_members,
)

HEADER_ALIGNMENT = 64  # what numpy.lib.format pads its headers to
MAX_HEADER_NBYTES = 1 << 16
MAX_METADATA_NBYTES = 100_000_000


def layout(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], crc32s: Mapping[str, int] | None
) -> Layout:
    """Lay out an .npz file."""
    text = json.dumps(dict(metadata))
    head = _npy_header(f"<U{len(text)}", ()) + text.encode("utf-32-le")
    members = [Member(_member_name("metadata"), head)]
    members += [
        Member(
            _member_name(spec.name),
            _npy_header(DTYPES[spec.dtype].npy, spec.shape),
            spec.nbytes,
            crc32s[spec.name] if crc32s else 0,
            ALIGNMENT,
        )
        for spec in storage_order(specs)
    ]
    archive = zip_layout(members)
    offsets = {spec.name: archive.offsets[_member_name(spec.name)] for spec in specs}
    return Layout(archive.size, offsets, archive.skeleton)


def _member_name(name: str) -> str:
    return f"{name}.npy"


def _npy_header(descriptor: str | None, shape: tuple[int, ...]) -> bytes:
    assert descriptor is not None, "the format cannot hold this dtype"
    fields = f"{{'descr': {descriptor!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    magic = b"\x93NUMPY\x01\x00"
    prefix_nbytes = len(magic) + 2
    padding = -(prefix_nbytes + len(fields) + 1) % HEADER_ALIGNMENT
    text = (fields + " " * padding + "\n").encode("latin-1")
    return magic + len(text).to_bytes(2, "little") + text


def read(file: BinaryIO, size: int) -> Contents:
    """Read the .npy headers in an .npz file, and its metadata."""
    tensors = []
    metadata: dict[str, str] = {}
    with open_archive(file) as archive:
        for member in read_members(archive, file, size):
            head = read_head(archive, file, member, MAX_HEADER_NBYTES)
            array = _stored_array(head, member)
            if array.name == "metadata" and array.dtype.startswith("str") and not array.shape:
                content = read_head(archive, file, member, MAX_METADATA_NBYTES)
                metadata = _metadata(content[member.nbytes - array.nbytes :])
            else:
                tensors.append(array)
    return Contents(tensors, metadata)


def _stored_array(head: bytes, member: StoredMember) -> StoredTensor:
    from numpy.lib import format as npy

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    stream = io.BytesIO(head)
    try:
        shape, _is_fortran, dtype = readers[npy.read_magic(stream)](stream)
    except Exception:  # NumPy evaluates the header as Python literals
        raise ValueError(f"its member {member.name} is no array") from None
    nbytes = member.nbytes - stream.tell()
    if dtype.hasobject or not is_shape(shape) or math.prod(shape) * dtype.itemsize != nbytes:
        raise ValueError(f"its array {member.name} is damaged, or holds objects")
    offset = None if member.offset is None else member.offset + stream.tell()
    return StoredTensor(member.name.removesuffix(".npy"), dtype.name, shape, nbytes, offset)


def _metadata(content: bytes) -> dict[str, str]:
    try:
        return text_metadata(json.loads(content.decode("utf-32-le").rstrip("\0")))
    except RecursionError:
        raise ValueError("its metadata is no JSON") from None


FORMAT = Format(
    "npz",
    ".npz",
    frozenset(name for name, dtype in DTYPES.items() if dtype.npy is not None),
    layout,
    read,
)
