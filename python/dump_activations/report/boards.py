"""The section of all boards: what kinds there are, and how many of each.

Shape letters: n boards, S cells (16).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dump_activations.dataset.game import empty_cells, legal_moves, max_exponent
from dump_activations.dtypes import CELLS, MOVES
from dump_activations.report import charts
from dump_activations.report.markup import Markup, percent_text, tag
from dump_activations.report.moves import NAMES
from dump_activations.report.source import Source, looked_at
from dump_activations.report.tables import heat_board

_STEP_BINS = 12


def draw(source: Source) -> Markup:
    """Draw how the boards are distributed."""
    cells = np.ascontiguousarray(source.boards.T)
    largest, empty = max_exponent(cells), empty_cells(cells)
    legal = legal_moves(cells).sum(axis=1)
    exponents = np.arange(int(largest.min()), int(largest.max()) + 1)
    tiles = [short_tile_text(int(exponent)) for exponent in exponents]
    figures = [
        _counted("Largest tile of a board", tiles, largest, exponents, "largest tile"),
        _counted("Empty cells of a board", None, empty, np.arange(CELLS + 1), "empty cells"),
        _counted("Moves that change a board", None, legal, np.arange(MOVES + 1), "legal moves"),
    ]
    if source.moves is not None:
        played = np.arange(MOVES)
        figures.append(_counted("Moves that were played", NAMES, source.moves, played, "move"))
    if source.steps is not None:
        figures.append(_steps(source.steps))
    figures.append(_cells(source.boards))
    sentence = f"Figures of {looked_at(len(source.rows), len(source.file))}."
    return Markup.of(tag("p", sentence, *_missing(source)), tag("div", *figures, class_="cards"))


def tile_text(exponent: int) -> str:
    """Write a tile: 2^e, nothing for an empty cell."""
    return str(1 << exponent) if exponent else ""


def short_tile_text(exponent: int) -> str:
    """Write a tile for an axis, from 1024 on as `1k`."""
    return f"{1 << (exponent - 10)}k" if exponent >= 10 else tile_text(exponent) or "none"


def step_bins(steps: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the edges of at most `count` bins of equal width over steps, whole numbers."""
    width = max(-(-(int(steps.max()) + 1) // count), 1)
    return np.arange(0, int(steps.max()) + width + 1, width)


def _missing(source: Source) -> list[Markup]:
    if source.moves is not None and source.steps is not None:
        return []
    text = " The moves that were played and the steps of the games are not in this dump: "
    return [Markup.of(text, tag("code", "--labels move_dir,step_index"), " adds them.")]


def _counted(
    title: str,
    names: Sequence[str] | None,
    values: NDArray[np.integer],
    kinds: NDArray[np.int64],
    x_label: str,
) -> Markup:
    """Draw the share of each of `kinds` among values; `names` of None are their numbers."""
    counts = (values[:, None] == kinds).sum(axis=0)
    return _shares(title, names or [*map(str, kinds)], counts, len(values), x_label)


def _steps(steps: NDArray[np.int64]) -> Markup:
    edges = step_bins(steps, _STEP_BINS)
    counts, _ = np.histogram(steps, edges)
    names = [str(edge) for edge in edges[:-1]]
    width = int(edges[1] - edges[0])
    label = f"step of the game, from … on, {width:,} to a bar"
    return _shares("How far the games are", names, counts, len(steps), label)


def _shares(
    title: str, names: Sequence[str], counts: NDArray[np.int64], total: int, x_label: str
) -> Markup:
    shares = counts / total
    return charts.bars(
        title,
        names,
        shares,
        tooltips=[
            f"{name}: {count:,} boards, {percent_text(share)}"
            for name, count, share in zip(names, counts, shares, strict=True)
        ],
        x_label=x_label,
        y_label="% of boards",
    )


def _cells(boards: NDArray[np.uint8]) -> Markup:
    """Draw how large the tiles of each cell are."""
    mean_S = boards.mean(axis=0)
    texts = [charts.short_text(value) for value in mean_S]
    board = heat_board("mean exponent", texts, mean_S / (mean_S.max() or 1))
    note = "0 is an empty cell, e the tile 2^e; a stronger blue is more."
    return charts.figure("Where the large tiles are", board, note=note)
