"""Where the data of a zip archive's members lies."""

import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from dump_activations.storage.formats.contents import are_disjoint, read_exactly
from dump_activations.storage.formats.zip_layout import LOCAL_HEADER

MAX_DIRECTORY_NBYTES = 1 << 20
"""Of a directory that is read: some 10,000 members. A dump has some hundred."""

ENCRYPTED = 1  # bit of a member's flags


@dataclass(frozen=True)
class StoredMember:
    """A member of an archive.

    Attributes:
        nbytes: of its content.
        start: where its bytes in the file start.
        packed_nbytes: how many those are.
        is_packed: whether they have to be inflated.
    """

    name: str
    nbytes: int
    start: int
    packed_nbytes: int
    is_packed: bool

    @property
    def offset(self) -> int | None:
        """Where its content starts in the file; None if it is compressed."""
        return None if self.is_packed else self.start


def read_members(file: BinaryIO, size: int) -> dict[str, StoredMember]:
    """List all members of the archive in a file by name, in the order of its directory.

    Raises:
        ValueError: there is no archive, or a member is encrypted, compressed in another way than
            by deflation, or in the place of another one or of the directory.
    """
    entries, directory_start = _read_directory(file)
    members: dict[str, StoredMember] = {}
    ranges = [(directory_start, size)]
    for entry in entries:
        if entry.filename in members:
            raise ValueError(f"it has two members {entry.filename}")
        if not 0 <= entry.header_offset < directory_start:
            raise ValueError(f"its member {entry.filename} lies outside it")
        member = _member(file, entry)
        members[member.name] = member
        ranges.append((entry.header_offset, member.start + member.packed_nbytes))
    if not are_disjoint(ranges):
        raise ValueError("its members overlap")
    return members


def read_head(file: BinaryIO, member: StoredMember, nbytes: int) -> bytes:
    """Read the first bytes of a member's content, or all of it if there are fewer; unchecked.

    Raises:
        ValueError: the member is compressed, and cannot be read.
    """
    if not member.is_packed:
        return read_exactly(file, member.start, min(nbytes, member.nbytes))
    # What cannot be compressed grows by an eighth at most.
    packed = read_exactly(file, member.start, min(2 * nbytes, member.packed_nbytes))
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, nbytes)
    except zlib.error as error:
        raise ValueError(f"its member {member.name} cannot be read: {error}") from None


class _DirectoryFile:
    """A file as `zipfile` reads its directory: in one piece, which has to be a small one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell = file.tell

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and not 0 <= offset < 1 << 63:
            raise ValueError("its directory lies outside it")
        return self._file.seek(offset, whence)

    def read(self, nbytes: int = -1) -> bytes:
        if nbytes > MAX_DIRECTORY_NBYTES:
            raise ValueError("its directory is too large to be that of a dump")
        return self._file.read(nbytes)


def _read_directory(file: BinaryIO) -> tuple[list[zipfile.ZipInfo], int]:
    """Return the entries of an archive's directory, and where it starts."""
    try:
        archive = zipfile.ZipFile(_DirectoryFile(file))
    except (zipfile.BadZipFile, NotImplementedError, struct.error) as error:
        raise ValueError(f"it is no zip archive, or cut short: {error}") from None
    return archive.infolist(), archive.start_dir


def _member(file: BinaryIO, entry: zipfile.ZipInfo) -> StoredMember:
    header = read_exactly(file, entry.header_offset, LOCAL_HEADER.size)
    signature, *_, name_nbytes, extra_nbytes = LOCAL_HEADER.unpack(header)
    if signature != b"PK\x03\x04":
        raise ValueError(f"the header of its member {entry.filename} is damaged")
    is_packed = entry.compress_type == zipfile.ZIP_DEFLATED
    if entry.flag_bits & ENCRYPTED or not (is_packed or entry.compress_type == zipfile.ZIP_STORED):
        raise ValueError(f"its member {entry.filename} is encrypted, or compressed in a rare way")
    if not is_packed and entry.file_size != entry.compress_size:
        raise ValueError(f"its member {entry.filename} has two sizes")
    start = entry.header_offset + LOCAL_HEADER.size + int(name_nbytes) + int(extra_nbytes)
    return StoredMember(entry.filename, entry.file_size, start, entry.compress_size, is_packed)
