"""Charts as inline SVG. A mark's tooltip says what it stands for; colours are classes of CSS."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dump_activations.board import CELLS
from dump_activations.report.markup import Markup, number_text, tag

_WIDTH, _HEIGHT = 320, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 24, 34

# Depths of the colour of numbers, as classes of `page.css`.
_HEAT_LEVELS = 10

_MOST_TICKS = 4

# About how wide a character of a label below the axis is, and a gap between two labels.
_CHARACTER, _GAP = 5.4, 4.0


@dataclass(frozen=True)
class Series:
    """A line of a chart: its name, a value a label, and the number of its colour."""

    name: str
    values: Sequence[float]
    colour: int = 0


def figure(title: str, *content: Markup, note: str = "") -> Markup:
    """Return a figure under a title that says what it shows."""
    small = tag("small", note) if note else None
    return tag("figure", tag("figcaption", tag("b", title), small), *content)


def bars(
    title: str,
    labels: Sequence[str],
    values: ArrayLike,
    *,
    texts: Sequence[str],
    tooltips: Sequence[str],
    x_label: str,
    y_label: str,
    note: str = "",
    is_pale: Sequence[bool] = (),
) -> Markup:
    """Return a figure with a bar a label, its text above it; pale bars count for less."""
    heights = np.asarray(values, np.float64)
    frame = _Frame(len(labels), heights)
    width = 0.8 * frame.pitch
    marks = []
    for i, height in enumerate(heights):
        top = frame.y(height)
        rect = tag(
            "rect",
            tag("title", tooltips[i]),
            class_="f0 pale" if is_pale and is_pale[i] else "f0",
            x=frame.x(i) - width / 2,
            y=top,
            width=width,
            height=max(frame.y(0) - top, 0.0),
        )
        text = tag("text", texts[i], class_="v", x=frame.x(i), y=top - 2)
        marks.append(Markup.of(rect, text))
    return figure(title, frame.draw(title, marks, labels, x_label, y_label), note=note)


def lines(
    title: str,
    labels: Sequence[str],
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    band: Series | None = None,
    band_top: Sequence[float] = (),
    note: str = "",
) -> Markup:
    """Return a figure with lines over labels, and a band from `band` to `band_top` behind them."""
    shown = [value for each in series for value in each.values]
    frame = _Frame(len(labels), np.asarray([*shown, *band_top], np.float64))
    marks = []
    if band is not None:
        marks.append(_band(frame, band, band_top))
    for each in series:
        marks += _line(frame, each, labels)
    chart = frame.draw(title, marks, labels, x_label, y_label)
    legend = [_legend(series, band)] if len(series) > 1 else []
    return figure(title, chart, *legend, note=note)


def heat_board(caption: str, texts: Sequence[str], depths: ArrayLike) -> Markup:
    """Return a board of 16 texts on a colour, clear at depth 0 and the deepest at 1."""
    cells = np.asarray(depths, np.float64).ravel()
    assert len(cells) == len(texts) == CELLS, cells.shape
    content = [
        tag("i", text, class_=heat_class(depth)) for text, depth in zip(texts, cells, strict=True)
    ]
    return tag("div", tag("span", caption), tag("div", *content, class_="board"), class_="heat")


def heat_class(depth: float) -> str:
    """Return the class of a colour, clear at 0 and the deepest at 1."""
    return f"h{min(max(int(depth * _HEAT_LEVELS), 0), _HEAT_LEVELS - 1) if depth > 0 else 0}"


def short_text(value: float) -> str:
    """Write a number in four or five characters."""
    if not math.isfinite(value):
        return "n/a"
    if abs(value) >= 9999.5:
        return f"{value:.0e}".replace("e+0", "e")
    if abs(value) >= 99.5 or value == 0:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 0.095 else f"{value:.2g}"


def tick_values(top: float) -> list[float]:
    """Return round numbers from 0 to the first that is not below `top`."""
    if not (top > 0 and math.isfinite(top)):
        top = 1.0
    scale = 10.0 ** math.floor(math.log10(top / _MOST_TICKS))
    step = next(s * scale for s in (1, 2, 5, 10, 20) if s * scale * _MOST_TICKS >= top)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


class _Frame:
    """The axes of a chart: labels along the bottom, numbers from 0 up the side."""

    def __init__(self, count: int, values: NDArray[np.float64]) -> None:
        finite = values[np.isfinite(values)]
        self._ticks = tick_values(float(finite.max()) if finite.size else 0.0)
        self.pitch = (_WIDTH - _LEFT - _RIGHT) / max(count, 1)

    def x(self, index: int) -> float:
        return _LEFT + (index + 0.5) * self.pitch

    def y(self, value: float) -> float:
        share = max(value, 0.0) / self._ticks[-1] if math.isfinite(value) else 0.0
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def draw(
        self, title: str, marks: Sequence[Markup], labels: Sequence[str], x_label: str, y_label: str
    ) -> Markup:
        grid = [
            Markup.of(
                tag("line", class_="g", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=self.y(t), y2=self.y(t)),
                tag("text", number_text(t), class_="e", x=_LEFT - 4, y=self.y(t) + 3),
            )
            for t in self._ticks
        ]
        widest = max(map(len, labels), default=0) * _CHARACTER + _GAP
        every = math.ceil(widest / self.pitch)
        names = [
            tag("text", label, x=self.x(i), y=_HEIGHT - _BOTTOM + 12)
            for i, label in enumerate(labels)
            if i % every == 0
        ]
        middle = _LEFT + (_WIDTH - _LEFT - _RIGHT) / 2
        axes = [
            tag("text", x_label, x=middle, y=_HEIGHT - 6),
            tag("text", y_label, class_="s", x=2, y=8),
        ]
        return tag(
            "svg",
            *(*grid, *names, *axes, *marks),
            viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
            role="img",
            aria_label=title,
        )


def _line(frame: _Frame, series: Series, labels: Sequence[str]) -> list[Markup]:
    """Draw what is finite of a series, with a dot and a tooltip a value."""
    points = [(frame.x(i), frame.y(v), v, labels[i]) for i, v in enumerate(series.values)]
    strokes = [
        tag("path", class_=f"l{series.colour}", d=_path([(x, y) for x, y, _, _ in run]))
        for finite, run in groupby(points, lambda point: math.isfinite(point[2]))
        if finite
    ]
    dots = [
        tag(
            "circle",
            tag("title", f"{series.name}, {label}: {number_text(value)}"),
            class_=f"f{series.colour}",
            cx=x,
            cy=y,
            r=2.5,
        )
        for x, y, value, label in points
        if math.isfinite(value)
    ]
    return [*strokes, *dots]


def _band(frame: _Frame, low: Series, high: Sequence[float]) -> Markup:
    places = [
        i
        for i, (a, b) in enumerate(zip(low.values, high, strict=True))
        if math.isfinite(a) and math.isfinite(b)
    ]
    # A band over one label has a width too.
    half = frame.pitch / 4 if len(places) == 1 else 0.0
    above = [(frame.x(i) + d, frame.y(high[i])) for i in places for d in {-half, half}]
    below = [(frame.x(i) + d, frame.y(low.values[i])) for i in places for d in {-half, half}]
    outline = _path([*above, *reversed(below)]) + "z" if places else ""
    return tag("path", class_=f"b{low.colour}", d=outline)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _legend(series: Sequence[Series], band: Series | None) -> Markup:
    entries = [(each.name, f"k{each.colour}") for each in series]
    if band is not None:
        entries.append((band.name, "kb"))
    return tag(
        "div",
        *(tag("span", tag("b", "", class_=swatch), name) for name, swatch in entries),
        class_="legend",
    )
