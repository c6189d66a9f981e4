"""The section of what was run on what, and what is in the file."""

import os

from dump_activations.report.markup import Markup, tag
from dump_activations.report.tables import table
from dump_activations.statistics import STATISTICS_PREFIX
from dump_activations.storage.digests import INTEGRITY_KEY
from dump_activations.storage.reading.inspection import Inspection
from dump_activations.text import size_text

# What a reader looks for, in groups; other metadata follows under the last title.
_GROUPS = {
    "Model": (
        *("checkpoint", "hub_commit", "head_type", "num_layers", "hidden_size", "n_bins"),
        *("random_init", "weights_dtype", "weights_sha256"),
    ),
    "Boards": (
        *("dataset", "dataset_rows", "dataset_layout_sha256", "n_samples", "indices_from", "seed"),
        *("where", "steps", "labels"),
    ),
    "Run": (
        *("outputs", "layers", "dtype", "precision", "compile", "device", "batch_size", "stats"),
        *("dump_activations_version", "torch_version", "format_version", "fingerprint"),
    ),
}
_REST = "More"

# Longer values, a tokenizer's text or what a foreign file holds, are cut.
_LONGEST = 300

_MOST_TENSORS = 200


def draw(inspection: Inspection) -> Markup:
    """Draw the metadata in groups and the tensors as a table."""
    metadata = {k: v for k, v in inspection.contents.metadata.items() if k != INTEGRITY_KEY}
    groups = []
    for title, keys in _GROUPS.items():
        entries = {key: metadata.pop(key) for key in keys if key in metadata}
        groups.append(_group(title, entries))
    groups.append(_group("File", _file(inspection)))
    groups.append(_group(_REST, metadata))
    return Markup.of(tag("div", *groups, class_="facts"), _tensors(inspection))


def _file(inspection: Inspection) -> dict[str, str]:
    digests = inspection.digests
    entries = {
        "path": os.fspath(inspection.path.resolve()),
        "format": inspection.format.name,
        "size": f"{size_text(inspection.size)} ({inspection.size:,} bytes)",
    }
    if not digests:
        return {**entries, "integrity": "the file carries no digests"}
    nan, inf = (sum(getattr(d, kind) for d in digests.values()) for kind in ("nan", "inf"))
    entries["integrity"] = (
        f"digests of {len(digests)} tensors, not compared here (inspect-activations --verify "
        f"does); {nan:,} NaN and {inf:,} infinite elements"
    )
    return entries


def _group(title: str, entries: dict[str, str]) -> Markup | None:
    if not entries:
        return None
    rows = [
        tag("div", tag("dt", key.replace("_", " ")), tag("dd", cut(_spaced(key, value))))
        for key, value in entries.items()
    ]
    return tag("div", tag("h3", title), tag("dl", *rows))


def _spaced(key: str, value: str) -> str:
    """Let a list wrap between its entries."""
    return value.replace(",", ", ") if key in ("labels", "layers", "outputs") else value


def cut(text: str) -> str:
    """Cut a long text, saying how long it is."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"


def _tensors(inspection: Inspection) -> Markup:
    tensors = [t for t in inspection.contents.tensors if not t.name.startswith(STATISTICS_PREFIX)]
    rows = []
    for tensor in tensors[:_MOST_TENSORS]:
        digest = inspection.digests.get(tensor.name)
        shape = " x ".join(f"{length:,}" for length in tensor.shape)
        nonfinite = [f"{digest.nan:,}", f"{digest.inf:,}"] if digest else ["", ""]
        cells = (tensor.name, tensor.dtype, shape, size_text(tensor.nbytes), *nonfinite)
        rows.append([cut(cell) for cell in cells])
    more = len(tensors) - len(rows)
    others = len(inspection.contents.tensors) - len(tensors)
    notes = [
        f"{more:,} more are not listed." if more else "",
        f"{others:,} more hold statistics." if others else "",
    ]
    note = tag("p", " ".join(filter(None, notes))) if any(notes) else None
    summary = tag("summary", f"The {len(tensors):,} tensors")
    columns = ("tensor", "dtype", "shape", "size", "NaN", "infinite")
    return tag("details", summary, table("tensors", columns, rows), note)
