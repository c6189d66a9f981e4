"""Zip archives of tensors: where every byte lies, and where other programs put theirs.

Archives are written stored (uncompressed) in zip64 form, with members' data at chosen alignments.
Format: PKWARE's APPNOTE 6.3, sections 4.3.7 (local header), 4.3.12 (central directory),
4.3.14 to 4.3.16 (its end records) and 4.5.3 (zip64 extra field).
"""

import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from dump_activations import _rust
from dump_activations.storage.formats.contents import are_disjoint, read_exactly
from dump_activations.storage.formats.layout import Layout

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


@dataclass(frozen=True)
class Member:
    """A member to be written: `head`, then `tail_nbytes` bytes of tensor data.

    The data, or the head where there is none, starts on a multiple of `alignment`. `tail_crc32` is
    the CRC-32 of the data.
    """

    name: str
    head: bytes
    tail_nbytes: int = 0
    tail_crc32: int = 0
    alignment: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of the whole member."""
        return len(self.head) + self.tail_nbytes


def zip_layout(members: Sequence[Member]) -> Layout:
    """Lay out an archive; `offsets` maps each member's name to the start of its tail.

    Every size and offset is in zip64 form, so that the layout does not depend on sizes.
    """
    assert len({member.name for member in members}) == len(members)
    position = 0
    offsets: dict[str, int] = {}
    skeleton: list[tuple[int, bytes]] = []
    directory = bytearray()
    for member in members:
        header = _local_header(member, position)
        directory += _central_header(member, position)
        skeleton.append((position, header + member.head))
        offsets[member.name] = position + len(header) + len(member.head)
        position = offsets[member.name] + member.tail_nbytes
    end = bytes(directory) + _end_records(len(members), position, len(directory))
    skeleton.append((position, end))
    return Layout(size=position + len(end), offsets=offsets, skeleton=tuple(skeleton))


def _local_header(member: Member, position: int) -> bytes:
    name = member.name.encode()
    zip64 = _EXTRA_HEADER.pack(_ZIP64_ID, 16) + struct.pack("<2Q", member.nbytes, member.nbytes)
    unpadded = position + _LOCAL_HEADER.size + len(name) + len(zip64) + _EXTRA_HEADER.size + 2
    padding = -(unpadded + len(member.head)) % member.alignment
    extra = (
        zip64
        + _EXTRA_HEADER.pack(_ALIGNMENT_ID, 2 + padding)
        + member.alignment.to_bytes(2, "little")
        + bytes(padding)
    )
    fields = _LOCAL_HEADER.pack(b"PK\x03\x04", *_shared_fields(member, name, extra))
    return fields + name + extra


def _central_header(member: Member, position: int) -> bytes:
    name = member.name.encode()
    zip64 = struct.pack("<3Q", member.nbytes, member.nbytes, position)
    extra = _EXTRA_HEADER.pack(_ZIP64_ID, len(zip64)) + zip64
    fields = _CENTRAL_HEADER.pack(
        b"PK\x01\x02",
        _VERSION,  # made by
        *_shared_fields(member, name, extra),
        0,  # comment
        0,  # disk
        0,  # internal attributes
        0,  # external attributes
        _IN_ZIP64,  # offset
    )
    return fields + name + extra


def _shared_fields(member: Member, name: bytes, extra: bytes) -> tuple[int, ...]:
    """Return the fields that a member's local and central headers share."""
    head_crc32 = zlib.crc32(member.head)
    return (
        _VERSION,  # needed
        _UTF8_NAMES,
        _STORED,
        0,  # time of day
        _DATE_1980_01_01,
        _rust.combine_crc32(head_crc32, member.tail_crc32, member.tail_nbytes),
        _IN_ZIP64,  # compressed size
        _IN_ZIP64,  # size
        len(name),
        len(extra),
    )


def _end_records(count: int, directory_offset: int, directory_nbytes: int) -> bytes:
    zip64_end = _ZIP64_END.pack(
        b"PK\x06\x06",
        _ZIP64_END.size - 12,  # bytes after this field
        _VERSION,
        _VERSION,
        0,  # this disk
        0,  # the disk of the directory
        count,
        count,
        directory_nbytes,
        directory_offset,
    )
    locator = _ZIP64_LOCATOR.pack(b"PK\x06\x07", 0, directory_offset + directory_nbytes, 1)
    end = _END.pack(b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, _IN_ZIP64, _IN_ZIP64, 0)
    return zip64_end + locator + end


@dataclass(frozen=True)
class StoredMember:
    """A member of an archive that is read.

    Attributes:
        nbytes: bytes of its content.
        start: offset of its bytes in the file.
        packed_nbytes: how many bytes it takes in the file.
        is_packed: whether they are deflated.
    """

    name: str
    nbytes: int
    start: int
    packed_nbytes: int
    is_packed: bool

    @property
    def offset(self) -> int | None:
        """Offset of its content in the file; None if it is compressed."""
        return None if self.is_packed else self.start


def read_members(file: BinaryIO, size: int) -> dict[str, StoredMember]:
    """List the members of an archive by name, in the order of its directory.

    Raises:
        ValueError: the file is not an archive, or a member is encrypted, compressed in another way
            than by deflation, or overlaps another member or the directory.
    """
    try:
        archive = zipfile.ZipFile(_DirectoryFile(file))
    except (zipfile.BadZipFile, NotImplementedError, struct.error) as error:
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
    """Read at most the first `nbytes` bytes of a member's content, without its checksum.

    Raises:
        ValueError: the member is damaged.
    """
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
        self._file = file
        self.tell = file.tell

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and not 0 <= offset < 1 << 63:
            raise ValueError("its directory lies outside it")
        return self._file.seek(offset, whence)

    def read(self, nbytes: int = -1) -> bytes:
        if nbytes > MAX_DIRECTORY_NBYTES:
            raise ValueError("its directory is larger than a dump's")
        return self._file.read(nbytes)


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
