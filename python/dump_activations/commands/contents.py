"""What `inspect-activations` shows of one file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dump_activations.commands.tables import Table
from dump_activations.commands.text import shape_text
from dump_activations.model.activations import ACTIVATIONS, WeightActivation
from dump_activations.storage.digests import INTEGRITY_KEY
from dump_activations.units import size_text

if TYPE_CHECKING:
    from collections.abc import Iterator

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
# A checkpoint's tokenizer may have 64 KiB.
_LONGEST_VALUE = 400


def group_of(name: str) -> str:
    """Say what kind of tensor has a name."""
    return _PREFIXES.get(name.partition("/")[0], _ACTIVATIONS)


def as_dict(inspection: Inspection, damaged: list[str] | None) -> dict[str, object]:
    """Return all that is known of a file, ready for JSON.

    Args:
        inspection: the file.
        damaged: what `find_damage` found; None where it was not asked.
    """
    content: dict[str, object] = {
        "file": str(inspection.path),
        "format": inspection.format.name,
        "bytes": inspection.size,
        "boards": _boards(inspection),
        "layers": _layers(inspection),
        "tensors": [_tensor_dict(inspection, tensor) for tensor in inspection.contents.tensors],
        "metadata": inspection.contents.metadata,
    }
    return content if damaged is None else {**content, "damaged": damaged}


def _tensor_dict(inspection: Inspection, tensor: StoredTensor) -> dict[str, Any]:
    digest = inspection.digests.get(tensor.name)
    return {
        "key": tensor.name,
        "group": group_of(tensor.name),
        "dtype": tensor.dtype,
        "shape": tensor.shape,
        "bytes": tensor.nbytes,
        "nan": digest and digest.nan,
        "inf": digest and digest.inf,
    }


def parts(inspection: Inspection, damaged: list[str] | None) -> Iterator[str | Table]:
    """Yield what people are shown of a file: the same, as a line and tables."""
    yield _title(inspection)
    yield _tensor_table(inspection, damaged)
    rows = [
        (key, shortened(value))
        for key, value in inspection.contents.metadata.items()
        if key != INTEGRITY_KEY or not inspection.digests
    ]
    if rows:
        yield Table(("metadata", "value"), rows)


def _title(inspection: Inspection) -> str:
    metadata = inspection.contents.metadata
    facts = [f"{size_text(inspection.size)} ({inspection.size:,} bytes)"]
    if (boards := _boards(inspection)) is not None:
        facts.append(f"{boards:,} boards")
    if (layers := _layers(inspection)) is not None:
        of = f" of {metadata['num_layers']}" if "num_layers" in metadata else ""
        facts.append(f"layers {_ranges(layers)}{of}")
    digests = inspection.digests.values()
    if digests and not any(digest.nan or digest.inf for digest in digests):
        facts.append("all values finite")
    return f"{inspection.path}: {', '.join(facts)}"


def _boards(inspection: Inspection) -> int | None:
    shapes = {tensor.name: tensor.shape for tensor in inspection.contents.tensors}
    return (shapes.get("indices") or (None,))[0]


def _layers(inspection: Inspection) -> list[int] | None:
    """Read the numbers of the layers that a file has of the keys that have layers."""
    numbers = inspection.contents.metadata.get("layers", "").split(",")
    if not all(number.isdecimal() and len(number) < 10 for number in numbers):
        return None
    return [*map(int, numbers)]


def _ranges(numbers: list[int]) -> str:
    """Write numbers in their order: `0-3, 7`."""
    known = set(numbers)
    starts = sorted(n for n in known if n - 1 not in known)
    ends = sorted(n for n in known if n + 1 not in known)
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


def _tensor_table(inspection: Inspection, damaged: list[str] | None) -> Table:
    digests = inspection.digests
    counted = any(digest.nan or digest.inf for digest in digests.values())
    headings = ["tensor", "dtype", "shape", "size"]
    headings += ["nan", "inf"] * counted + ["digest"] * (damaged is not None)

    def row(tensor: StoredTensor) -> list[str]:
        cells = [tensor.name, tensor.dtype, shape_text(tensor.shape), size_text(tensor.nbytes)]
        if counted:
            digest = digests.get(tensor.name)
            cells += [f"{digest.nan:,}", f"{digest.inf:,}"] if digest else ["", ""]
        return cells if damaged is None else [*cells, _verdict(tensor.name, damaged)]

    groups: dict[str, list[list[str]]] = {group: [] for group in _GROUPS}
    for tensor in inspection.contents.tensors:
        groups[group_of(tensor.name)].append(row(tensor))
    rows = [row for group, own in groups.items() if own for row in (group, *own)]
    return Table(headings, rows, ("size", "nan", "inf"))


def _verdict(name: str, damaged: list[str]) -> str:
    if damaged == [INTEGRITY_KEY]:
        return "unknown"
    return "DAMAGED" if name in damaged else "ok"


def shortened(value: str) -> str:
    """Cut a text of the metadata that nobody would read to its end."""
    if len(value) <= _LONGEST_VALUE:
        return value
    return f"{value[:_LONGEST_VALUE]}... ({len(value):,} characters, all of them in --json)"
