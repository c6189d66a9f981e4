"""HTML and SVG as text: all that is not `Markup` is escaped, whatever file it comes from."""

import html
import math
import re
from typing import Self

# Written without an end tag: empty elements of HTML, and those that the next one ends.
_UNENDED = frozenset({"caption", "img", "link", "meta", "option", "td", "th", "tr"})

# Shapes of SVG, which end in themselves where they have no tooltip.
_SHAPES = frozenset({"line", "path", "rect"})

# HTML takes such values without quotes, and a page has ten thousand.
_BARE = re.compile(r"[\w.#%-]+", re.ASCII)

Text = str | int | float


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()

    @classmethod
    def of(cls, *content: Text | None) -> Self:
        """Join parts: markup as it is, other text escaped, None left out."""
        return cls("".join(_escaped(part) for part in content if part is not None))


def tag(name: str, /, *content: Text | None, **attributes: Text | None) -> Markup:
    """Return an element; an attribute of None is left out, `class_` and `data_x` lose their `_`."""
    opening = "".join(
        f" {key.rstrip('_').replace('_', '-')}={_quoted(value)}"
        for key, value in attributes.items()
        if value is not None
    )
    if name in _SHAPES and not content:
        return Markup(f"<{name}{opening} />")
    end = "" if name in _UNENDED else f"</{name}>"
    return Markup(f"<{name}{opening}>{Markup.of(*content)}{end}")


def number_text(value: float) -> str:
    """Write a number to be read: four digits of it, or all of those before the point."""
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def percent_text(share: float) -> str:
    """Write a share as a percentage, with two digits of it where it is below ten."""
    if math.isnan(share):
        return "n/a"
    return f"{share:.0%}" if share >= 0.0995 else f"{100 * share:.2g}%"


def bar_text(share: float) -> str:
    """Write a share in percent where there is room for three characters; none for next to none."""
    percent = 100 * share
    if not percent >= 0.05:
        return "" if percent > 0 else "0"
    return f"{percent:.0f}" if percent >= 9.95 else f"{percent:.1f}".removeprefix("0")


def _quoted(value: Text) -> str:
    text = _escaped(value)
    return text if _BARE.fullmatch(text) else f'"{text}"'


def _escaped(value: Text) -> str:
    if isinstance(value, Markup):
        return value
    if isinstance(value, float):
        return f"{value:.0f}"  # a coordinate
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))
    return html.escape(shown)
