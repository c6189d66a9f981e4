"""What `inspect-activations` shows of one file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dump_activations.commands.tables import Table
from dump_activations.dtypes import STATISTICS_PREFIX
from dump_activations.model.activations import ACTIVATIONS, WeightActivation
from dump_activations.storage.digests import INTEGRITY_KEY
from dump_activations.text import shape_text, size_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from dump_activations.dtypes import TensorSpec
    from dump_activations.storage.digests import Digest
    from dump_activations.storage.formats.contents import StoredTensor
    from dump_activations.storage.reading.inspection import Inspection

_ACTIVATIONS = "activations"
# In the order in which they are shown.
_GROUPS = ("boards", "labels", _ACTIVATIONS, "statistics", "parameters")
_PREFIXES = {
    "indices": "boards",
    "boards": "boards",
    "labels": "labels",
    "stats": "statistics",
    **{each.key: "parameters" for each in ACTIVATIONS if isinstance(each, WeightActivation)},
}
# Name, dtype, shape and size.
_BASIC_COLUMNS = 4
# A checkpoint's tokenizer may have 64 KiB.
_LONGEST_VALUE = 400


@dataclass(frozen=True)
class FileContents:
    """What there is to show of a file, finished or not.

    Attributes:
        path: where it is.
        format: name of its format.
        size: its bytes.
        tensors: in the order in which they are listed.
        metadata: all of it that is for people.
        digests: of the tensors, where they are known.
        damaged: what is not as it was written; None where that was not asked.
    """

    path: Path
    format: str
    size: int
    tensors: Sequence[StoredTensor | TensorSpec]
    metadata: Mapping[str, str]
    digests: Mapping[str, Digest]
    damaged: Sequence[str] | None = None

    @classmethod
    def of(cls, inspection: Inspection, damaged: Sequence[str] | None) -> FileContents:
        """Take what an inspection found."""
        return cls(
            inspection.path,
            inspection.format.name,
            inspection.size,
            inspection.contents.tensors,
            inspection.contents.metadata,
            inspection.digests,
            damaged,
        )

    @property
    def boards(self) -> int | None:
        """How many boards it is of."""
        shapes = {tensor.name: tensor.shape for tensor in self.tensors}
        return (shapes.get("indices") or (None,))[0]

    @property
    def layers(self) -> list[int] | None:
        """Numbers of the layers that it has of the keys that have layers."""
        numbers = self.metadata.get("layers", "").split(",")
        if not all(number.isdecimal() and len(number) < 10 for number in numbers):
            return None
        return [*map(int, numbers)]

    def as_dict(self) -> dict[str, object]:
        """Return all of it, ready for JSON."""
        content: dict[str, object] = {
            "file": str(self.path),
            "format": self.format,
            "bytes": self.size,
            "boards": self.boards,
            "layers": self.layers,
            "tensors": [self._tensor_dict(tensor) for tensor in self.tensors],
            "metadata": dict(self.metadata),
        }
        return content if self.damaged is None else {**content, "damaged": self.damaged}

    def _tensor_dict(self, tensor: StoredTensor | TensorSpec) -> dict[str, Any]:
        digest = self.digests.get(tensor.name)
        return {
            "key": tensor.name,
            "group": _group_of(tensor.name),
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "bytes": tensor.nbytes,
            "nan": digest and digest.nan,
            "inf": digest and digest.inf,
        }

    def parts(self, statistics: Table | None = None) -> Iterator[str | Table]:
        """Yield what people are shown: a line and tables.

        Args:
            statistics: what is shown in the place of the tensors that hold them.
        """
        yield self._title()
        tensors = self.tensors if statistics is None else split_statistics(self.tensors)[0]
        yield self._tensor_table(tensors)
        if statistics is not None:
            yield statistics
        rows = [
            (key, shortened(value))
            for key, value in self.metadata.items()
            if key != INTEGRITY_KEY or not self.digests
        ]
        if rows:
            yield Table(("metadata", "value"), rows)

    def _title(self) -> str:
        facts = [f"{size_text(self.size)} ({self.size:,} bytes)"]
        if self.boards is not None:
            facts.append(f"{self.boards:,} boards")
        if self.layers is not None:
            of = f" of {self.metadata['num_layers']}" if "num_layers" in self.metadata else ""
            facts.append(f"layers {_ranges(self.layers)}{of}")
        if self.digests and not self._has_nonfinite():
            facts.append("all values finite")
        return f"{self.path}: {', '.join(facts)}"

    def _has_nonfinite(self) -> bool:
        return any(digest.nan or digest.inf for digest in self.digests.values())

    def _tensor_table(self, tensors: Sequence[StoredTensor | TensorSpec]) -> Table:
        numbers = ["size", *["nan", "inf"] * self._has_nonfinite()]
        headings = ["tensor", "dtype", "shape", *numbers]
        headings += ["digest"] * (self.damaged is not None)
        groups: dict[str, list[list[str]]] = {group: [] for group in _GROUPS}
        others, statistics = split_statistics(tensors)
        for tensor in others:
            groups[_group_of(tensor.name)].append(self._row(tensor))
        if statistics:
            blanks = [""] * (len(headings) - _BASIC_COLUMNS)
            groups["statistics"].append([*statistics_row(statistics), *blanks])
        rows = [row for group, own in groups.items() if own for row in (group, *own)]
        return Table(headings, rows, numbers)

    def _row(self, tensor: StoredTensor | TensorSpec) -> list[str]:
        cells = [tensor.name, tensor.dtype, shape_text(tensor.shape), size_text(tensor.nbytes)]
        if self._has_nonfinite():
            digest = self.digests.get(tensor.name)
            cells += [f"{digest.nan:,}", f"{digest.inf:,}"] if digest else ["", ""]
        if self.damaged is not None:
            cells.append(_verdict(tensor.name, self.damaged))
        return cells


def split_statistics(
    tensors: Sequence[StoredTensor | TensorSpec],
) -> tuple[list[StoredTensor | TensorSpec], list[StoredTensor | TensorSpec]]:
    """Separate from the others the tensors that hold statistics: eight a key, too many to list."""
    others = [tensor for tensor in tensors if not tensor.name.startswith(STATISTICS_PREFIX)]
    statistics = [tensor for tensor in tensors if tensor.name.startswith(STATISTICS_PREFIX)]
    return others, statistics


def statistics_row(statistics: Sequence[StoredTensor | TensorSpec]) -> list[str]:
    """Show tensors of statistics in one row of a table of tensors: name, dtype, shape, size."""
    dtypes = ", ".join(sorted({tensor.dtype for tensor in statistics}))
    size = size_text(sum(tensor.nbytes for tensor in statistics))
    return [f"{STATISTICS_PREFIX}KEY/NAME", dtypes, f"{len(statistics):,} tensors", size]


def _group_of(name: str) -> str:
    return _PREFIXES.get(name.partition("/")[0], _ACTIVATIONS)


def _verdict(name: str, damaged: Sequence[str]) -> str:
    if [*damaged] == [INTEGRITY_KEY]:
        return "unknown"
    return "DAMAGED" if name in damaged else "ok"


def _ranges(numbers: list[int]) -> str:
    """Write numbers in their order: `0-3, 7`."""
    known = set(numbers)
    starts = sorted(n for n in known if n - 1 not in known)
    ends = sorted(n for n in known if n + 1 not in known)
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


def shortened(value: str) -> str:
    """Cut a text of the metadata that nobody would read to its end."""
    if len(value) <= _LONGEST_VALUE:
        return value
    return f"{value[:_LONGEST_VALUE]}... ({len(value):,} characters, all of them in --json)"
