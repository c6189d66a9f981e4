"""The lines of a journal: which batches of a file are on disk, and their digests.

Text, one record a line: JSON, a space, the CRC-32 of the JSON as 8 hex digits. The first record is
the header. Each other one is a batch: [batch, [bytes, crc32, nan, inf, [start, base64], ...], ...]
with one entry a tensor, in the order of the header's `tensors`. What follows a digest are edges:
bytes of the tensor that are not in the file yet, `start` bytes into the batch. Where several
processes share a file, {"token": number} stands behind the batches that a journal begins with. A
line that is cut short, or is none of these, ends the journal.
"""

import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

from dump_activations.storage.digests import Digest

# In a batch's record: its number and the CRC; and for a tensor four numbers of up to 20 digits, and
# less than a page at each end.
_MAX_NBYTES_OF_BATCH = 64
_MAX_NBYTES_OF_TENSOR = 96 + 2 * 5500


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

    @property
    def max_record_nbytes(self) -> int:
        """Bytes of a batch's longest record."""
        return _MAX_NBYTES_OF_BATCH + len(self.tensors) * _MAX_NBYTES_OF_TENSOR

    def rows_of(self, batches: range) -> range:
        """Return the rows of consecutive batches."""
        stop = min(batches.stop * self.batch_rows, self.rows)
        return range(batches.start * self.batch_rows, stop)

    def count_rows(self, batches: Collection[int]) -> int:
        """Count the rows of a set of batches."""
        short_by = self.batches * self.batch_rows - self.rows
        return len(batches) * self.batch_rows - (short_by if self.batches - 1 in batches else 0)


BatchDigests = Mapping[str, Digest]

Edges = Mapping[str, Sequence[tuple[int, bytes]]]
"""By tensor, where in the batch some bytes start, and the bytes."""


@dataclass(frozen=True)
class BatchRecord:
    """What is known of a batch: the digest of each tensor, and what is not in the file yet."""

    digests: BatchDigests
    edges: Edges = field(default_factory=dict)


def header_line(header: Header) -> bytes:
    """Return the record of a header."""
    return _line(asdict(header))


def token_line(token: int) -> bytes:
    """Return the record of a token."""
    return _line({"token": token})


def batch_line(header: Header, batch: int, record: BatchRecord) -> bytes:
    """Return the record of a batch."""
    entries = (
        [
            *astuple(record.digests[name]),
            *((start, b64encode(data).decode()) for start, data in record.edges.get(name, ())),
        ]
        for name in header.tensors
    )
    return _line([batch, *entries])


def parse_header(line: bytes) -> Header:
    """Return the header that a line holds; ValueError for anything else."""
    try:
        fields = json.loads(_text(line))
        header = Header(**{**fields, "tensors": tuple(fields["tensors"])})
        texts = [*header.work, *header.work.values(), *header.tensors]
    except (TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError("no header") from None
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("no header")
    return header


def parse_record(header: Header, line: bytes) -> int | tuple[int, BatchRecord]:
    """Return the token, or the batch and its record, that a line holds; ValueError if neither."""
    try:
        match json.loads(_text(line)):
            case {"token": int(token)}:
                return token
            case [int(batch), *entries] if 0 <= batch < header.batches:
                named = dict(zip(header.tensors, map(_parse_entry, entries), strict=True))
                digests = {name: digest for name, (digest, _) in named.items()}
                edges = {name: edges for name, (_, edges) in named.items() if edges}
                return batch, BatchRecord(digests, edges)
    except (TypeError, RecursionError):
        pass
    raise ValueError("no record")


def _parse_entry(entry: Sequence[Any]) -> tuple[Digest, list[tuple[int, bytes]]]:
    nbytes, crc32, nan, inf, *encoded = entry
    numbers = (nbytes, crc32, nan, inf)
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers) or crc32 >= 1 << 32:
        raise ValueError("no digest")
    edges = [(start, b64decode(text, validate=True)) for start, text in encoded]
    if not all(type(at) is int and 0 <= at <= nbytes - len(data) for at, data in edges):
        raise ValueError("an edge outside of its batch")
    return Digest(nbytes, crc32, nan, inf), edges


def _line(record: Any) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return text + b" " + _crc32(text) + b"\n"


def _text(line: bytes) -> bytes:
    """Return the JSON of a line; ValueError if it is cut short or damaged."""
    text, _, crc32 = line.removesuffix(b"\n").rpartition(b" ")
    if crc32 != _crc32(text):
        raise ValueError("damaged")
    return text


def _crc32(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)
