"""Pictures as plain numbers, which `macros.html.j2` draws: bars and lines, heatmaps, boards.

Shape letters: S cells of a board (16).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dump_activations.dtypes import CELLS

Array = NDArray[np.float64]

_MOST_TICKS = 4
_LEVELS = 10
_SIDE = 4
# Exponents beyond it share a colour and are written as powers.
_TOP_EXPONENT = 17
# Ticks stay in this range, so that no step is 0 or infinite.
_SMALLEST, _LARGEST = 1e-300, 1e300


@dataclass(frozen=True)
class Series:
    """A line or a row of bars: a value per label, and the number of its colour."""

    name: str
    values: Array
    colour: int = 0


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Bars with the texts above them, or lines with the band between two others behind them.

    Heights are shares of the axis, None where a value is not finite.
    """

    title: str
    note: str = ""
    labels: Sequence[str]
    x_label: str
    y_label: str
    ticks: Sequence[tuple[float, str]]
    tooltips: Sequence[str]
    lines: Sequence[tuple[Series, Sequence[float | None]]] = ()
    band: Sequence[tuple[int, float, float]] = ()
    band_name: str = ""
    bars: Sequence[tuple[float, str, bool]] = ()


@dataclass(frozen=True)
class Board:
    """16 texts, each with the class of its colour."""

    label: str
    cells: Sequence[tuple[str, str]]
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its heading. `levels` colour the other cells."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    levels: Sequence[Sequence[int]] = ()


def bars(
    title: str,
    labels: Sequence[str],
    shares: Array,
    *,
    x_label: str,
    y_label: str = "% of boards",
    details: Sequence[str] = (),
    pale: Sequence[bool] = (),
    note: str = "",
) -> Chart:
    """Return a bar per label, its percent above it. `details` end the tooltips."""
    ticks, (heights,) = _axis([100 * shares])
    details, pale = details or [""] * len(labels), pale or [False] * len(labels)
    texts = [_bar_text(share) for share in shares]
    return Chart(
        title=title, note=note, labels=labels, x_label=x_label, y_label=y_label, ticks=ticks,
        tooltips=[
            f"{label}: {percent_text(share)}{detail}"
            for label, share, detail in zip(labels, shares, details, strict=True)
        ],
        bars=[(h or 0.0, text, p) for h, text, p in zip(heights, texts, pale, strict=True)],
    )  # fmt: skip


def lines(
    title: str,
    labels: Sequence[str],
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    band: tuple[Series, Series] | None = None,
) -> Chart:
    """Return lines over labels, and behind them the band between two others."""
    named = [*series, *(band or ())]
    ticks, heights = _axis([each.values for each in named])
    low, high = heights[-2:] if band else ((), ())
    return Chart(
        title=title, labels=labels, x_label=x_label, y_label=y_label, ticks=ticks,
        tooltips=[
            f"{label}: " + ", ".join(f"{s.name} {number_text(s.values[i])}" for s in named)
            for i, label in enumerate(labels)
        ],
        lines=list(zip(series, heights, strict=False)),
        band=[
            (i, bottom, top)
            for i, (bottom, top) in enumerate(zip(low, high, strict=True))
            if bottom is not None and top is not None
        ],
        band_name=f"{band[0].name} to {band[1].name}" if band else "",
    )  # fmt: skip


def tick_values(top: float) -> list[float]:
    """Return round numbers from 0 to the first that is not below `top`."""
    top = min(max(top, _SMALLEST), _LARGEST) if top > 0 else 1.0
    scale = 10.0 ** math.floor(math.log10(top / _MOST_TICKS))
    step = next(s * scale for s in (1, 2, 5, 10, 20) if s * scale * _MOST_TICKS >= top)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def _axis(
    series: Sequence[Array],
) -> tuple[list[tuple[float, str]], list[list[float | None]]]:
    """Return the ticks of an axis from 0, and each series as shares of the axis."""
    values = np.array(series, np.float64)
    finite = values[np.isfinite(values)]
    ticks = tick_values(float(finite.max()) if finite.size else 0.0)
    shares = [
        [min(max(v / ticks[-1], 0.0), 1.0) if math.isfinite(v) else None for v in each.tolist()]
        for each in values
    ]
    return [(tick / ticks[-1], number_text(tick)) for tick in ticks], shares


