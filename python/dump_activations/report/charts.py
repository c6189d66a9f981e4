"""Charts, heatmaps and short texts for `macros.html.j2`.

Shape letters: S cells of queries (16), T cells of keys (16).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

TOP_EXPONENT = 17
"""Exponents beyond it share a colour and are written as powers."""

_MOST_TICKS = 4
_LEVELS = 10
_SIDE = 4
_MOST_CHARACTERS = 300
# Ticks stay in this range, so that no step is 0 or infinite.
_SMALLEST, _LARGEST = 1e-300, 1e300


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A bar or a point of each line per label, on an axis from 0.

    Attributes:
        shares: heights of bars, which are shown in percent; None for a chart of lines.
        details: ends of the bars' tooltips.
        pale: whether each bar counts for less.
        lines: the lines by name.
        band: two lines with a band between them.
    """

    title: str
    labels: Sequence[str]
    x_label: str
    y_label: str = "% of boards"
    note: str = ""
    shares: Array | None = None
    details: Sequence[str] = ()
    pale: Sequence[bool] = ()
    lines: Mapping[str, Array] = field(default_factory=dict)
    band: Mapping[str, Array] = field(default_factory=dict)

    @property
    def named(self) -> dict[str, Array]:
        """Return all lines."""
        return {**self.lines, **self.band}

    @cached_property
    def ticks(self) -> list[float]:
        """Return round numbers from 0 to the first that is not below any value."""
        bars = () if self.shares is None else (100 * self.shares,)
        values = np.array([*bars, *self.named.values()])
        top = float(values.max(initial=0.0, where=np.isfinite(values))) or 1.0
        top = min(max(top, _SMALLEST), _LARGEST)
        scale = 10.0 ** math.floor(math.log10(top / _MOST_TICKS))
        step = next(s * scale for s in (1, 2, 5, 10, 20) if s * scale * _MOST_TICKS >= top)
        return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]

    def heights(self, values: Sequence[float] | Array) -> list[float | None]:
        """Return values as shares of the axis; None for a value that is not finite."""
        top = self.ticks[-1]
        return [min(max(v / top, 0.0), 1.0) if math.isfinite(v) else None for v in values]

    @property
    def band_points(self) -> list[tuple[int, float, float]]:
        """Return (number of the label, low height, high height) where both are finite."""
        edges = enumerate(zip(*map(self.heights, self.band.values()), strict=True))
        return [(i, *edge) for i, edge in edges if None not in edge]


def heat_paths(pattern_ST: Array) -> list[tuple[int, str]]:
    """Return a pattern, 0 to 1, as strokes of SVG: a path per level, clear cells left out.

    A board of keys, 4 x 4, lies at the place of each query's cell, with a clear unit between two.
    """
    spaced = np.zeros((_SIDE, _SIDE + 1, _SIDE, _SIDE + 1))
    by_cell = pattern_ST.reshape(_SIDE, _SIDE, _SIDE, _SIDE)
    spaced[:, :_SIDE, :, :_SIDE] = by_cell.transpose(0, 2, 1, 3)
    side = _SIDE * (_SIDE + 1)
    paths: dict[int, str] = {}
    for y, row in enumerate(spaced.reshape(side, side)):
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


def depths(values: Array) -> Array:
    """Map values to depths from 0 to 1, so that small differences do not look like large ones."""
    low = min(float(values.min()), 0.95 * float(values.mean()))
    high = max(float(values.max()), 1.05 * float(values.mean()))
    found: Array = (values - low) / ((high - low) or 1.0)
    return found


def cut(text: str) -> str:
    """Cut a long text, such as a tokenizer's or any in a foreign file, and add its length."""
    text = text.rstrip()  # `computed_by` is padded.
    if len(text) <= _MOST_CHARACTERS:
        return text
    return f"{text[:_MOST_CHARACTERS]}… ({len(text):,} characters)"


def tile_text(exponent: int) -> str:
    """Write a tile: 2^e, nothing for an empty cell."""
    if exponent > TOP_EXPONENT:
        return f"2^{exponent}"
    return str(1 << int(exponent)) if exponent else ""


def short_tile_text(exponent: int) -> str:
    """Write a tile for an axis, from 1024 on as `1k`."""
    if 10 <= exponent <= TOP_EXPONENT:
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


def bar_text(share: float) -> str:
    """Write a share in percent in three characters; nothing for NaN or next to nothing."""
    percent = 100 * share
    if not 0.05 <= percent < 999.5:
        return short_text(percent) if percent >= 999.5 else "0" if percent <= 0 else ""
    return f"{percent:.0f}" if percent >= 9.95 else f"{percent:.1f}".removeprefix("0")
