"""The sections of the page, each as the figures that its part of `page.html.j2` shows.

Shape letters: n boards looked at, L layers, Q heads, M moves (4), S cells (16), T cells of keys.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dump_activations.dataset.game import empty_cells, legal_moves, max_exponent
from dump_activations.dtypes import CELLS, MOVES, STATISTICS_PREFIX
from dump_activations.progress import Count
from dump_activations.report import charts
from dump_activations.report.data import (
    MOST_HEADS,
    Absence,
    Choices,
    Floats,
    Ints,
    KeyFigures,
    Source,
    key_figures,
    read_choices,
)
from dump_activations.storage.digests import INTEGRITY_KEY
from dump_activations.storage.reading.dump_files import DumpFiles

Values = dict[str, Any]

MOVE_NAMES = ("up", "down", "left", "right")
_BINS_OF_STEPS = 12
# A share of fewer boards means little.
_FEW = 30
# A sum of sixteen fp16 numbers is off by less.
_ROUNDING = 0.01
_MOST_BINS = 256

# Metadata that a reader looks for, in groups; other metadata follows under `More`.
_GROUPS = {
    "Model": "checkpoint hub_commit head_type num_layers hidden_size n_bins random_init "
    "weights_dtype weights_sha256",
    "Boards": "dataset dataset_rows dataset_layout_sha256 n_samples sampling seed where steps "
    "labels shard first_board",
    "Run": "outputs layers dtype precision compile computed_by batch_size stats "
    "dump_activations_version torch_version format_version fingerprint",
}
_MOST_ENTRIES, _MOST_TENSORS = 100, 200


def facts(dump: DumpFiles) -> Values:
    """Group the metadata, and list the tensors that are no statistics."""
    metadata = {k: v for k, v in dump.metadata.items() if k != INTEGRITY_KEY}
    for key in {"labels", "layers", "outputs"} & metadata.keys():
        metadata[key] = metadata[key].replace(",", ", ")  # Such a list may wrap.
    groups = {
        title: {key: metadata.pop(key) for key in keys.split() if key in metadata}
        for title, keys in _GROUPS.items()
    }
    tensors = [t for n, t in dump.tensors.items() if not n.startswith(STATISTICS_PREFIX)]
    counts = {
        "more tensors are not listed": len(tensors) - _MOST_TENSORS,
        "more hold statistics": len(dump.tensors) - len(tensors),
        "more entries of metadata are not listed": len(metadata) - _MOST_ENTRIES,
    }
    return {
        "groups": groups,
        "more": dict(list(metadata.items())[:_MOST_ENTRIES]),
        "count": len(tensors),
        "tensors": tensors[:_MOST_TENSORS],
        "notes": " ".join(f"{count:,} {text}." for text, count in counts.items() if count > 0),
    }


def boards(source: Source) -> Values:
    """Count how the boards are distributed, as bars of charts."""
    cells = np.ascontiguousarray(source.boards.T)
    played, steps = (each.values[each.values >= 0] for each in (source.played, source.steps))
    width, step_names, step_bins = _step_bins(steps)
    return {
        "absences": [each.absence for each in (source.played, source.steps) if each.absence],
        "largest": _bars(*_tile_bins(max_exponent(cells))),
        "empty": _bars(range(CELLS + 1), empty_cells(cells)),
        "legal": _bars(range(MOVES + 1), legal_moves(cells).sum(axis=1)),
        "played": _bars(MOVE_NAMES, played) if len(played) else None,
        "steps": _bars(step_names, step_bins) if len(steps) else None,
        "steps_per_bar": width,
        "mean": source.boards.mean(axis=0),
    }


def _bars(
    names: Sequence[object], kinds: NDArray[np.integer], agrees: NDArray[np.bool_] | None = None
) -> Values:
    """Return the bars of a chart, one per kind, a number from 0 on: its share of the boards.

    With `agrees`, (n,), a bar is the share of a kind's boards for which it is true.
    """
    kinds = kinds.astype(np.int64)
    counts = np.bincount(kinds, minlength=len(names))
    labels = [str(name) for name in names]
    if agrees is None:
        details = [f", {count:,} boards" for count in counts]
        return {"labels": labels, "shares": counts / max(len(kinds), 1), "details": details}
    pale = [0 < count < _FEW for count in counts.tolist()]
    return {
        "labels": labels,
        "shares": np.bincount(kinds, weights=agrees, minlength=len(names)) / counts,
        "details": [f" of {count:,} boards" for count in counts],
        "pale": pale,
        "note": f"Pale: fewer than {_FEW} boards." if any(pale) else "",
    }


def _tile_bins(largest: NDArray[np.uint8]) -> tuple[list[str], NDArray[np.uint8]]:
    """Return the names of the tiles from the smallest on, and the bin of each tile."""
    exponents = range(int(largest.min()), int(largest.max()) + 1)
    return [charts.short_tile_text(exponent) for exponent in exponents], largest - largest.min()


def _step_bins(steps: Ints) -> tuple[int, list[str], Ints]:
    """Cut steps into a few bins: return their width, their names, and the bin of each step."""
    last = int(steps.max(initial=0))
    width = last // _BINS_OF_STEPS + 1
    return width, [str(i * width) for i in range(last // width + 1)], steps // width


def examples(source: Source) -> Values:
    """Give the model's moves on the examples."""
    choices = read_choices(source, source.examples)
    absence = None if choices else source.absence("The model's moves", "head_probs")
    return {"choices": choices, "absence": absence}


