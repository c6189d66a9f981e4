"""The journal beside an unfinished file: which batches of it are on disk, and their digests.

Text, one record a line: JSON, a space, the CRC-32 of the JSON as 8 hex digits. The first record is
the header; each other one is [batch, [bytes, crc32, nan, inf], ...] with one digest a tensor, in
the order of the header's `tensors`. A line that is cut short or does not match its CRC ends the
journal.
"""

import errno
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dump_activations.errors import OutputError
from dump_activations.storage.digests import Digest
from dump_activations.storage.writing.private_files import create, is_at, open_ours
from dump_activations.storage.writing.targets import replacement_path

_MAX_HEADER_NBYTES = 1 << 20
# In a batch's record: its number and the CRC; and four numbers a tensor, of up to 20 digits.
_MAX_NBYTES_OF_BATCH = 64
_MAX_NBYTES_OF_TENSOR = 96


@dataclass(frozen=True)
class Header:
    """What the batches of a journal belong to.

    Attributes:
        work: by name, everything that determines the file's bytes.
        rows: boards in all.
        batch_rows: boards of a batch; the last may be short.
        tensors: names of the tensors that come in batches.
    """

    work: Mapping[str, str]
    rows: int
    batch_rows: int
    tensors: tuple[str, ...]

    @property
    def batches(self) -> int:
        """Batches in all."""
        return -(-self.rows // self.batch_rows)

    def rows_in(self, batches: int) -> int:
        """Count the boards in so many batches, counted from the first."""
        return min(batches * self.batch_rows, self.rows)


BatchDigests = Mapping[str, Digest]


class JournalError(ValueError):
    """There is nothing in a journal to go on from; the text says why."""


class Journal:
    """Records batches; each call returns once the records are on disk.

    Attributes:
        batches: numbers of those that are recorded.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.batches: set[int] = set()
        self._path = path
        self._new_path = replacement_path(path)
        self._header = header
        self._fd: int | None = None

    def start(self, batches: Mapping[int, BatchDigests]) -> None:
        """Put a journal of these batches alone in the place of what is there, in one step.

        Raises:
            OutputError: the system refused; it names the file.
        """
        with OutputError.when(f"cannot write {self._new_path}"):
            self._new_path.unlink(missing_ok=True)
            self._fd = create(self._new_path, os.O_WRONLY | os.O_APPEND)
            self._write([asdict(self._header)])
            self.append(batches)
        with OutputError.when(f"cannot write {self._path}"):
            self._new_path.replace(self._path)
            sync_directory(self._path.parent)

    def append(self, batches: Mapping[int, BatchDigests]) -> None:
        """Record batches, whose data is on disk already."""
        self._write(
            [batch, *(astuple(digests[name]) for name in self._header.tensors)]
            for batch, digests in batches.items()
        )
        assert self._fd is not None
        os.fsync(self._fd)
        self.batches |= batches.keys()

    def close(self) -> None:
        """Leave the journal where it is."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def remove(self) -> None:
        """Close the journal, and remove it if its name still leads to it."""
        if self._fd is not None:
            for path in (self._new_path, self._path):
                if is_at(self._fd, path):
                    path.unlink()
        self.close()

    def _write(self, records: Iterable[Any]) -> None:
        assert self._fd is not None
        data = b"".join(map(_line, records))
        while data:
            data = data[os.write(self._fd, data) :]


def read_journal(path: Path, header: Header) -> tuple[Header, dict[int, BatchDigests]]:
    """Read the header of a journal and, if it is `header`, the batches that are recorded.

    Raises:
        JournalError: there is no journal, or none that can be read.
        OutputError: there is one that is not this user's alone.
    """
    try:
        with os.fdopen(open_ours(path, os.O_RDONLY), "rb") as file:
            found = _read_header(file)
            batches = _read_batches(file, header) if found == header else {}
    except OutputError:
        raise
    except FileNotFoundError:
        raise JournalError("it has no journal") from None
    except OSError as error:
        raise JournalError(f"its journal cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise JournalError("its journal is damaged") from None
    return found, batches


def _read_header(file: BinaryIO) -> Header:
    fields = _record(file.readline(_MAX_HEADER_NBYTES))
    header = Header(**{**fields, "tensors": tuple(fields["tensors"])})
    texts = [*header.work, *header.work.values(), *header.tensors]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("no header")
    return header


def _read_batches(file: BinaryIO, header: Header) -> dict[int, BatchDigests]:
    nbytes = os.fstat(file.fileno()).st_size - file.tell()
    of_record = _MAX_NBYTES_OF_BATCH + len(header.tensors) * _MAX_NBYTES_OF_TENSOR
    if nbytes > header.batches * of_record:
        raise ValueError("longer than its batches can be")
    batches: dict[int, BatchDigests] = {}
    for line in file.read(nbytes).split(b"\n"):
        if (record := _record(line)) is None:
            break
        batch, *digests = record
        named = zip(header.tensors, digests, strict=True)
        batches[batch] = {name: Digest(*digest) for name, digest in named}
    return batches


def _record(line: bytes) -> Any:
    """Return what a line holds; None if it is cut short or damaged."""
    text, _, crc32 = line.removesuffix(b"\n").rpartition(b" ")
    return json.loads(text) if crc32 == _crc32(text) else None


def sync_directory(path: Path) -> None:
    """Return once the names in a directory are on disk, where the file system can say."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(fd)


def _line(record: Any) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return text + b" " + _crc32(text) + b"\n"


def _crc32(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)
