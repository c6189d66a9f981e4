"""The journal next to a partial file: its batches that are on disk, with their digests.

Text, one record per line: JSON, a space, the CRC-32 of the JSON as 8 hex digits. First comes the
header. Every other record is a batch: [batch, [bytes, crc32, nan, inf], ...], with one digest per
tensor in the order of the header's `tensors`. A damaged line ends the journal.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from dump_activations.errors import OutputError
from dump_activations.storage.digests import Digest
from dump_activations.storage.writing.partial import create, is_at, open_own
from dump_activations.storage.writing.paths import (
    journal_path,
    replacement_path,
    sync_directory,
)

_MAX_HEADER_NBYTES = 1 << 20
# A batch's number and CRC; per tensor, four numbers of up to 20 digits.
_MAX_BATCH_NBYTES = 64
_MAX_DIGEST_NBYTES = 96

BatchDigests = Mapping[str, Digest]
"""Digest of each batched tensor, by name."""


@dataclass(frozen=True)
class Header:
    """The file that the batches of a journal belong to. Equal headers stand for equal files.

    Attributes:
        fingerprint: SHA-256 of everything that determines the values of the dump.
        work: the same by name, for messages.
        shard: `3/40`; empty for a dump in one file.
        rows: boards of the file.
        batch_rows: boards per batch; the last batch may be shorter.
        tensors: names of the tensors that come in batches.
        computed_by: devices and threads of all runs that wrote batches.
        host, pid: the process that writes the file.
    """

    fingerprint: str
    work: Mapping[str, str] = field(compare=False)
    shard: str
    rows: int
    batch_rows: int
    tensors: tuple[str, ...]
    computed_by: tuple[Mapping[str, str], ...] = field(default=(), compare=False)
    host: str = field(default="", compare=False)
    pid: int = field(default=0, compare=False)

    @property
    def batches(self) -> int:
        """Number of batches."""
        return -(-self.rows // self.batch_rows)

    def count_rows(self, batches: Iterable[int]) -> int:
        """Count the boards of some batches."""
        starts = [batch * self.batch_rows for batch in batches]
        return sum(min(self.batch_rows, self.rows - start) for start in starts)

    @property
    def max_record_nbytes(self) -> int:
        """Bytes of a batch's longest record."""
        return _MAX_BATCH_NBYTES + len(self.tensors) * _MAX_DIGEST_NBYTES


@dataclass(frozen=True)
class Recorded:
    """The content of a journal.

    Attributes:
        header: the file that it belongs to.
        batches: digests of each recorded batch.
        modified: time of the last record, in seconds since the epoch.
    """

    header: Header
    batches: Mapping[int, BatchDigests]
    modified: float


class JournalError(ValueError):
    """A journal from which nothing can be resumed. Its text is the reason."""


class Journal:
    """Records batches. `append` returns once the records are on disk.

    Attributes:
        batches: numbers of the recorded batches.
    """

    def __init__(self, target: Path, header: Header, batches: Mapping[int, BatchDigests]) -> None:
        """Replace the journal of a target, in one step, by one with these batches.

        Raises:
            OutputError: the system refused.
        """
        self.path = journal_path(target)
        self.batches = set(batches)
        self._header = header
        self._new_path = replacement_path(target)
        self._has_durable_name = False
        with OutputError.when(f"cannot write {self._new_path}"):
            self._new_path.unlink(missing_ok=True)
            self._fd = create(self._new_path, os.O_WRONLY | os.O_APPEND)
        try:
            with OutputError.when(f"cannot write {self.path}"):
                lines = [_line(asdict(header))]
                self._write([*lines, *(_batch_line(header, *each) for each in batches.items())])
                if batches:
                    os.fsync(self._fd)
                self._new_path.replace(self.path)
                if batches:
                    self._sync_name()
        except BaseException:
            self.remove()
            raise

    def append(self, batches: Mapping[int, BatchDigests]) -> None:
        """Record batches whose data is on disk already."""
        self._write(_batch_line(self._header, *each) for each in batches.items())
        os.fsync(self._fd)
        self._sync_name()
        self.batches |= batches.keys()

    def close(self) -> None:
        """Close the journal and leave it where it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Remove the journal where its name leads to it, and close it."""
        for path in (self._new_path, self.path):
            if self._fd >= 0 and is_at(self._fd, path):
                path.unlink()
        self.close()

    def _write(self, lines: Iterable[bytes]) -> None:
        data = b"".join(lines)
        while data:
            data = data[os.write(self._fd, data) :]

    def _sync_name(self) -> None:
        """Bring the journal's name to disk, once: before the first batch, nothing can be lost."""
        if not self._has_durable_name:
            sync_directory(self.path.parent)
            self._has_durable_name = True


