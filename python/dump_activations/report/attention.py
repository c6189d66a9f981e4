"""The section of the attention patterns: where each head looks, on average and on some boards.

Shape letters: n boards, L layers, Q query heads, S cells of queries (16), T cells of keys (16).
"""

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dump_activations.report import charts
from dump_activations.report.examples import board
from dump_activations.report.markup import Markup, tag
from dump_activations.report.png import data_url
from dump_activations.report.source import Floats, Source, looked_at
from dump_activations.report.tables import share_table

_KEY = "attn_pattern"
_SIDE = 4

# A sum of sixteen numbers in 16 bits is off by less.
_ROUNDING = 0.01


@dataclass(frozen=True)
class Attention:
    """Attention patterns of a dump.

    Attributes:
        layers: their numbers in the model, (L,).
        count: boards that the means are of.
        mean: the mean pattern, float64 (L, Q, S, T).
        sink: what is left of 1 in a row, its mean, float64 (L, Q).
        received: of each example board, what a cell gets from a query's cell on average,
            (examples, L, Q, T).
    """

    layers: tuple[int, ...]
    count: int
    mean: NDArray[np.float64]
    sink: NDArray[np.float64]
    received: Floats


def read_attention(source: Source, examples: NDArray[np.int64]) -> Attention | None:
    """Read patterns of as many boards as fit, and of the examples; None where there are none."""
    if _KEY not in source.keys:
        return None
    places = source.rows_within(_KEY)
    mean = source.read(_KEY, places).mean(axis=0, dtype=np.float64)
    received = source.read(_KEY, examples).mean(axis=-2)
    return Attention(
        source.file.layers(_KEY), len(places), mean, 1 - mean.sum(axis=-1).mean(axis=-1), received
    )


def draw(source: Source, examples: NDArray[np.int64]) -> Markup:
    """Draw the patterns of each layer and head."""
    found = read_attention(source, examples)
    if found is None:
        flag = tag("code", f"--outputs {_KEY}")
        return tag("p", "Attention patterns are not in this dump: ", flag, " adds them.")
    top = float(np.nan_to_num(found.mean).max())
    intro = (
        f"Means are of {looked_at(found.count, len(source.file))}. A head's mean is drawn as a "
        "board of small boards: one for each cell that looks, at that cell's place, with the cells "
        f"it looks at, from 0, clear, to {charts.short_text(top)}, all blue. Beside it, of one "
        "board, how much each cell gets from a looking cell on average, in percent. Both blues "
        "grow with the square root."
    )
    shown = _shown(found)
    options = [
        tag("option", f"row {source.rows[place]:,}", value=i, selected="" if i == shown else None)
        for i, place in enumerate(examples)
    ]
    choice = tag("select", *options, id="chosen", class_="script")
    without = tag("noscript", f"row {source.rows[examples[shown]]:,}")
    label = tag("label", "The one board, one of those above: ", choice, without)
    chosen = tag("div", label, board(source.boards[examples[shown]]), class_="chosen")
    layers = [_layer(found, i, top) for i in range(len(found.layers))]
    return Markup.of(tag("p", intro), _sinks(found), chosen, *layers, _received_data(found))


def _layer(found: Attention, i: int, top: float) -> Markup:
    title = f"Layer {found.layers[i]}: where each head looks"
    heads = [_head(found, i, head, top) for head in range(found.mean.shape[1])]
    return charts.figure(title, tag("div", *heads, class_="heads"))


def _head(found: Attention, i: int, head: int, top: float) -> Markup:
    name = f"head {head}"
    mean = tag(
        "img",
        src=data_url(_boards_of_boards(np.sqrt(found.mean[i, head] / (top or 1.0)))),
        alt=f"layer {found.layers[i]}, {name}: mean pattern",
    )
    pattern = tag("figure", tag("figcaption", f"{name}, mean"), mean)
    # The script fills it in: it is of the chosen board.
    chosen = tag("table", tag("caption", f"{name}, one board"), class_="board script")
    return tag("div", pattern, chosen, class_="head")


def _shown(found: Attention) -> int:
    """Say which of the examples is shown until another is chosen."""
    return len(found.received) // 2


def _boards_of_boards(pattern_ST: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lay 16 boards of keys out where the query's cell is, a clear pixel between them."""
    spaced = np.zeros((_SIDE, _SIDE + 1, _SIDE, _SIDE + 1))
    by_cell = pattern_ST.reshape(_SIDE, _SIDE, _SIDE, _SIDE)
    spaced[:, :_SIDE, :, :_SIDE] = by_cell.transpose(0, 2, 1, 3)
    side = _SIDE * (_SIDE + 1)
    return spaced.reshape(side, side)[:-1, :-1]


def _sinks(found: Attention) -> Markup:
    if float(np.nan_to_num(found.sink).max()) < _ROUNDING:
        return tag("p", "Every row adds up to 1: nothing goes to an attention sink.")
    heads = [f"head {head}" for head in range(found.sink.shape[1])]
    shares = share_table("layer", heads, [str(layer) for layer in found.layers], found.sink)
    return charts.figure("The sink's share: what is left of 1 in a row, on average", shares)


def _received_data(found: Attention) -> Markup:
    """Return the percentages of all example boards, for the script: a character each from `#`."""
    percent = np.nan_to_num(100 * found.received).round().clip(0, 100).astype(np.uint8)
    boards = ["".join(chr(ord("#") + value) for value in board.ravel()) for board in percent]
    text = Markup(json.dumps(boards).replace("<", r"\u003c"))
    return tag("script", text, type="application/json", id="attention-data")
