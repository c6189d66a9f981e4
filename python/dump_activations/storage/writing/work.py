"""The output of a run: its files, their batches, and everything that determines their values.

Row arithmetic lives here: the cut of a run into shards, and the place of each batch in its file.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dump_activations.dtypes import TensorSpec
from dump_activations.errors import InvalidArgumentError, option
from dump_activations.storage.digests import INTEGRITY_KEY, Digest, integrity_text
from dump_activations.storage.formats.layout import RESERVED_NAMES, Layout
from dump_activations.storage.formats.registry import format_of
from dump_activations.storage.shards import MAX_SHARDS, Shard
from dump_activations.storage.writing.journal import Header

FINGERPRINT_KEY = "fingerprint"
"""Metadata key: SHA-256 of everything that determines the dump's values, as 64 hex digits."""

COMPUTED_BY_KEY = "computed_by"
"""Metadata key: JSON list of the distinct devices and threads that computed batches."""

DEFAULT_SHARD_NBYTES = 4_000_000_000
DEFAULT_SHARDS = 128

# The text has as many entries as fit, and is padded to this length, because offsets are fixed
# before the last batch is computed.
_COMPUTED_BY_NBYTES = 1024

# Entries of the fingerprint that an option sets. Messages name the option.
_OPTIONS = (
    *("batch_size", "compile", "dtype", "labels", "layers", "n_samples", "outputs"),
    *("precision", "random_init", "seed", "stats", "steps", "where"),
)
# Entries whose values are digests: messages name what was digested.
_DIGESTED = {
    "config": "the model's config",
    "dataset_layout_sha256": "the dataset's shards or the layout of their rows",
    "indices": "the step indices",
    "tensors": f"the tensors ({option('split_layers')})",
    "weights_sha256": "the weights",
}
# Entries that differ because another one does. Messages name them only where no other differs.
_DERIVED = ("indices", "tensors")
# Metadata that explains why the indices differ.
_SAMPLING = ("seed", "sampling", "where", "steps")
_MAX_SHOWN = 200


