"""Digests of tensors, and the metadata text that holds them in a finished file."""

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dump_activations import _rust
from dump_activations.dtypes import TensorSpec
from dump_activations.storage.formats.layout import storage_order

INTEGRITY_KEY = "integrity"
"""Metadata key: JSON {tensor name: {"crc32": 8 hex digits, "nan": count, "inf": count}, ...}."""

METADATA_NAME = "metadata"
"""Entry of that table for the CRC-32 of all other metadata, as JSON. No tensor has the name."""

_CRC32 = re.compile("[0-9a-f]{8}")


@dataclass(frozen=True)
class Digest:
    """CRC-32 (IEEE) of a span of `nbytes` bytes, and its NaN and infinite elements."""

    nbytes: int = 0
    crc32: int = 0
    nan: int = 0
    inf: int = 0

    def __add__(self, following: "Digest") -> "Digest":
        """Return the digest of this span and the span right after it."""
        return Digest(
            self.nbytes + following.nbytes,
            _rust.combine_crc32(self.crc32, following.crc32, following.nbytes),
            self.nan + following.nan,
            self.inf + following.inf,
        )


class RunningDigest:
    """The digest of one tensor, from spans in any order. Spans out of order are kept."""

    def __init__(self) -> None:
        self.whole = Digest()
        self._waiting: dict[int, Digest] = {}

    def add(self, start: int, span: Digest) -> None:
        """Add the span that begins `start` bytes into the tensor. Each byte comes once."""
        assert start >= self.whole.nbytes, "written twice"
        assert start not in self._waiting, "written twice"
        self._waiting[start] = span
        while (following := self._waiting.pop(self.whole.nbytes, None)) is not None:
            self.whole += following


def integrity_text(
    specs: Sequence[TensorSpec], metadata: Mapping[str, str], digests: Mapping[str, Digest] | None
) -> str:
    """Return the metadata value under `INTEGRITY_KEY`, whose length does not depend on the digests.

    `metadata` is all other metadata, which is digested too. No digests give a text that reserves
    the place.
    """
    crc32 = zlib.crc32(json.dumps(dict(metadata)).encode())

    def table(digest_of: Callable[[TensorSpec], Digest]) -> str:
        rows: dict[str, dict[str, object]] = {METADATA_NAME: {"crc32": f"{crc32:08x}"}}
        for spec in storage_order(specs):
            digest = digest_of(spec)
            rows[spec.name] = {"crc32": f"{digest.crc32:08x}", "nan": digest.nan, "inf": digest.inf}
        return json.dumps(rows)

    longest = table(lambda spec: Digest(nan=spec.numel, inf=spec.numel))
    return table(lambda spec: digests[spec.name] if digests else Digest()).ljust(len(longest))


def parse_integrity(text: str) -> dict[str, Digest]:
    """Return digests by tensor name, with `nbytes` 0; ValueError for a text of another kind."""
    try:
        table = dict(json.loads(text))
    except (TypeError, RecursionError):
        raise ValueError("it is not a table of digests") from None
    table.pop(METADATA_NAME, None)
    digests = {}
    for name, fields in table.items():
        match fields:
            case {"crc32": str(crc32), "nan": int(nan), "inf": int(inf)} if _CRC32.fullmatch(crc32):
                digests[name] = Digest(0, int(crc32, 16), nan, inf)
            case _:
                raise ValueError("it holds more than digests")
    return digests
