"""Draws the README's picture from a results file: how fast each stage is alone, and the dump.

    python tests/benchmarks/plot.py RESULTS.json [--directory docs]

Writes stages-light.svg and stages-dark.svg. Each panel is one measured configuration on a
logarithmic scale of boards a second: a dot a stage by itself, the dump below them, and a broken
line at the slowest stage, which the dump cannot be expected to pass by much.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

STAGES = {
    "boards alone": "read boards",
    "forward alone": "forward pass",
    "copy alone": "copy to host",
    "write alone": "write to disk",
}
LABELS = {**STAGES, "dump": "dump", "baseline": "plain script"}

WIDTH = 840
LEFT, RIGHT = 130, 90
ROW, DOT, HEADING, MARGIN = 26, 6, 46, 16


@dataclass(frozen=True)
class Theme:
    """Colours: of the page, text, faint lines, stages alone, the dump and the plain script."""

    page: str
    text: str
    faint: str
    stage: str
    dump: str
    baseline: str


THEMES = {
    "light": Theme("#ffffff", "#1f2328", "#d1d9e0", "#6e7781", "#0969da", "#bc4c00"),
    "dark": Theme("#0d1117", "#e6edf3", "#3d444d", "#9198a1", "#4493f8", "#db6d28"),
}


@dataclass(frozen=True)
class Panel:
    """One configuration: its name, and boards a second by the names in `LABELS`."""

    title: str
    speeds: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--directory", type=Path, default=Path())
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    for name, theme in THEMES.items():
        path = options.directory / f"stages-{name}.svg"
        path.write_text(draw(list(panels(results)), caption(results["machine"]), theme))
        print(path)


def panels(results: dict[str, Any]) -> Iterator[Panel]:
    """Find the configurations whose stages were measured."""
    for section in results.values():
        if not isinstance(section, dict):
            continue
        by_prefix: dict[str, dict[str, float]] = {}
        for figure in section.get("figures", ()):
            prefix, _, name = figure["name"].rpartition(": ")
            if name in LABELS:
                by_prefix.setdefault(prefix, {})[name] = figure["median"]
        for prefix, speeds in by_prefix.items():
            if speeds.keys() & STAGES and "dump" in speeds:
                title = section["title"] + (f", {prefix}" if prefix else "")
                yield Panel(title, {name: speeds[name] for name in LABELS if name in speeds})


def caption(machine: dict[str, object]) -> str:
    """Name the hardware and the day."""
    cpu = f"{machine['cores']} cores of {machine['cpu']}"
    hardware = f"{machine['gpu']}, {cpu}" if machine["gpu"] else cpu
    return f"{hardware}; torch {machine['torch']}; {machine['date']}"


def draw(shown: list[Panel], below: str, theme: Theme) -> str:
    """Draw the panels below one another, over one scale."""
    speeds = [speed for panel in shown for speed in panel.speeds.values()]
    low = 10 ** math.floor(math.log10(min(speeds)) - 0.1)
    high = 10 ** math.ceil(math.log10(max(speeds)))

    def x(speed: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(speed / low) / math.log(high / low)

    y = MARGIN
    body: list[str] = []
    for panel in shown:
        body += draw_panel(panel, y, x, (low, high), theme)
        y += HEADING + ROW * len(panel.speeds) + MARGIN
    body.append(text(LEFT, y + 14, f"boards a second, each stage by itself. {below}", theme, 12))
    height = y + 14 + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="system-ui, sans-serif">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="{theme.page}"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def draw_panel(
    panel: Panel,
    y: float,
    x: Callable[[float], float],
    scale: tuple[float, float],
    theme: Theme,
) -> Iterator[str]:
    """Draw one configuration with its top at `y`."""
    top, bottom = y + HEADING - 6, y + HEADING + ROW * len(panel.speeds)
    yield text(LEFT, y + 14, panel.title, theme, 15, weight=600)
    for exponent in range(round(math.log10(scale[0])), round(math.log10(scale[1])) + 1):
        yield line(x(10**exponent), top, bottom, theme.faint)
        yield text(x(10**exponent), y + 34, power(exponent), theme, 11, anchor="middle")
    slowest = min(speed for name, speed in panel.speeds.items() if name in STAGES)
    yield line(x(slowest), top, bottom, theme.text, dashes="3 3")
    colours = {"dump": theme.dump, "baseline": theme.baseline}
    for i, (name, speed) in enumerate(panel.speeds.items()):
        middle = y + HEADING + ROW * i + ROW / 2 - 2
        colour = colours.get(name, theme.stage)
        weight = 600 if name == "dump" else 400
        yield text(LEFT - 10, middle + 5, LABELS[name], theme, 13, anchor="end", weight=weight)
        yield f'<circle cx="{x(speed):.1f}" cy="{middle}" r="{DOT}" fill="{colour}"/>'
        yield text(x(speed) + 12, middle + 4, number(speed), theme, 12, weight=weight)


def text(
    x: float,
    y: float,
    content: str,
    theme: Theme,
    size: int,
    *,
    anchor: str = "start",
    weight: int = 400,
) -> str:
    """Write a line of text, with a rim that keeps it clear of what lies under it."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" fill="{theme.text}" stroke="{theme.page}" stroke-width="4" '
        f'paint-order="stroke" stroke-linejoin="round">{escape(content)}</text>'
    )


def line(x: float, top: float, bottom: float, colour: str, *, dashes: str = "none") -> str:
    """Draw a vertical line."""
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="{colour}" '
        f'stroke-dasharray="{dashes}"/>'
    )


def number(speed: float) -> str:
    """Round to three digits, with a word for millions."""
    if speed >= 1e6:
        return f"{speed / 1e6:.3g} million"
    return f"{round(speed, 2 - math.floor(math.log10(speed))):,.0f}"


def power(exponent: int) -> str:
    """Name a power of ten."""
    return f"{10**exponent:,}" if exponent < 6 else f"{10 ** (exponent - 6)} million"


if __name__ == "__main__":
    main()
