"""The .pt format: a zip archive with a pickle and one storage a tensor, as torch.save writes it.

The pickle holds a flat dict of the tensors and `metadata`. There is no `.format_version` record:
with it, torch.load(mmap=True) may compute where storages lie by the padding rules of torch's own
writer instead of reading it from the archive.
"""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import BinaryIO

from dump_activations.dtypes import DTYPES, TensorSpec
from dump_activations.storage.formats.contents import Contents, StoredTensor, read_exactly
from dump_activations.storage.formats.layout import ALIGNMENT, Format, Layout, fits, storage_order
from dump_activations.storage.formats.pt_pickle import dump_pickle, load_pickle
from dump_activations.storage.formats.zip_layout import Member, zip_layout
from dump_activations.storage.formats.zip_reader import read_members

ROOT = "archive"
MAX_PICKLE_NBYTES = 512 << 10
"""Of a pickle that is read: 2,000 of a dump's tensors, and as much as is checked in a second."""


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
    members += [
        Member(
            _member_name(keys[spec.name]),
            b"",
            spec.nbytes,
            crc32s[spec.name] if crc32s else 0,
            ALIGNMENT,
        )
        for spec in ordered
    ]
    archive = zip_layout(members)
    offsets = {spec.name: archive.offsets[_member_name(keys[spec.name])] for spec in specs}
    return Layout(archive.size, offsets, archive.skeleton)


def _member_name(key: str) -> str:
    return f"{ROOT}/data/{key}"


def read(file: BinaryIO, size: int) -> Contents:
    """Read the pickle of a .pt file without torch, and without running anything in it."""
    members = read_members(file, size)
    pickles = [name for name in members if PurePosixPath(name).name == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError("it has no data.pkl")
    data = members[pickles[0]]
    if data.is_packed or data.nbytes > MAX_PICKLE_NBYTES:
        raise ValueError("its data.pkl is compressed, or too large to be that of a dump")
    content = load_pickle(read_exactly(file, data.start, data.nbytes))
    root = PurePosixPath(data.name).parent
    tensors = []
    for name, tensor in content.tensors.items():
        member = members.get(f"{root}/data/{tensor.key}")
        if member is None or not fits(tensor.dtype, tensor.shape, member.nbytes):
            raise ValueError(f"its tensor {name!r} has no storage of its size")
        tensors.append(StoredTensor(name, tensor.dtype, tensor.shape, member.nbytes, member.offset))
    return Contents(tensors, content.metadata)


FORMAT = Format("pt", ".pt", frozenset(DTYPES), layout, read)
