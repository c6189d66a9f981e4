"""Zip archives of tensors: where every byte lies, and where other programs put theirs.

Archives are written stored (uncompressed) in zip64 form, with members' data at chosen alignments.
Format: PKWARE's APPNOTE 6.3, sections 4.3.7 (local header), 4.3.12 (central directory),
4.3.14 to 4.3.16 (its end records) and 4.5.3 (zip64 extra field).
"""

import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import BinaryIO, NamedTuple

from dump_activations import _rust
from dump_activations.dtypes import TensorSpec
from dump_activations.storage.formats.layout import ALIGNMENT, Layout, are_disjoint, read_exactly

MAX_DIRECTORY_NBYTES = 1 << 20
"""Largest directory that is read: some 10,000 members. A dump has some hundred."""

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
_ZIP64_END = struct.Struct("<4sQ2H2I4Q")
_ZIP64_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")

_VERSION = 45  # the first with zip64
_UTF8_NAMES = 1 << 11
_ENCRYPTED = 1
_STORED = 0
_DATE_1980_01_01 = 0x21  # the earliest date: equal content gives equal files
_IN_ZIP64 = 0xFFFFFFFF
_ZIP64_ID = 0x0001
_ALIGNMENT_ID = 0xD935  # the extra field that zipalign pads with
_EXTRA_HEADER = struct.Struct("<2H")

# Raised by `zipfile`; the last two where it seeks outside of the file.
_NO_ARCHIVE = (zipfile.BadZipFile, NotImplementedError, struct.error, OSError, OverflowError)


class Member(NamedTuple):
    """A member to be written: `head`, then the data of a tensor, which is aligned."""

    name: str
    head: bytes
    tensor: TensorSpec | None = None


def zip_layout(members: Sequence[Member], crc32s: Mapping[str, int] | None) -> Layout:
    """Lay out an archive, all in zip64 form, so that nothing depends on sizes."""
    assert len({member.name for member in members}) == len(members)
    position = 0
    offsets: dict[str, int] = {}
    skeleton: list[tuple[int, bytes]] = []
    directory = b""
    for name, head, tensor in members:
        crc32, nbytes, alignment = zlib.crc32(head), len(head), 1
        if tensor is not None:
            of_data = crc32s[tensor.name] if crc32s else 0
            crc32 = _rust.combine_crc32(crc32, of_data, tensor.nbytes)
            nbytes, alignment = nbytes + tensor.nbytes, ALIGNMENT
        place = position + len(head)
        local, central = _headers(name, crc32, nbytes, position, data=place, alignment=alignment)
        skeleton.append((position, local + head))
        directory += central
        if tensor is not None:
            offsets[tensor.name] = position + len(local) + len(head)
        position += len(local) + nbytes
    end = directory + _end_records(len(members), position, len(directory))
    skeleton.append((position, end))
    return Layout(size=position + len(end), offsets=offsets, skeleton=tuple(skeleton))


def _headers(
    name: str, crc32: int, nbytes: int, position: int, *, data: int, alignment: int
) -> tuple[bytes, bytes]:
    """Return the local and the central header of a member at `position`.

    The local header moves what would be at `data` without it to a multiple of `alignment`.
    """
    encoded, sizes = name.encode(), struct.pack("<2Q", nbytes, nbytes)
    extra = _EXTRA_HEADER.pack(_ZIP64_ID, len(sizes)) + sizes
    unpadded = _LOCAL_HEADER.size + len(encoded) + len(extra) + _EXTRA_HEADER.size + 2
    padding = -(data + unpadded) % alignment
    extra += _EXTRA_HEADER.pack(_ALIGNMENT_ID, 2 + padding)
    extra += alignment.to_bytes(2, "little") + bytes(padding)
    central_extra = _EXTRA_HEADER.pack(_ZIP64_ID, 24) + sizes + position.to_bytes(8, "little")
    shared = (
        *(_VERSION, _UTF8_NAMES, _STORED),
        *(0, _DATE_1980_01_01),  # time of day, date
        *(crc32, _IN_ZIP64, _IN_ZIP64),  # and both sizes
        len(encoded),
    )
    local = _LOCAL_HEADER.pack(b"PK\x03\x04", *shared, len(extra))
    # Zeros: comment, disk, internal and external attributes. The offset is in the extra field.
    central = _CENTRAL_HEADER.pack(
        *(b"PK\x01\x02", _VERSION, *shared, len(central_extra), 0, 0, 0, 0, _IN_ZIP64)
    )
    return local + encoded + extra, central + encoded + central_extra


