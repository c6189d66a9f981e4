"""Text as a terminal can show it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


def printable(text: str) -> str:
    """Escape what a terminal would obey or could not show: names may come from any file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def width_of(text: str) -> int:
    """Count the terminal's columns that a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def filled(text: str, width: int) -> list[str]:
    """Cut a text at blanks into lines of so many columns; a word that is longer stays whole."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def wrapped(text: str, width: int) -> list[str]:
    """Cut a text into lines of so many columns, at blanks where there are some."""
    if width_of(text) <= width:
        return [text]
    return textwrap.wrap(text, width, break_on_hyphens=False)


def shape_text(shape: Sequence[int | str]) -> str:
    """Write a shape as Python does, but for the comma of a single axis."""
    return f"({', '.join(map(str, shape))})"