@dataclass(frozen=True, eq=False)
class Work:
    """The output of a run, in one file or in shards."""

    whole: Path  # past all links; its suffix selects the format
    specs: Sequence[TensorSpec]  # all tensors of the run
    batched: Sequence[str]  # names of those that come in batches, with one row per board
    batch_rows: int  # the last batch may be shorter
    metadata: Mapping[str, str]  # stored in each file
    computed_by: Mapping[str, str]  # device and threads of this process, recorded in each file
    identity: Mapping[str, str]  # by name, everything that determines the tensors' values

    def __post_init__(self) -> None:
        names = {spec.name for spec in self.specs}
        assert len(names) == len(self.specs), "two tensors of one name"
        assert not RESERVED_NAMES & names, "a tensor with the name of the metadata"
        format_of(self.whole, [spec.dtype for spec in self.specs])
        # No format can hold bytes of a file name that are not text.
        metadata = {
            key: value.encode("utf-8", "backslashreplace").decode()
            for key, value in self.metadata.items()
        }
        entries = {
            "batch_size": str(self.batch_rows),
            "format": format_of(self.whole).name,
            "tensors": json.dumps([(spec.name, spec.dtype, spec.shape) for spec in self.specs]),
        }
        object.__setattr__(self, "metadata", metadata)
        object.__setattr__(self, "identity", {**self.identity, **entries})

    @cached_property
    def rows(self) -> int:
        """Boards of the run."""
        (rows,) = {spec.shape[0] for spec in self.specs if spec.name in self.batched}
        return rows

    @property
    def batches(self) -> int:
        """Batches of the run."""
        return -(-self.rows // self.batch_rows)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the identity, equal in all shards whichever process wrote them."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @cached_property
    def nbytes_per_row(self) -> tuple[int, int]:
        """Bytes of a row of all batched tensors, and bytes of the other tensors."""
        batched = [spec for spec in self.specs if spec.name in self.batched]
        other_nbytes = sum(spec.nbytes for spec in self.specs) - sum(s.nbytes for s in batched)
        return sum(spec.row_nbytes for spec in batched), other_nbytes

    @property
    def described(self) -> dict[str, str]:
        """The identity, and the metadata that explains its indices."""
        sampling = {name: self.metadata[name] for name in _SAMPLING if name in self.metadata}
        return {**sampling, **self.identity}

    def count_shards(self, max_nbytes: int) -> int:
        """Return the smallest number of shards whose tensors take at most `max_nbytes` each.

        A shard has at least one batch, even where that takes more.

        Raises:
            InvalidArgumentError: there would be more than 99,999 shards.
        """
        row_nbytes, other_nbytes = self.nbytes_per_row
        batches = max((max_nbytes - other_nbytes) // (self.batch_rows * row_nbytes), 1)
        shards = -(-self.batches // batches)
        if shards > MAX_SHARDS:
            raise InvalidArgumentError(
                f"{option('shard_size')}: {max_nbytes:,} bytes make {shards:,} shards; "
                f"give a size that makes at most {MAX_SHARDS:,}"
            )
        return shards

    def default_shards(self) -> int:
        """Return the number of shards where several processes run and no size is given."""
        most_nbytes = self.count_shards(DEFAULT_SHARD_NBYTES)
        return min(max(DEFAULT_SHARDS, most_nbytes), self.batches)

    def files(self, shards: int | None) -> list["FileWork"]:
        """Cut the run into so many shards; None makes one file."""
        if shards is None:
            return [FileWork(self, None, range(self.batches))]
        return [self.shard(Shard(self.whole, number, shards)) for number in range(1, shards + 1)]

    def shard(self, shard: Shard) -> "FileWork":
        """Return one file of a cut."""
        start, stop = (n * self.batches // shard.count for n in (shard.number - 1, shard.number))
        return FileWork(self, shard, range(start, stop))

    def differences(self, theirs: Mapping[str, str]) -> str:
        """Name the entries in which other work differs, with both values where they are readable.

        Args:
            theirs: the identity of the other work, or the metadata of its file.
        """
        ours = self.described
        names = [name for name in ours if name in theirs and theirs[name] != ours[name]]
        if "indices" in theirs and "indices" not in names:
            names = [name for name in names if name not in _SAMPLING]
        named = [name for name in names if name not in _DERIVED] or names
        return ", ".join(_difference(name, theirs[name], ours[name]) for name in named)


@dataclass(frozen=True, eq=False)
class FileWork:
    """One file of a work: the whole, or a shard."""

    work: Work
    shard: Shard | None  # None for the whole
    run_batches: range  # as the run numbers them; the file numbers them from 0

    @property
    def target(self) -> Path:
        """Name of the finished file."""
        return self.work.whole if self.shard is None else self.shard.path

    @property
    def batches(self) -> int:
        """Number of batches."""
        return len(self.run_batches)

    @property
    def rows(self) -> int:
        """Boards of the file."""
        return len(self.run_rows)

    @cached_property
    def run_rows(self) -> range:
        """Boards of the file, as the run numbers them."""
        return self.run_rows_of(range(self.batches))

    def run_rows_of(self, batches: range) -> range:
        """Return the boards of consecutive batches of the file, as the run numbers boards."""
        first, size = self.run_batches.start, self.work.batch_rows
        stop = min((first + batches.stop) * size, self.work.rows)
        return range((first + batches.start) * size, stop)

    def batch_at(self, run_row: int) -> int:
        """Return the number of the batch that a board of the run is in."""
        return run_row // self.work.batch_rows - self.run_batches.start

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """The file's tensors by name, with the file's number of rows."""
        return {
            spec.name: replace(spec, shape=(self.rows, *spec.shape[1:]))
            if spec.name in self.work.batched
            else spec
            for spec in self.work.specs
        }

    @cached_property
    def header(self) -> Header:
        """The header of the file's journal."""
        return Header(
            self.work.fingerprint,
            self.work.described,
            "" if self.shard is None else self.shard.text,
            self.rows,
            self.work.batch_rows,
            tuple(self.work.batched),
        )

    def is_described_by(self, metadata: Mapping[str, str]) -> bool:
        """Return True for the metadata of this file of this work, and of no other."""
        theirs = metadata.get(FINGERPRINT_KEY), metadata.get("shard", "")
        return theirs == (self.work.fingerprint, self.header.shard)

    @cached_property
    def empty_layout(self) -> Layout:
        """The file's size and offsets, which do not depend on its values."""
        return self.layout([self.work.computed_by], None)

    def layout(
        self, computed_by: Sequence[Mapping[str, str]], digests: Mapping[str, Digest] | None
    ) -> Layout:
        """Lay the file out, with the digest of each tensor, or None while they are unknown."""
        specs, entries = list(self.specs.values()), list(computed_by)
        metadata = {**self.work.metadata, FINGERPRINT_KEY: self.work.fingerprint}
        if self.shard is not None:
            metadata |= {"shard": self.shard.text, "first_board": str(self.run_rows.start)}
        while len(text := json.dumps(entries)) > _COMPUTED_BY_NBYTES:
            entries.pop()
        metadata[COMPUTED_BY_KEY] = text.ljust(_COMPUTED_BY_NBYTES)
        crc32s = None if digests is None else {name: each.crc32 for name, each in digests.items()}
        integrity = integrity_text(specs, metadata, digests)
        file_format = format_of(self.work.whole)
        return file_format.layout(specs, {**metadata, INTEGRITY_KEY: integrity}, crc32s)

    @property
    def tensor_nbytes(self) -> int:
        """Bytes of the file's tensors; its header adds a few thousand."""
        row_nbytes, other_nbytes = self.work.nbytes_per_row
        return self.rows * row_nbytes + other_nbytes

    def span_of(self, batch: int, name: str) -> tuple[int, int]:
        """Return (start, stop) of the bytes of a batch of a tensor in the file."""
        rows, row_nbytes = self.header.rows_of(batch), self.specs[name].row_nbytes
        offset = self.empty_layout.offsets[name]
        return offset + rows.start * row_nbytes, offset + rows.stop * row_nbytes


def _difference(name: str, theirs: str, ours: str) -> str:
    if name in _DIGESTED:
        return _DIGESTED[name]
    label = option(name) if name in _OPTIONS else name.replace("_", " ")
    theirs, ours = (
        value if len(value) <= _MAX_SHOWN else value[:_MAX_SHOWN] + "..."
        for value in (theirs, ours)
    )
    return f"{label} ({theirs} there, {ours} here)"
