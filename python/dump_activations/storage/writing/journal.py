"""The journal next to a partial file: its batches that are on disk, with their digests.

Text, one record per line: JSON, a space, the CRC-32 of the JSON as 8 hex digits. First comes the
header. Every other record is a batch: [batch, [bytes, crc32, nan, inf], ...], with one digest per
tensor in the order of the header's `tensors`. A damaged line ends the journal.
"""

import json
import os
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field
from itertools import chain, starmap
from pathlib import Path
from typing import Any, BinaryIO

from dump_activations.errors import OutputError
from dump_activations.storage.digests import Digest
from dump_activations.storage.writing.partial import Descriptor, Partial, is_at, open_own
from dump_activations.storage.writing.paths import create, journal_path, replacement_path

SYNC_INTERVAL = 0.5
"""Seconds between two flushes: the work that a crash may cost, against the cost of a flush."""

_MAX_HEADER_NBYTES = 1 << 20
# A batch's number and CRC; per tensor, four numbers of up to 20 digits.
_MAX_BATCH_NBYTES = 64
_MAX_DIGEST_NBYTES = 96

# A line that is not a record raises one of these while it is taken apart.
_DAMAGED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)

BatchDigests = Mapping[str, Digest]
"""Digest of each batched tensor, by name."""


@dataclass(frozen=True)
class Header:
    """The file that the batches of a journal belong to. Equal headers stand for equal files."""

    fingerprint: str  # SHA-256 of everything that determines the values of the dump
    work: Mapping[str, str] = field(compare=False)  # the same by name, for messages
    shard: str  # `3/40`; empty for a dump in one file
    rows: int  # boards of the file
    batch_rows: int  # the last batch may be shorter
    tensors: tuple[str, ...]  # names of those that come in batches
    # Devices and threads of all runs that wrote batches, and the process that writes the file.
    computed_by: tuple[Mapping[str, str], ...] = field(default=(), compare=False)
    host: str = field(default="", compare=False)
    pid: int = field(default=0, compare=False)

    @property
    def batches(self) -> int:
        """Number of batches."""
        return -(-self.rows // self.batch_rows)

    def rows_of(self, batch: int) -> range:
        """Return the boards of a batch, as the file numbers them."""
        start = batch * self.batch_rows
        return range(start, min(start + self.batch_rows, self.rows))

    def count_rows(self, batches: Iterable[int]) -> int:
        """Count the boards of some batches."""
        return sum(len(self.rows_of(batch)) for batch in batches)


@dataclass(frozen=True)
class Recorded:
    """The content of a journal."""

    header: Header
    batches: Mapping[int, BatchDigests]
    modified: float  # time of the last record, in seconds since the epoch

    @property
    def rows(self) -> int:
        """Boards that are on disk."""
        return self.header.count_rows(self.batches)


class JournalError(Exception):
    """A journal from which nothing can be resumed. Its text is the reason."""


class Journal:
    """Flushes a partial file while it is being written, and records the batches that are on disk.

    Without the flushes on its thread, all of the data would be flushed at the end. A failure on the
    thread is raised by the next call.
    """

    def __init__(
        self, partial: Partial, header: Header, batches: Mapping[int, BatchDigests]
    ) -> None:
        """Replace the journal of a partial file, in one step, by one with these batches.

        Raises:
            OutputError: the system refused.
        """
        self.batches: set[int] = set()  # those that are recorded
        self._partial = partial
        self._header = header
        self._path, self._new_path = journal_path(partial.target), replacement_path(partial.target)
        self._written: dict[int, BatchDigests] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._error: Exception | None = None
        with OutputError.when(f"cannot write {self._new_path}"):
            self._new_path.unlink(missing_ok=True)
            self._file = Descriptor(create(self._new_path, os.O_WRONLY | os.O_APPEND))
        try:
            with OutputError.when(f"cannot write {self._path}"):
                self._append(batches, _line(asdict(header)))
                self._new_path.replace(self._path)
                partial.mount.sync_directory(self._path.parent)
            self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
            self._thread.start()
        except BaseException:
            self.remove()
            raise

    def add(self, batch: int, digests: BatchDigests, *, is_last: bool = False) -> None:
        """Note that all data of a batch has been written; the thread flushes and records it.

        The last batch waits for `stop`: completing the file flushes its data anyway.
        """
        with self._changed:
            if self._error is not None:
                raise self._error
            self._written[batch] = digests
            if not is_last:
                self._changed.notify()

    def stop(self, *, keep: bool) -> None:
        """End the thread; `keep` records all that was written before."""
        with self._changed:
            self._closing = True
            if not keep:
                self._written.clear()
            self._changed.notify()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Close the journal and leave it where it is."""
        self._file.close()

    def remove(self) -> None:
        """Remove the journal where its name leads to it, and close it."""
        for path in (self._new_path, self._path):
            if is_at(self._file.number, path):
                path.unlink()
        self.close()

    def _run(self) -> None:
        try:
            while batches := self._next_batches():
                self._partial.sync()
                self._append(batches)
        except Exception as error:
            with self._changed:
                self._error = error

    def _next_batches(self) -> dict[int, BatchDigests]:
        """Wait for batches to record. None are left only when the journal is being stopped."""
        with self._changed:
            deadline = time.monotonic() + SYNC_INTERVAL
            while not self._closing and (
                not self._written or (remaining := deadline - time.monotonic()) > 0
            ):
                self._changed.wait(remaining if self._written else None)
            batches, self._written = self._written, {}
            return batches

    def _append(self, batches: Mapping[int, BatchDigests], header: bytes = b"") -> None:
        """Return once records of batches, whose data is on disk, are on disk too."""
        tensors = self._header.tensors
        records = [
            _line([batch, *(astuple(digests[name]) for name in tensors)])
            for batch, digests in batches.items()
        ]
        data = header + b"".join(records)
        while data:
            data = data[os.write(self._file.number, data) :]
        os.fsync(self._file.number)
        self.batches |= batches.keys()


def read_journal(target: Path, *, header_only: bool = False) -> Recorded:
    """Read the journal of an unfinished target.

    Raises:
        JournalError: there is none, or it is damaged.
        OutputError: it is not this user's own file.
    """
    try:
        with os.fdopen(open_own(journal_path(target), os.O_RDONLY), "rb") as file:
            header = _parse_header(file.readline(_MAX_HEADER_NBYTES))
            batches = {} if header_only else dict(_records(file, header))
            return Recorded(header, batches, os.fstat(file.fileno()).st_mtime)
    except OutputError:
        raise
    except FileNotFoundError:
        raise JournalError("it has no journal") from None
    except OSError as error:
        raise JournalError(f"its journal cannot be read: {error.strerror}") from None
    except _DAMAGED:
        raise JournalError("its journal is damaged") from None


def remove_journal(target: Path) -> None:
    """Remove what is left of a target's journal.

    Raises:
        OSError: the system refused.
    """
    for path in (journal_path(target), replacement_path(target)):
        path.unlink(missing_ok=True)


def _records(file: BinaryIO, header: Header) -> Iterator[tuple[int, BatchDigests]]:
    longest = _MAX_BATCH_NBYTES + len(header.tensors) * _MAX_DIGEST_NBYTES
    if os.fstat(file.fileno()).st_size - file.tell() > (header.batches + 1) * longest:
        raise ValueError("more records than batches")
    with suppress(*_DAMAGED):  # The rest of the journal is not whole.
        while line := file.readline(longest):
            batch, *digests = _parse(line)
            if not _are_numbers([batch, *chain(*digests)]) or batch >= header.batches:
                raise ValueError("no such batch")
            yield batch, dict(zip(header.tensors, starmap(Digest, digests), strict=True))


def _parse_header(line: bytes) -> Header:
    fields = _parse(line)
    header = Header(**fields | {name: tuple(fields[name]) for name in ("tensors", "computed_by")})
    texts = [header.fingerprint, header.shard, header.host, *header.tensors]
    texts += [
        text for each in (header.work, *header.computed_by) for text in (*each, *each.values())
    ]
    numbers = [header.rows, header.batch_rows - 1, header.pid]
    if not all(isinstance(text, str) for text in texts) or not _are_numbers(numbers):
        raise ValueError("not a header")
    return header


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _line(record: Any) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%s %08x\n" % (text, zlib.crc32(text))


def _parse(line: bytes) -> Any:
    """Return the record of a line; ValueError where it is cut short or damaged."""
    text, _, crc32 = line.removesuffix(b"\n").rpartition(b" ")
    if crc32 != b"%08x" % zlib.crc32(text):
        raise ValueError("damaged")
    return json.loads(text)
