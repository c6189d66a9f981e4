"""Text for people: what a terminal can show, and quantities with their units."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

_UNITS = ("B", "kB", "MB", "GB", "TB")

_SPANS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


def size_text(nbytes: int) -> str:
    """Write a number of bytes: `1.61 GB`, `256 B`."""
    if nbytes < 1000:
        return f"{nbytes} B"
    scaled, unit = float(nbytes), 0
    # What rounds to 1000 belongs to the next unit.
    while scaled >= 999.5 and unit < len(_UNITS) - 1:
        scaled, unit = scaled / 1000, unit + 1
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:,.{digits}f} {_UNITS[unit]}"


def duration_text(seconds: float) -> str:
    """Write a duration in its two largest units: `42 s`, `3 min 20 s`, `1 h 5 min`."""
    whole = round(seconds)
    for size, unit, part_size, part in _SPANS:
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part_size} {part}"
    return f"{whole} s"


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