def moves(source: Source) -> Values:
    """Count the model's moves, and their agreement with those played, as bars of charts."""
    choices = read_choices(source)
    if choices is None:
        return {"absence": source.absence("The heads' outputs", "head_probs")}
    mean = choices.probs.mean(axis=0, dtype=np.float64)
    played = source.played.values[choices.places]
    both = (choices.moves >= 0) & (played >= 0)
    absence = source.played.absence or (None if both.any() else Absence("No board has both."))
    return {
        "count": len(choices.places),
        "bins_left_out": mean.shape[-1] if mean.shape[-1] > _MOST_BINS else 0,
        "mean": mean,
        "made": _bars(MOVE_NAMES, choices.moves[choices.moves >= 0]),
        "played_absence": absence,
        **({} if absence else _agreement(source, choices, played, both)),
    }


def _agreement(source: Source, choices: Choices, played: Ints, both: NDArray[np.bool_]) -> Values:
    """Return figures of the agreement on boards with both moves."""
    agrees = choices.moves == played
    largest = source.boards[choices.places].max(axis=1)[both]
    steps = source.steps.values[choices.places]
    aged = both & (steps >= 0)
    _, step_names, step_bins = _step_bins(steps[aged])
    pairs = played[both] * MOVES + choices.moves[both]
    counts = np.bincount(pairs, minlength=MOVES * MOVES).reshape(MOVES, MOVES)
    return {
        "agreement": agrees[both].mean(),
        "by_tile": _bars(*_tile_bins(largest), agrees[both]),
        "by_step": _bars(step_names, step_bins, agrees[aged]) if aged.any() else None,
        "confusion": counts / np.maximum(counts.sum(axis=1, keepdims=True), 1),
    }


def attention(source: Source) -> Values:
    """Give the mean pattern of each head, and what cells receive on one of the examples."""
    key = "attn_pattern"
    if key not in source.keys:
        return {"absence": source.absence("Attention patterns", key)}
    places, layers = source.places_within(key), source.file.layers(key)
    heads = source.file.shape(key)[2]
    kept, shown = layers[: max(MOST_HEADS // heads, 1)], min(heads, MOST_HEADS)

    def read(places: Ints, layer: int) -> Floats:
        return source.read(key, places, layer)[:, :shown]

    means = [read(places, layer).mean(axis=0, dtype=np.float64) for layer in kept]
    received = np.stack([read(source.examples, layer).mean(axis=-2) for layer in kept], axis=1)
    percent = np.nan_to_num(100 * received).round().clip(0, 100).astype(np.uint8)
    sink_LQ = 1 - np.array(means).sum(axis=-1).mean(axis=-1)
    top = float(np.nan_to_num(means, posinf=0.0).max())
    paths = [[charts.heat_paths(np.sqrt(p / (top or 1.0))) for p in mean_QST] for mean_QST in means]
    middle = len(source.examples) // 2
    return {
        "count": len(places),
        "heads_left_out": len(layers) * heads - len(kept) * shown,
        "top": top,
        "shown": middle,
        "sinks": sink_LQ if float(np.nan_to_num(sink_LQ).max()) >= _ROUNDING else None,
        "layers": list(zip(kept, paths, strict=True)),
        "heads": [f"head {head}" for head in range(shown)],
        # A character per percentage, from `?` on: a page holds ten thousand of them, and the
        # characters before it are escaped in a script.
        "received": ["".join(chr(ord("?") + v) for v in board.ravel()) for board in percent],
    }


def activations(source: Source, progress: Count | None) -> Iterator[KeyFigures]:
    """Yield the figures of each key. `progress` is called with keys done and keys in all."""
    elsewhere = ("attn_pattern", "head_logits", "head_probs")
    keys = [key for key in source.keys if key not in elsewhere]
    for done, key in enumerate(keys, 1):
        yield key_figures(source, key)
        if progress is not None:
            progress(done, len(keys))
