"""What a file is to hold and what determines its bytes, by which two runs are told apart."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from dump_activations.dtypes import TensorSpec
from dump_activations.errors import OutputError, option
from dump_activations.storage.digests import INTEGRITY_KEY, Digest, integrity_text
from dump_activations.storage.formats.layout import RESERVED_NAMES, Layout
from dump_activations.storage.formats.registry import format_of
from dump_activations.storage.reading.inspection import inspect
from dump_activations.storage.writing.records import Header
from dump_activations.storage.writing.targets import target_of

FINGERPRINT_KEY = "fingerprint"
"""Metadata key: SHA-256 of everything that determines the file's bytes, as 64 hex digits."""

_OPTIONS = frozenset(
    {
        "batch_size",
        "compile",
        "device",
        "dtype",
        "labels",
        "layers",
        "n_samples",
        "outputs",
        "precision",
        "random_init",
        "seed",
        "stats",
        "steps",
        "where",
    }
)
# Names of entries whose values nobody can read.
_UNREADABLE = {
    "config": "the model's config",
    "dataset_layout_sha256": "the dataset's shards or their rows' layout",
    "indices": "the step indices",
    # All else that shapes the tensors has an entry of its own.
    "tensors": f"the tensors ({option('split_layers')})",
    "weights_sha256": "the weights",
}
# What differs only because something else does, unless it is alone.
_DERIVED = frozenset({"dataset_rows", "indices", "tensors"})
_LONGEST_VALUE = 200


@dataclass(frozen=True)
class Work:
    """A file that is to be made.

    Attributes:
        target: where, past all links.
        specs: all its tensors.
        metadata: stored beside them, the fingerprint included.
        header: what determines its bytes, and its batches.
    """

    target: Path
    specs: Sequence[TensorSpec]
    metadata: Mapping[str, str]
    header: Header

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str],
        specs: Sequence[TensorSpec],
        metadata: Mapping[str, str],
        *,
        batched: Sequence[str],
        batch_rows: int,
        fingerprint: Mapping[str, str],
    ) -> Self:
        """Describe a file.

        Args:
            path: the target; its suffix selects the format.
            specs: all tensors.
            metadata: stored beside them; the fingerprint and the digests are added.
            batched: tensors that come in batches of `batch_rows` rows, all of equal length.
            batch_rows: rows of a batch; the last may be short.
            fingerprint: by name, all that determines the data beside the metadata.
        """
        target = target_of(path)
        shapes = {spec.name: spec.shape for spec in specs}
        assert len(shapes) == len(specs), "two tensors of one name"
        assert not RESERVED_NAMES & shapes.keys(), "a tensor with the name of the metadata"
        (rows,) = {shapes[name][0] for name in batched}
        metadata = {key: _plain_text(value) for key, value in metadata.items()}
        work = {
            **metadata,
            **fingerprint,
            "batch_size": str(batch_rows),
            "format": format_of(target).name,
            "tensors": json.dumps([(spec.name, spec.dtype, spec.shape) for spec in specs]),
        }
        metadata[FINGERPRINT_KEY] = _sha256(work)
        return cls(target, specs, metadata, Header(work, rows, batch_rows, tuple(batched)))

    def layout(self, digests: Mapping[str, Digest] | None = None) -> Layout:
        """Lay the file out; without the digests of its tensors, all but some bytes of the skeleton.

        Raises:
            InvalidArgumentError: the format cannot hold a dtype.
        """
        file_format = format_of(self.target, [spec.dtype for spec in self.specs])
        crc32s = {name: digest.crc32 for name, digest in digests.items()} if digests else None
        integrity = integrity_text(self.specs, self.metadata, digests)
        return file_format.layout(self.specs, {**self.metadata, INTEGRITY_KEY: integrity}, crc32s)

    def differences(self, theirs: Mapping[str, str]) -> str:
        """Name what differs in other work, options as such."""
        ours = self.header.work
        differing = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
        return ", ".join(
            _UNREADABLE.get(name)
            or f"{_word(name)} ({_shown(theirs.get(name))} there, {_shown(ours.get(name))} here)"
            for name in _told(differing)
        )


@dataclass(frozen=True)
class Existing:
    """A file that is at a target before it is written.

    Attributes:
        size: its bytes.
        metadata: its own; none where it is no dump, or a damaged one.
        digests: its own, of each tensor.
    """

    size: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, Digest] = field(default_factory=dict)

    def is_of(self, work: Work) -> bool:
        """Whether it is complete and of this work."""
        return self.metadata.get(FINGERPRINT_KEY) == work.metadata[FINGERPRINT_KEY]


def find_existing(target: Path) -> Existing | None:
    """Look at the headers of what is at a target; None where nothing is."""
    try:
        found = inspect(target)
    except OutputError:
        return Existing(target.stat().st_size) if target.exists() else None
    return Existing(found.size, found.contents.metadata, found.digests)


def names_of(differing: Sequence[str]) -> str:
    """Name entries of two works that differ, options as such."""
    return ", ".join(_UNREADABLE.get(name) or _word(name) for name in _told(differing))


def _told(differing: Sequence[str]) -> Sequence[str]:
    return [name for name in differing if name not in _DERIVED] or differing


def _word(name: str) -> str:
    return option(name) if name in _OPTIONS else name.replace("_", " ")


def _shown(value: str | None) -> str:
    if value is None:
        return "none"
    return value if len(value) <= _LONGEST_VALUE else value[:_LONGEST_VALUE] + "..."


def _sha256(work: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()


def _plain_text(value: str) -> str:
    """Return text that every format can hold: bytes of a file name that are no text are escaped."""
    return value.encode("utf-8", "backslashreplace").decode()
