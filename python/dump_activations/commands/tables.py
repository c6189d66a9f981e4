"""Tables as lines of text: one a row where there is room, and none wider than the terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import click

from dump_activations.text import printable, width_of, wrapped

_GAP = "  "
# What the last column may be cut down to, if it holds text.
_NARROWEST_TEXT = 20
_NARROWEST_FIRST = 2


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        headings: one a column.
        rows: cells of each row; a text in the place of a row is the title of those after it.
        numbers: headings of the columns that are aligned to the right.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str] | str]
    numbers: Collection[str] = ()

    def lines(self, width: int | None, *, styled: bool) -> Iterator[str]:
        """Yield the table's lines.

        Args:
            width: columns that a line may take; None for any number.
            styled: whether headings are set off by the terminal's means.
        """
        rows = [[printable(cell) for cell in row] for row in self._cells()]
        widths = [max(map(width_of, column)) for column in zip(self.headings, *rows, strict=True)]
        fitted = widths if width is None else self._fit(widths, width)
        if fitted is not None:
            yield from (_bold(line, styled) for line in self._row(self.headings, fitted))
        for row in self.rows:
            if isinstance(row, str):
                yield ""
                yield _bold(printable(row), styled)
            elif fitted is not None:
                yield from self._row([*map(printable, row)], fitted)
            else:
                assert width is not None
                yield from self._stacked([*map(printable, row)], width)

    def _cells(self) -> Iterator[Sequence[str]]:
        return (row for row in self.rows if not isinstance(row, str))

    def _fit(self, widths: Sequence[int], width: int) -> list[int] | None:
        """Narrow the last column, then the first; None where that is not enough."""
        first, *middle, last = widths
        least = last if self.headings[-1] in self.numbers else min(last, _NARROWEST_TEXT)
        others = sum(middle) + len(_GAP) * (len(widths) - 1)
        if others + least + _NARROWEST_FIRST > width:
            return None
        first = min(first, width - others - least)
        return [first, *middle, min(last, width - others - first)]

    def _row(self, cells: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
        """Yield a row's lines: a first cell that is too long stands above the others."""
        first, *middle, last = cells
        if width_of(first) > widths[0]:
            yield first
            first = ""
        for i, part in enumerate(wrapped(last, widths[-1])):
            shown = [first, *middle, part] if i == 0 else [*[""] * (len(cells) - 1), part]
            aligned = map(self._align, self.headings, shown, widths)
            yield _GAP.join(aligned).rstrip()

    def _align(self, heading: str, cell: str, width: int) -> str:
        blanks = " " * (width - width_of(cell))
        return blanks + cell if heading in self.numbers else cell + blanks

    def _stacked(self, cells: Sequence[str], width: int) -> Iterator[str]:
        """Yield a row's first cell, and below it the others by their names."""
        first, *others = cells
        yield first
        named = [f"{h} {cell}" for h, cell in zip(self.headings[1:], others, strict=True) if cell]
        for text in named:
            for part in wrapped(text, max(width - len(_GAP), 1)):
                yield _GAP + part


def _bold(text: str, styled: bool) -> str:  # noqa: FBT001
    return click.style(text, bold=True) if styled else text