def _end_records(count: int, directory_offset: int, directory_nbytes: int) -> bytes:
    zip64_end = _ZIP64_END.pack(
        *(b"PK\x06\x06", _ZIP64_END.size - 12),  # bytes after this field
        *(_VERSION, _VERSION),
        *(0, 0),  # this disk, and the directory's
        *(count, count, directory_nbytes, directory_offset),
    )
    locator = _ZIP64_LOCATOR.pack(b"PK\x06\x07", 0, directory_offset + directory_nbytes, 1)
    end = _END.pack(b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, _IN_ZIP64, _IN_ZIP64, 0)
    return zip64_end + locator + end


class StoredMember(NamedTuple):
    """A member of an archive that is read: `nbytes` of content, in `packed_nbytes` from `start`."""

    name: str
    nbytes: int
    start: int
    packed_nbytes: int
    is_packed: bool


def read_members(file: BinaryIO, size: int) -> dict[str, StoredMember]:
    """List the members of an archive by name, in the order of its directory."""
    try:
        archive = zipfile.ZipFile(_DirectoryFile(file))
    except _NO_ARCHIVE as error:
        raise ValueError(f"it is not a zip archive, or cut short: {error}") from None
    members: dict[str, StoredMember] = {}
    ranges = [(archive.start_dir, size)]
    for entry in archive.infolist():
        if entry.filename in members:
            raise ValueError(f"it has two members {entry.filename}")
        if not 0 <= entry.header_offset < archive.start_dir:
            raise ValueError(f"its member {entry.filename} lies outside it")
        member = _member(file, entry)
        members[member.name] = member
        ranges.append((entry.header_offset, member.start + member.packed_nbytes))
    if not are_disjoint(ranges):
        raise ValueError("its members overlap")
    return members


def read_head(file: BinaryIO, member: StoredMember, nbytes: int) -> bytes:
    """Read at most the first `nbytes` bytes of a member's content, without its checksum."""
    if not member.is_packed:
        return read_exactly(file, member.start, min(nbytes, member.nbytes))
    # Incompressible data grows by an eighth at most.
    packed = read_exactly(file, member.start, min(2 * nbytes, member.packed_nbytes))
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, nbytes)
    except zlib.error as error:
        raise ValueError(f"its member {member.name} cannot be read: {error}") from None


class _DirectoryFile:
    """A file from which `zipfile` reads a directory; a large one is refused before it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, nbytes: int = -1) -> bytes:
        if nbytes > MAX_DIRECTORY_NBYTES:
            raise ValueError("its directory is larger than a dump's")
        return self._read(nbytes)


def _member(file: BinaryIO, entry: zipfile.ZipInfo) -> StoredMember:
    header = read_exactly(file, entry.header_offset, _LOCAL_HEADER.size)
    signature, *_, name_nbytes, extra_nbytes = _LOCAL_HEADER.unpack(header)
    if signature != b"PK\x03\x04":
        raise ValueError(f"the header of its member {entry.filename} is damaged")
    is_packed = entry.compress_type == zipfile.ZIP_DEFLATED
    if entry.flag_bits & _ENCRYPTED or not (is_packed or entry.compress_type == zipfile.ZIP_STORED):
        raise ValueError(f"its member {entry.filename} is encrypted, or compressed in a rare way")
    if not is_packed and entry.file_size != entry.compress_size:
        raise ValueError(f"its member {entry.filename} has two sizes")
    start = entry.header_offset + _LOCAL_HEADER.size + int(name_nbytes) + int(extra_nbytes)
    return StoredMember(entry.filename, entry.file_size, start, entry.compress_size, is_packed)
