"""Digests of tensors, and the text in which a finished file carries them."""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dump_activations import _rust
from dump_activations.dtypes import TensorSpec
from dump_activations.storage.formats.layout import storage_order

# Metadata key: JSON {tensor name: {"crc32": 8 hex digits, "nan": count, "inf": count}, ...}.
INTEGRITY_KEY = "integrity"

# The entry in that table for all other metadata: its CRC-32, as JSON. No tensor has the name.
METADATA_NAME = "metadata"


_CRC32 = re.compile("[0-9a-f]{8}")


@dataclass(frozen=True)
class Digest:
    """What was seen in a run of `nbytes` bytes: CRC-32 (IEEE), NaN and infinite elements."""

    nbytes: int = 0
    crc32: int = 0
    nan: int = 0
    inf: int = 0

    def __add__(self, following: "Digest") -> "Digest":
        """Return the digest of this run and the one right after it."""
        return Digest(
            self.nbytes + following.nbytes,
            _rust.combine_crc32(self.crc32, following.crc32, following.nbytes),
            self.nan + following.nan,
            self.inf + following.inf,
        )


class RunningDigest:
    """The digest of one tensor, from runs that come in any order; out of order ones are kept."""

    def __init__(self) -> None:
        self.whole = Digest()
        self._waiting: dict[int, Digest] = {}

    def add(self, start: int, run: Digest) -> None:
        """Add the run that begins `start` bytes into the tensor; each byte comes once."""
        assert start >= self.whole.nbytes, "written twice"
        assert start not in self._waiting, "written twice"
        self._waiting[start] = run
        while (following := self._waiting.pop(self.whole.nbytes, None)) is not None:
            self.whole += following


def integrity_text(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], digests: Mapping[str, Digest] | None
) -> str:
    """Return the metadata value under `INTEGRITY_KEY`, of the same length whatever the digests are.

    Args:
        specs: the file's tensors.
        metadata: all other metadata, which is digested too.
        digests: of each tensor; None for a text that holds the place until they are known.
    """
    known = digests or {spec.name: Digest() for spec in specs}
    longest = {spec.name: Digest(nan=spec.numel, inf=spec.numel) for spec in specs}
    width = len(_table(specs, metadata, longest))
    return _table(specs, metadata, known).ljust(width)


def parse_integrity(text: str) -> dict[str, Digest]:
    """Return digests by tensor name, with `nbytes` 0, from the text that `integrity_text` made.

    Raises:
        ValueError: any other text.
    """
    try:
        return {
            name: _parse_digest(fields)
            for name, fields in json.loads(text).items()
            if name != METADATA_NAME
        }
    except (AttributeError, RecursionError):
        raise ValueError("it is no table of digests") from None


def _parse_digest(fields: object) -> Digest:
    match fields:
        case {"crc32": str(crc32), "nan": int(nan), "inf": int(inf)} if _CRC32.fullmatch(crc32):
            return Digest(0, int(crc32, 16), nan, inf)
    raise ValueError("it has something else than a digest")


def _table(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], digests: Mapping[str, Digest]
) -> str:
    table: dict[str, dict[str, object]] = {
        METADATA_NAME: {"crc32": _hex(zlib.crc32(json.dumps(dict(metadata)).encode()))}
    }
    for spec in storage_order(specs):
        digest = digests[spec.name]
        table[spec.name] = {"crc32": _hex(digest.crc32), "nan": digest.nan, "inf": digest.inf}
    return json.dumps(table)


def _hex(crc32: int) -> str:
    return f"{crc32:08x}"
