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
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from dump_activations.storage.digests import Digest


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

    def rows_in(self, batches: int) -> int:
        """Count the boards in so many batches, counted from the first."""
        return min(batches * self.batch_rows, self.rows)


BatchDigests = Mapping[str, Digest]


class Journal:
    """Records batches; each call returns once the records are on disk."""

    def __init__(self, path: Path, header: Header) -> None:
        self._path = path
        self._new_path = replacement_path(path)
        self._header = header
        self._fd: int | None = None

    def append(self, batches: Mapping[int, BatchDigests]) -> None:
        """Record batches, whose data is on disk already."""
        if self._fd is None:
            self.restart(batches)
        else:
            self._write(self._fd, self._entries(batches))

    def restart(self, batches: Mapping[int, BatchDigests]) -> None:
        """Put a journal of these batches alone in the place of what is there, in one step."""
        self.close()
        self._fd = os.open(
            self._new_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666
        )
        self._write(self._fd, [asdict(self._header), *self._entries(batches)])
        self._new_path.replace(self._path)
        sync_directory(self._path.parent)

    def close(self) -> None:
        """Leave the journal where it is."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def remove(self) -> None:
        """Remove the journal, if there is one."""
        self.close()
        self._new_path.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)

    def _entries(self, batches: Mapping[int, BatchDigests]) -> list[Any]:
        return [
            [batch, *(astuple(digests[name]) for name in self._header.tensors)]
            for batch, digests in batches.items()
        ]

    def _write(self, fd: int, records: Iterable[Any]) -> None:
        data = b"".join(map(_line, records))
        while data:
            data = data[os.write(fd, data) :]
        os.fsync(fd)


def replacement_path(path: Path) -> Path:
    """Say where a journal is written anew before it takes the place of the one at `path`."""
    return path.with_name(path.name + ".new")


def read_journal(path: Path) -> tuple[Header, dict[int, dict[str, Digest]]] | None:
    """Read the header of a journal and the batches that have no gap before them, in order.

    Several writers finish batches out of order; those past a gap are few, and are written again.
    None if there is no journal, or nothing in it that is one.
    """
    if not path.is_file():  # A named pipe would be waited for.
        return None
    try:
        return _parse(path.read_bytes())
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def _parse(data: bytes) -> tuple[Header, dict[int, dict[str, Digest]]]:
    records = []
    for line in data.split(b"\n"):
        text, _, crc32 = line.rpartition(b" ")
        if crc32 != _crc32(text):
            break
        records.append(json.loads(text))
    fields, *entries = records
    header = Header(**{**fields, "tensors": tuple(fields["tensors"])})
    batches = {
        batch: {name: Digest(*digest) for name, digest in zip(header.tensors, digests, strict=True)}
        for batch, *digests in entries
    }
    return header, {batch: batches[batch] for batch in takewhile(batches.__contains__, count())}


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
