"""The sections of the page, each as the plain values that its part of `page.html.j2` shows.

Shape letters: n boards looked at, L layers, M moves (4), S cells of a board (16).
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dump_activations.dataset.game import empty_cells, legal_moves, max_exponent
from dump_activations.dtypes import CELLS, MOVES, STATISTICS_PREFIX
from dump_activations.progress import Count
from dump_activations.report import charts
from dump_activations.report.charts import Chart, Series, number_text, percent_text
from dump_activations.report.data import (
    MOST_HEADS,
    NO_MOVE,
    OUTLIER,
    UNKNOWN,
    Absence,
    Array,
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
from dump_activations.text import size_text

Values = dict[str, Any]

MOVE_NAMES = ("up", "down", "left", "right")
_MOVES = ("↑ up", "↓ down", "← left", "→ right")
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
    """List the metadata in groups, and the tensors in a table."""
    metadata = {k: v for k, v in dump.metadata.items() if k != INTEGRITY_KEY}
    for key in {"labels", "layers", "outputs"} & metadata.keys():
        metadata[key] = metadata[key].replace(",", ", ")  # Such a list may wrap.
    groups = {
        title: {key: metadata.pop(key) for key in keys.split() if key in metadata}
        for title, keys in _GROUPS.items()
    }
    groups["File"] = _file(dump)
    groups["More"] = dict(list(metadata.items())[:_MOST_ENTRIES])
    tensors = [t for n, t in dump.tensors.items() if not n.startswith(STATISTICS_PREFIX)]
    rows = []
    for tensor in tensors[:_MOST_TENSORS]:
        digest = dump.digests.get(tensor.name)
        shape = " x ".join(f"{length:,}" for length in tensor.shape)
        nonfinite = [f"{digest.nan:,}", f"{digest.inf:,}"] if digest else ["", ""]
        rows.append([tensor.name, tensor.dtype, shape, size_text(tensor.nbytes), *nonfinite])
    counts = {
        "more tensors are not listed": len(tensors) - len(rows),
        "more hold statistics": len(dump.tensors) - len(tensors),
        "more entries of metadata are not listed": len(metadata) - len(groups["More"]),
    }
    return {
        "groups": {title: group for title, group in groups.items() if group},
        "count": len(tensors),
        "tensors": rows,
        "notes": " ".join(f"{count:,} {text}." for text, count in counts.items() if count),
    }


def _file(dump: DumpFiles) -> dict[str, str]:
    digests = dump.digests.values()
    nan, inf = sum(d.nan for d in digests), sum(d.inf for d in digests)
    integrity = (
        f"digests of {len(digests)} tensors, not compared here (inspect-activations --verify "
        f"does); {nan:,} NaN and {inf:,} infinite elements"
    )
    return {
        "path": os.fspath(dump.path.resolve()),
        "format": dump.format.name,
        "size": f"{size_text(dump.size)} ({dump.size:,} bytes)",
        "integrity": integrity if digests else "the file carries no digests",
    }


def looked_at(count: int, of: int) -> str:
    """Say how many boards figures are over."""
    return f"all {of:,} boards" if count == of else f"{count:,} of {of:,} boards, evenly spaced"


def boards(source: Source) -> Values:
    """Chart how the boards are distributed."""
    cells = np.ascontiguousarray(source.boards.T)
    largest, legal = max_exponent(cells), legal_moves(cells).sum(axis=1)
    tiles = _tile_names(largest)
    steps, played = source.steps, source.moves
    pictures = [
        _counted("Largest tile of a board", tiles, largest - largest.min(), "largest tile"),
        _counted("Empty cells of a board", range(CELLS + 1), empty_cells(cells), "empty cells"),
        _counted("Moves that change a board", range(MOVES + 1), legal, "legal moves"),
    ]
    if not played.absence:
        known = played.values[played.values >= 0]
        pictures.append(_counted("Moves that were played", MOVE_NAMES, known, "move"))
    if not steps.absence:
        width, names, bins = _step_bins(steps.values[steps.values >= 0])
        label = f"step of the game, {width:,} per bar, from"
        pictures.append(_counted("Steps of the games", names, bins, label))
    mean_S = source.boards.mean(axis=0)
    return {
        "count": looked_at(len(source.rows), len(source.file)),
        "absences": [label.absence for label in (played, steps) if label.absence],
        "charts": pictures,
        "mean": mean_S,
        "depths": mean_S / (mean_S.max() or 1),
    }


def _counted(title: str, names: Sequence[object], kinds: NDArray[np.integer], x: str) -> Chart:
    """Chart the share of each kind, a number from 0 on, under its name."""
    counts = np.bincount(kinds.astype(np.int64), minlength=len(names))
    details = [f", {count:,} boards" for count in counts]
    labels = [str(name) for name in names]
    shares = counts / max(len(kinds), 1)
    return Chart(title=title, labels=labels, shares=shares, x_label=x, details=details)


def _tile_names(largest: NDArray[np.uint8]) -> list[str]:
    """Name the tiles from the smallest of some largest tiles on."""
    exponents = range(int(largest.min()), int(largest.max()) + 1)
    return [charts.short_tile_text(exponent) for exponent in exponents]


def _step_bins(steps: Ints) -> tuple[int, list[str], Ints]:
    """Return the width of at most so many bins of steps, their names, and the bin of each step."""
    width = int(steps.max()) // _BINS_OF_STEPS + 1
    names = [str(i * width) for i in range(int(steps.max()) // width + 1)]
    return width, names, steps // width


def examples(source: Source, places: Ints) -> Values:
    """Show boards with the model's move and the played move of each."""
    choices = read_choices(source, places)
    cards = []
    for i, place in enumerate(places):
        step, played = source.steps.values[place], source.moves.values[place]
        model = choices.moves[i] if choices else UNKNOWN
        other = ", another" if model >= 0 and model != played else ""
        cards.append(
            {
                "board": source.boards[place],
                "row": f"row {source.rows[place]:,}" + (f", step {step:,}" if step >= 0 else ""),
                "model": _model_move(choices, i) if choices else "",
                "played": f"{_MOVES[played]}{other}" if played >= 0 else "",
            }
        )
    absence = None if choices else source.absence("The model's moves", "head_probs")
    return {"cards": cards, "absence": absence, "is_binned": choices and choices.probs.ndim == 3}


