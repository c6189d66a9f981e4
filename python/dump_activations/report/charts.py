"""Charts as inline SVG. A mark's tooltip says what it stands for; colours are classes of CSS."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from dump_activations.report.markup import Markup, bar_text, number_text, tag

# In halves of the size at which a figure is drawn, so that coordinates are whole numbers.
_WIDTH, _HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 88, 16, 48, 68


_MOST_TICKS = 4

# Of lines, as classes of `page.css`.
_COLOURS = 4

# About how wide a character of a label below the axis is, and a gap between two labels.
_CHARACTER, _GAP = 10.8, 8.0


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
    shares: NDArray[np.float64],
    *,
    tooltips: Sequence[str],
    x_label: str,
    y_label: str,
    note: str = "",
    is_pale: Sequence[bool] = (),
) -> Markup:
    """Return a figure with a bar a label, its percent above it; pale bars count for less."""
    heights = 100 * shares
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
        text = tag("text", bar_text(shares[i]), class_="v", x=frame.x(i), y=top - 4)
        marks.append(Markup.of(rect, text))
    return figure(title, frame.draw(title, marks, labels, x_label, y_label), note=note)


def lines(
    title: str,
    labels: Sequence[str],
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    band: tuple[Series, Series] | None = None,
    note: str = "",
) -> Markup:
    """Return a figure with lines over labels, and behind them the band between two others."""
    named = [*series, *(band or ())]
    frame = _Frame(len(labels), np.array([each.values for each in named], np.float64))
    marks = [_band(frame, *band)] if band else []
    marks += [_line(frame, each) for each in series]
    columns = []
    for i, label in enumerate(labels):
        texts = (f"{each.name} {number_text(each.values[i])}" for each in named)
        columns.append(frame.column(i, f"{label}: {', '.join(texts)}"))
    marks.append(tag("g", *columns, class_="t"))
    chart = frame.draw(title, marks, labels, x_label, y_label)
    legend = [_legend(series, band)] if len(named) > 1 else []
    return figure(title, chart, *legend, note=note)


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


def markers() -> Iterator[Markup]:
    """Yield what draws a dot at each value of a line: once a page, for all its charts."""
    for colour in range(_COLOURS):
        yield tag(
            "marker",
            tag("path", class_=f"d{colour}", d="M5 5h0"),
            id=f"m{colour}",
            markerUnits="userSpaceOnUse",
            markerWidth=10,
            markerHeight=10,
            refX=5,
            refY=5,
        )


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

    def column(self, index: int, tooltip: str) -> Markup:
        """Return what says something of a label to a pointer anywhere over it."""
        left, height = self.x(index) - self.pitch / 2, _HEIGHT - _TOP - _BOTTOM
        outline = f"M{left:.0f} {_TOP}h{self.pitch:.0f}v{height}h{-self.pitch:.0f}z"
        return tag("path", tag("title", tooltip), d=outline)

    def draw(
        self, title: str, marks: Sequence[Markup], labels: Sequence[str], x_label: str, y_label: str
    ) -> Markup:
        heights = [self.y(tick) for tick in self._ticks]
        grid = "".join(f"M{_LEFT} {y:.0f}H{_WIDTH - _RIGHT}" for y in heights)
        numbers = [
            tag("text", number_text(tick), x=_LEFT - 8, y=y + 6)
            for tick, y in zip(self._ticks, heights, strict=True)
        ]
        widest = max(map(len, labels), default=0) * _CHARACTER + _GAP
        every = math.ceil(widest / self.pitch)
        names = [
            tag("text", label, x=self.x(i), y=_HEIGHT - _BOTTOM + 24)
            for i, label in enumerate(labels)
            if i % every == 0
        ]
        middle = _LEFT + (_WIDTH - _LEFT - _RIGHT) / 2
        axes = [
            tag("text", x_label, x=middle, y=_HEIGHT - 12),
            tag("text", y_label, class_="s", x=4, y=16),
        ]
        return tag(
            "svg",
            tag("path", class_="g", d=grid),
            tag("g", *numbers, class_="e"),
            *(*names, *axes, *marks),
            viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
            role="img",
            aria_label=title,
        )


def _line(frame: _Frame, series: Series) -> Markup:
    """Draw what is finite of a series."""
    places = [i for i, value in enumerate(series.values) if math.isfinite(value)]
    # A line breaks where a value is missing.
    runs = [[i for _, i in run] for _, run in groupby(enumerate(places), lambda at: at[1] - at[0])]
    strokes = (_path([(frame.x(i), frame.y(series.values[i])) for i in run]) for run in runs)
    return tag("path", class_=f"l{series.colour}", d="".join(strokes))


def _band(frame: _Frame, low: Series, high: Series) -> Markup:
    both = np.isfinite(low.values) & np.isfinite(high.values)
    places = [int(i) for i in np.flatnonzero(both)]
    above = [(frame.x(i), frame.y(high.values[i])) for i in places]
    below = [(frame.x(i), frame.y(low.values[i])) for i in reversed(places)]
    return tag("path", class_="b0", d=_path([*above, *below]) + "z" if places else "")


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.0f} {y:.0f}" for x, y in points)


def _legend(series: Sequence[Series], band: tuple[Series, Series] | None) -> Markup:
    entries = [(each.name, f"k{each.colour}") for each in series]
    if band is not None:
        entries.append((f"{band[0].name} to {band[1].name}", "kb"))
    return tag(
        "div",
        *(tag("span", tag("b", "", class_=swatch), name) for name, swatch in entries),
        class_="legend",
    )
