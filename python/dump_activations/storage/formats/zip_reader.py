"""Where the data of a zip archive's members lies."""

import zipfile
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from dump_activations.storage.formats.contents import read_exactly
from dump_activations.storage.formats.zip_layout import LOCAL_HEADER


@dataclass(frozen=True)
class StoredMember:
    """A member of an archive; `offset` is None if it is compressed."""

    name: str
    nbytes: int
    offset: int | None


def open_archive(file: BinaryIO) -> zipfile.ZipFile:
    """Open the archive in a file; ValueError if there is none."""
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, OverflowError) as error:
        raise ValueError(f"it is no zip archive, or cut short: {error}") from None


def read_members(archive: zipfile.ZipFile, file: BinaryIO, size: int) -> list[StoredMember]:
    """List all members, in the order of the archive's directory.

    Raises:
        ValueError: a member lies outside the file, or is encrypted.
    """
    members = []
    for entry in archive.infolist():
        offset = _data_offset(file, entry.header_offset)
        if entry.flag_bits & 1 or offset + entry.compress_size > size:
            raise ValueError(f"its member {entry.filename} cannot be read")
        is_stored = entry.compress_type == zipfile.ZIP_STORED
        if is_stored and entry.file_size != entry.compress_size:
            raise ValueError(f"its member {entry.filename} has two sizes")
        members.append(StoredMember(entry.filename, entry.file_size, offset if is_stored else None))
    return members


def read_head(archive: zipfile.ZipFile, file: BinaryIO, member: StoredMember, nbytes: int) -> bytes:
    """Read the first bytes of a member's content, or all of it if there are fewer; unchecked.

    Raises:
        ValueError: the member is compressed, and cannot be read.
    """
    if member.offset is not None:
        return read_exactly(file, member.offset, min(nbytes, member.nbytes))
    try:
        with archive.open(member.name) as stream:
            return stream.read(nbytes)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"its member {member.name} cannot be read: {error}") from None


def _data_offset(file: BinaryIO, header_offset: int) -> int:
    if header_offset < 0:
        raise ValueError("a member lies outside the file")
    fields = LOCAL_HEADER.unpack(read_exactly(file, header_offset, LOCAL_HEADER.size))
    signature, name_nbytes, extra_nbytes = fields[0], fields[-2], fields[-1]
    if signature != b"PK\x03\x04":
        raise ValueError("a member's header is damaged")
    return header_offset + LOCAL_HEADER.size + int(name_nbytes) + int(extra_nbytes)