def read_journal(target: Path) -> Recorded:
    """Read the journal of an unfinished target.

    Raises:
        JournalError: there is none, or it is damaged.
        OutputError: it is not this user's own file.
    """
    with _opened(target) as file:
        header = _read_header(file)
        batches = dict(_records(file, header))
        return Recorded(header, batches, os.fstat(file.fileno()).st_mtime)


def read_header(target: Path) -> Header:
    """Read the header of a target's journal; raises as `read_journal` does."""
    with _opened(target) as file:
        return _read_header(file)


def remove_journal(target: Path) -> None:
    """Remove what is left of a target's journal.

    Raises:
        OutputError: the system refused.
    """
    for path in (journal_path(target), replacement_path(target)):
        with OutputError.when(f"cannot remove {path}"):
            path.unlink(missing_ok=True)


def _opened(target: Path) -> BinaryIO:
    try:
        return os.fdopen(open_own(journal_path(target), os.O_RDONLY), "rb")
    except OutputError:
        raise
    except FileNotFoundError:
        raise JournalError("it has no journal") from None
    except OSError as error:
        raise JournalError(f"its journal cannot be read: {error.strerror}") from None


def _read_header(file: BinaryIO) -> Header:
    try:
        return _parse_header(_read_line(file, _MAX_HEADER_NBYTES))
    except ValueError:
        raise JournalError("its journal is damaged") from None


def _records(file: BinaryIO, header: Header) -> Iterator[tuple[int, BatchDigests]]:
    longest = header.max_record_nbytes
    nbytes = os.fstat(file.fileno()).st_size - file.tell()
    if nbytes > (header.batches + 1) * longest:
        raise JournalError("its journal is damaged")
    with suppress(ValueError):  # The rest of the journal is not whole.
        while line := _read_line(file, longest):
            yield _parse_batch(header, line)


def _read_line(file: BinaryIO, longest: int) -> bytes:
    try:
        return file.readline(longest)
    except OSError as error:
        raise JournalError(f"its journal cannot be read: {error.strerror}") from None


def _batch_line(header: Header, batch: int, digests: BatchDigests) -> bytes:
    return _line([batch, *(astuple(digests[name]) for name in header.tensors)])


def _parse_header(line: bytes) -> Header:
    try:
        fields = json.loads(_text(line))
        fields |= {name: tuple(fields[name]) for name in ("tensors", "computed_by")}
        header = Header(**fields)
        texts = [*header.work, *header.work.values(), *header.tensors]
        texts += [header.fingerprint, header.shard, header.host]
        texts += [text for each in header.computed_by for text in (*each, *each.values())]
        numbers = (header.rows, header.batch_rows, header.pid)
    except (TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError("not a header") from None
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("not a header")
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise ValueError("not a header")
    if header.batch_rows == 0:
        raise ValueError("not a header")
    return header


def _parse_batch(header: Header, line: bytes) -> tuple[int, BatchDigests]:
    try:
        match json.loads(_text(line)):
            case [int(batch), *digests] if 0 <= batch < header.batches:
                named = zip(header.tensors, map(_parse_digest, digests), strict=True)
                return batch, dict(named)
    except (TypeError, RecursionError):
        pass
    raise ValueError("not a batch")


def _parse_digest(fields: Sequence[Any]) -> Digest:
    nbytes, crc32, nan, inf = fields
    numbers = (nbytes, crc32, nan, inf)
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers) or crc32 >= 1 << 32:
        raise ValueError("not a digest")
    return Digest(nbytes, crc32, nan, inf)


def _line(record: Any) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return text + b" " + _crc32(text) + b"\n"


def _text(line: bytes) -> bytes:
    """Return the JSON of a line; ValueError where it is cut short or damaged."""
    text, _, crc32 = line.removesuffix(b"\n").rpartition(b" ")
    if crc32 != _crc32(text):
        raise ValueError("damaged")
    return text


def _crc32(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)
