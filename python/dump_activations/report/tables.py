"""Tables, which scroll by themselves where a page is narrow."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from dump_activations.report.charts import heat_class
from dump_activations.report.markup import Markup, percent_text, tag


def table(name: str, columns: Sequence[str], rows: Iterable[Sequence[str | Markup]]) -> Markup:
    """Return a table; the first cell of a row is its heading. `name` is for who cannot see it."""
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    body = [
        tag("tr", tag("th", first, scope="row"), *(_cell(value) for value in others))
        for first, *others in rows
    ]
    return tag(
        "div",
        tag("table", head, *body),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=name,
    )


def share_table(
    name: str, columns: Sequence[str], rows: Sequence[str], shares: NDArray[np.float64]
) -> Markup:
    """Return a table of shares, (rows, columns), on colours as deep as they are large."""
    cells = (
        [row, *(tag("td", percent_text(float(s)), class_=heat_class(float(s))) for s in values)]
        for row, values in zip(rows, shares, strict=True)
    )
    return table(name, [name, *columns], cells)


def _cell(value: str | Markup) -> Markup:
    return value if isinstance(value, Markup) else tag("td", value)