def heat_paths(depths: Array) -> list[tuple[int, str]]:
    """Return a heatmap, 0 to 1, as strokes of SVG: a path per level, clear cells left out."""
    paths: dict[int, str] = {}
    for y, row in enumerate(depths):
        x = 0
        for level, run in groupby(map(heat_level, row)):
            width = len(list(run))
            if level:
                paths[level] = paths.get(level, "") + f"M{x} {y}h{width}"
            x += width
    return sorted(paths.items())


def heat_level(depth: float) -> int:
    """Return the level of a colour: 0 is clear, for NaN too, and 9 the deepest."""
    return min(int(depth * _LEVELS), _LEVELS - 1) if depth > 0 else 0


def heat_board(caption: str, values_S: Array, depths_S: ArrayLike) -> Board:
    """Return a board of 16 numbers on a colour as deep as `depths_S`, 0 to 1."""
    levels = [heat_level(float(depth)) for depth in np.ravel(depths_S)]
    assert len(values_S) == len(levels) == CELLS, caption
    cells = [(short_text(v), f"h{level}") for v, level in zip(values_S, levels, strict=True)]
    return Board(caption, cells, caption)


def game_board(exponents_S: NDArray[np.uint8]) -> Board:
    """Return a board of the game. Its label lists the rows, with 0 for an empty cell."""
    exponents = [int(e) for e in exponents_S]
    texts = [tile_text(e) for e in exponents]
    rows = [" ".join(t or "0" for t in texts[i : i + _SIDE]) for i in range(0, CELLS, _SIDE)]
    classes = [f"t{min(e, _TOP_EXPONENT)}" for e in exponents]
    return Board(f"board: {', '.join(rows)}", [*zip(texts, classes, strict=True)])


def boards_of_boards(pattern_ST: Array) -> Array:
    """Lay 16 boards of keys out where the query's cell is, with a clear pixel between them."""
    spaced = np.zeros((_SIDE, _SIDE + 1, _SIDE, _SIDE + 1))
    by_cell = pattern_ST.reshape(_SIDE, _SIDE, _SIDE, _SIDE)
    spaced[:, :_SIDE, :, :_SIDE] = by_cell.transpose(0, 2, 1, 3)
    side = _SIDE * (_SIDE + 1)
    return spaced.reshape(side, side)[:-1, :-1]


def share_table(name: str, columns: Sequence[str], rows: Sequence[str], shares: Array) -> Table:
    """Return a table of shares, (rows, columns), on a colour as deep as they are large."""
    texts = [[row, *map(percent_text, each)] for row, each in zip(rows, shares, strict=True)]
    return Table(name, [name, *columns], texts, [[*map(heat_level, each)] for each in shares])


def tile_text(exponent: int) -> str:
    """Write a tile: 2^e, nothing for an empty cell."""
    if exponent > _TOP_EXPONENT:
        return f"2^{exponent}"
    return str(1 << exponent) if exponent else ""


def short_tile_text(exponent: int) -> str:
    """Write a tile for an axis, from 1024 on as `1k`."""
    if 10 <= exponent <= _TOP_EXPONENT:
        return f"{1 << (exponent - 10)}k"
    return tile_text(exponent) or "none"


def number_text(value: float) -> str:
    """Write a number with four digits, or with all digits before the point."""
    if not math.isfinite(value):
        return "not finite"
    if abs(value) < 1e15 and (value == int(value) or abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def short_text(value: float) -> str:
    """Write a number in four or five characters."""
    if not math.isfinite(value):
        return "n/a"
    if abs(value) >= 9999.5:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    if abs(value) >= 99.5 or value == 0:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 0.095 else f"{value:.2g}"


def percent_text(share: float) -> str:
    """Write a share as a percentage, with two digits where it is below ten."""
    if not math.isfinite(share):
        return "n/a"
    return f"{share:.0%}" if 0.0995 <= share < 1e6 else f"{100 * share:.2g}%"


def _bar_text(share: float) -> str:
    """Write a share in percent in three characters; nothing for NaN or next to nothing."""
    percent = 100 * share
    if not 0.05 <= percent < 999.5:
        return short_text(percent) if percent >= 999.5 else "0" if percent <= 0 else ""
    return f"{percent:.0f}" if percent >= 9.95 else f"{percent:.1f}".removeprefix("0")
