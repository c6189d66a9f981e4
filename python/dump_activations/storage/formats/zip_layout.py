"""Stored (uncompressed) zip64 archives whose members' data lies at chosen alignments.

Format: PKWARE's APPNOTE 6.3, sections 4.3.7 (local header), 4.3.12 (central directory),
4.3.14 to 4.3.16 (its end records) and 4.5.3 (zip64 extra field).
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from dump_activations import _rust
from dump_activations.storage.formats.layout import Layout

LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
_ZIP64_END = struct.Struct("<4sQ2H2I4Q")
_ZIP64_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")

_VERSION = 45  # the first with zip64
_UTF8_NAMES = 1 << 11
_STORED = 0
_DATE_1980_01_01 = 0x21  # the earliest there is: equal content gives equal files
_IN_ZIP64 = 0xFFFFFFFF
_ZIP64_ID = 0x0001
_ALIGNMENT_ID = 0xD935  # the extra field that zipalign pads with
_EXTRA_HEADER = struct.Struct("<2H")


@dataclass(frozen=True)
class Member:
    """A file in the archive: `head`, then `tail_nbytes` bytes of tensor data.

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

    @property
    def crc32(self) -> int:
        """CRC-32 of the whole member."""
        return _rust.combine_crc32(zlib.crc32(self.head), self.tail_crc32, self.tail_nbytes)


def zip_layout(members: Sequence[Member]) -> Layout:
    """Lay out an archive; `offsets` has, under each member's name, where its tail starts.

    Every size and offset is in zip64 form, so that the layout is one and the same for all sizes.
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
    unpadded = position + LOCAL_HEADER.size + len(name) + len(zip64) + _EXTRA_HEADER.size + 2
    padding = -(unpadded + len(member.head)) % member.alignment
    extra = (
        zip64
        + _EXTRA_HEADER.pack(_ALIGNMENT_ID, 2 + padding)
        + member.alignment.to_bytes(2, "little")
        + bytes(padding)
    )
    fields = LOCAL_HEADER.pack(b"PK\x03\x04", *_shared_fields(member, name, extra))
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
    """Return what the local and the central header of a member say alike."""
    return (
        _VERSION,  # needed
        _UTF8_NAMES,
        _STORED,
        0,  # time of day
        _DATE_1980_01_01,
        member.crc32,
        _IN_ZIP64,  # compressed size
        _IN_ZIP64,  # size
        len(name),
        len(extra),
    )


def _end_records(count: int, directory_offset: int, directory_nbytes: int) -> bytes:
    zip64_end = _ZIP64_END.pack(
        b"PK\x06\x06",
        _ZIP64_END.size - 12,  # of what follows this field
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