def _model_move(choices: Choices, i: int) -> str:
    move = int(choices.moves[i])
    if move < 0:
        return "no move is legal" if move == NO_MOVE else "every score is NaN"
    score = float(choices.scores[i, move])
    is_binned = choices.probs.ndim == 3
    return f"{_MOVES[move]}, " + (
        f"bin {charts.short_text(score)}" if is_binned else percent_text(score)
    )


def moves(source: Source) -> Values:
    """Chart the heads' output, and the agreement of the model's moves with those played."""
    choices = read_choices(source)
    if choices is None:
        return {"absence": source.absence("The heads' outputs", "head_probs")}
    made = choices.moves[choices.moves >= 0]
    pictures = [_counted("Moves that the model makes", MOVE_NAMES, made, "move")]
    mean = choices.probs.mean(axis=0, dtype=np.float64)
    if mean.ndim == 1:
        chart = Chart(
            title="Mean probability of each move", labels=MOVE_NAMES, shares=mean,
            x_label="move", y_label="probability, %",
        )  # fmt: skip
        pictures.insert(0, chart)
    elif mean.shape[1] <= _MOST_BINS:
        chart = Chart(
            title="Mean probability of each bin, by the move's head",
            labels=[str(i) for i in range(mean.shape[1])], x_label="bin", y_label="probability",
            lines=[Series(name, mean[i], i) for i, name in enumerate(MOVE_NAMES)],
        )  # fmt: skip
        pictures.insert(0, chart)
    values = {
        "count": looked_at(len(choices.places), len(source.file)),
        "bins_left_out": mean.shape[-1] if mean.shape[-1] > _MOST_BINS else 0,
        "charts": pictures,
    }
    played = source.moves.values[choices.places]
    both = (choices.moves >= 0) & (played >= 0)
    if source.moves.absence or not both.any():
        return {**values, "played_absence": source.moves.absence or Absence("No board has both.")}
    return {**values, **_agreement(source, choices, played, both, pictures)}


def _agreement(
    source: Source, choices: Choices, played: Ints, both: NDArray[np.bool_], pictures: list[Chart]
) -> Values:
    """Add charts of the agreement on boards with both moves, and return its other values."""
    agrees = choices.moves == played
    largest = source.boards[choices.places].max(axis=1)[both]
    title = "Agreement by the largest tile"
    kinds = (largest - largest.min()).astype(np.int64)
    names = _tile_names(largest)
    pictures.append(_agreement_bars(title, names, kinds, agrees[both], "largest tile"))
    steps = source.steps.values[choices.places]
    if (aged := both & (steps >= 0)).any():
        _, names, bins = _step_bins(steps[aged])
        title = "Agreement by the step of the game"
        pictures.append(_agreement_bars(title, names, bins, agrees[aged], "step of the game, from"))
    pairs = played[both] * MOVES + choices.moves[both]
    counts = np.bincount(pairs, minlength=MOVES * MOVES).reshape(MOVES, MOVES)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return {
        "agreement": f"{agrees[both].mean():.1%}",
        "confusion": shares,
        "names": MOVE_NAMES,
    }


def _agreement_bars(
    title: str, names: Sequence[str], kinds: Ints, agrees: NDArray[np.bool_], x: str
) -> Chart:
    counts = np.bincount(kinds, minlength=len(names))
    shares = np.bincount(kinds, weights=agrees, minlength=len(names)) / counts
    pale = [0 < count < _FEW for count in counts.tolist()]
    return Chart(
        title=title, labels=names, shares=shares, x_label=x,
        y_label="% of boards on which the moves agree",
        details=[f" of {count:,} boards" for count in counts], pale=pale,
        note=f"Pale: fewer than {_FEW} boards." if any(pale) else "",
    )  # fmt: skip


