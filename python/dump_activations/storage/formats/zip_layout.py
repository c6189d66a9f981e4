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
CENTRAL_HEADER = struct.Struct("<4s6H3I5H2I")
ZIP64_END = struct.Struct("<4sQ2H2I4Q")
ZIP64_LOCATOR = struct.Struct("<4sIQI")
END = struct.Struct("<4s4H2IH")

VERSION = 45  # the first with zip64
UTF8_NAMES = 1 << 11
STORED = 0
DATE_1980_01_01 = 0x21  # the earliest there is: equal content gives equal files
IN_ZIP64 = 0xFFFFFFFF
ZIP64_ID = 0x0001
ALIGNMENT_ID = 0xD935  # the extra field that zipalign pads with
EXTRA_HEADER = struct.Struct("<2H")


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
    zip64 = EXTRA_HEADER.pack(ZIP64_ID, 16) + struct.pack("<2Q", member.nbytes, member.nbytes)
    unpadded = position + LOCAL_HEADER.size + len(name) + len(zip64) + EXTRA_HEADER.size + 2
    padding = -(unpadded + len(member.head)) % member.alignment
    extra = (
        zip64
        + EXTRA_HEADER.pack(ALIGNMENT_ID, 2 + padding)
        + member.alignment.to_bytes(2, "little")
        + bytes(padding)
    )
    fields = LOCAL_HEADER.pack(b"PK\x03\x04", *_shared_fields(member, name, extra))
    return fields + name + extra


def _central_header(member: Member, position: int) -> bytes:
    name = member.name.encode()
    zip64 = struct.pack("<3Q", member.nbytes, member.nbytes, position)
    extra = EXTRA_HEADER.pack(ZIP64_ID, len(zip64)) + zip64
    fields = CENTRAL_HEADER.pack(
        b"PK\x01\x02",
        VERSION,  # made by
        *_shared_fields(member, name, extra),
        0,  # comment
        0,  # disk
        0,  # internal attributes
        0,  # external attributes
        IN_ZIP64,  # offset
    )
    return fields + name + extra


def _shared_fields(member: Member, name: bytes, extra: bytes) -> tuple[int, ...]:
    """What the local and the central header of a member say alike."""
    return (
        VERSION,  # needed
        UTF8_NAMES,
        STORED,
        0,  # time of day
        DATE_1980_01_01,
        member.crc32,
        IN_ZIP64,  # compressed size
        IN_ZIP64,  # size
        len(name),
        len(extra),
    )


def _end_records(count: int, directory_offset: int, directory_nbytes: int) -> bytes:
    zip64_end = ZIP64_END.pack(
        b"PK\x06\x06",
        ZIP64_END.size - 12,  # of what follows this field
        VERSION,
        VERSION,
        0,  # this disk
        0,  # the disk of the directory
        count,
        count,
        directory_nbytes,
        directory_offset,
    )
    locator = ZIP64_LOCATOR.pack(b"PK\x06\x07", 0, directory_offset + directory_nbytes, 1)
    end = END.pack(b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, IN_ZIP64, IN_ZIP64, 0)
    return zip64_end + locator + end
