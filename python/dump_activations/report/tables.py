"""Tables, and boards of the game with a number and a colour in each cell.

A wide table scrolls by itself where a page is narrow.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dump_activations.dtypes import CELLS
from dump_activations.report.markup import Markup, percent_text, tag

# Depths of the one colour of numbers, as classes of `page.css`.
_LEVELS = 10

_SIDE = 4


def table(name: str, columns: Sequence[str], rows: Iterable[Sequence[str | Markup]]) -> Markup:
    """Return a table; the first cell of a row is its heading. `name` is for who cannot see it."""
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    body = [
        tag("tr", tag("th", first, scope="row"), *(_cell(value) for value in others))
        for first, *others in rows
    ]
    content = tag("table", head, *body)
    return tag("div", content, class_="scroll", tabindex=0, role="region", aria_label=name)


def share_table(
    name: str, columns: Sequence[str], rows: Sequence[str], shares: NDArray[np.float64]
) -> Markup:
    """Return a table of shares, (rows, columns), on a colour as deep as they are large."""
    cells = (
        [row, *(tag("td", percent_text(float(s)), class_=heat_class(float(s))) for s in values)]
        for row, values in zip(rows, shares, strict=True)
    )
    return table(name, [name, *columns], cells)


def heat_board(caption: str, texts: Sequence[str], depths: ArrayLike) -> Markup:
    """Return a board of 16 texts on a colour, clear at depth 0 and the deepest at 1."""
    classes = [heat_class(float(depth)) for depth in np.ravel(depths)]
    return board(texts, classes, caption=caption)


def board(texts: Sequence[str], classes: Sequence[str], *, caption: str = "") -> Markup:
    """Return a board of 16 texts, the class of each giving its colour; captioned if it is small."""
    assert len(texts) == len(classes) == CELLS, (texts, classes)
    cells = [tag("td", text, class_=name) for text, name in zip(texts, classes, strict=True)]
    rows = [tag("tr", *cells[i : i + _SIDE]) for i in range(0, CELLS, _SIDE)]
    return tag("table", tag("caption", caption) if caption else None, *rows, class_="board")


def heat_class(depth: float) -> str:
    """Return the class of a colour, clear at 0, NaN too, and the deepest at 1."""
    return f"h{min(int(depth * _LEVELS), _LEVELS - 1) if depth > 0 else 0}"


def _cell(value: str | Markup) -> Markup:
    return value if isinstance(value, Markup) else tag("td", value)