def attention(source: Source, examples: Ints) -> Values:
    """Show the mean pattern of each head, and what cells receive on one of the examples."""
    key = "attn_pattern"
    if key not in source.keys:
        return {"absence": source.absence("Attention patterns", key)}
    places, layers = source.places_within(key), source.file.layers(key)
    heads = source.file.shape(key)[2]
    kept, shown = layers[: max(MOST_HEADS // heads, 1)], min(heads, MOST_HEADS)

    def read(places: Ints, layer: int) -> Floats:
        return source.read(key, places, layer)[:, :shown]

    means = [read(places, layer).mean(axis=0, dtype=np.float64) for layer in kept]
    received = np.stack([read(examples, layer).mean(axis=-2) for layer in kept], axis=1)
    percent = np.nan_to_num(100 * received).round().clip(0, 100).astype(np.uint8)
    sink_LQ = 1 - np.array(means).sum(axis=-1).mean(axis=-1)
    top = float(np.nan_to_num(means, posinf=0.0).max())
    paths = [[charts.heat_paths(np.sqrt(p / (top or 1.0))) for p in mean_QST] for mean_QST in means]
    middle = len(examples) // 2
    return {
        "count": looked_at(len(places), len(source.file)),
        "heads_left_out": len(layers) * heads - len(kept) * shown,
        "top": top,
        "rows": [f"row {source.rows[place]:,}" for place in examples],
        "shown": middle,
        "board": source.boards[examples[middle]],
        "sinks": sink_LQ if float(np.nan_to_num(sink_LQ).max()) >= _ROUNDING else None,
        "layers": list(zip(kept, paths, strict=True)),
        "heads": [f"head {head}" for head in range(shown)],
        # A character per percentage, from `?` on: a page holds ten thousand of them, and the
        # characters before it are escaped in a script.
        "received": ["".join(chr(ord("?") + v) for v in board.ravel()) for board in percent],
    }


def activations(source: Source, progress: Count | None) -> Values:
    """Show the figures of each key. `progress` is called with keys done and keys in all."""
    elsewhere = ("attn_pattern", "head_logits", "head_probs")
    keys = [key for key in source.keys if key not in elsewhere]
    shown = []
    for done, key in enumerate(keys, 1):
        shown.append(_key(key_figures(source, key), len(source.file)))
        if progress is not None:
            progress(done, len(keys))
    return {"shown": shown, "outlier": f"±{OUTLIER:.0f}", "left_out": source.left_out}


def _key(figures: KeyFigures, of: int) -> Values:
    exact, some = figures.counts
    text = f"Statistics of {looked_at(exact, of)}"
    text += "." if exact == some else f"; quantiles and cells of {looked_at(some, of)}."
    text += " A dump made with --stats has them of all boards." if exact < of else ""
    text += "" if figures.outliers.any() else f" No entry is beyond ±{OUTLIER:.0f}."
    key = charts.cut(figures.key)
    names = [str(layer) for layer in figures.layers] or [key]
    captions = [f"layer {name}" for name in figures.layers] or ["all boards"]
    cells = [] if figures.cell_norms is None else zip(captions, figures.cell_norms, strict=True)
    return {
        "name": key,
        "text": text + figures.note,
        "charts": list(_by_layer(figures, key, names)) if len(names) > 1 else [],
        "first": "layer" if figures.layers else "key",
        "rows": [[name, *_numbers(figures, i)] for i, name in enumerate(names)],
        "cells": [(caption, norms_S, _depths(norms_S)) for caption, norms_S in cells],
    }


def _by_layer(figures: KeyFigures, key: str, names: Sequence[str]) -> Iterator[Chart]:
    low, median, high = figures.norm_quantiles
    yield Chart(
        title=f"{key}: norm of a vector", labels=names, x_label="layer", y_label="L2 norm",
        lines=[Series("mean", figures.norm_mean), Series("median", median, 1)],
        band=[Series("5%", low), Series("95%", high)],
    )  # fmt: skip
    yield Chart(
        title=f"{key}: std of a feature", labels=names, x_label="layer",
        y_label="standard deviation", lines=[Series("std", figures.std)],
    )  # fmt: skip
    if figures.outliers.any():
        yield Chart(
            title=f"{key}: entries beyond ±{OUTLIER:.0f}", labels=names, x_label="layer",
            y_label="% of entries", lines=[Series("share", 100 * figures.outliers, 3)],
        )  # fmt: skip


def _numbers(figures: KeyFigures, i: int) -> Iterator[str]:
    for value in (figures.norm_mean[i], *figures.norm_quantiles[:, i], figures.std[i]):
        yield number_text(float(value))
    yield percent_text(float(figures.outliers[i]))
    largest = figures.largest[i]
    top = np.argsort(-np.nan_to_num(largest, nan=np.inf), kind="stable")[:3]
    yield ", ".join(f"{feature}: {charts.short_text(largest[feature])}" for feature in top)


def _depths(norms_S: Array) -> Array:
    """Spread norms over the depths, so that small differences do not look like large ones."""
    low = min(float(norms_S.min()), 0.95 * float(norms_S.mean()))
    high = max(float(norms_S.max()), 1.05 * float(norms_S.mean()))
    depths: Array = (norms_S - low) / ((high - low) or 1.0)
    return depths
