"""Text for people: quantities with their units, and only characters that a terminal can show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_UNITS = ("B", "kB", "MB", "GB", "TB")

_SPANS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


def size_text(nbytes: int) -> str:
    """Write a number of bytes: `1.61 GB`, `256 B`."""
    if nbytes < 1000:
        return f"{nbytes} B"
    scaled, unit = float(nbytes), 0
    # A value that rounds to 1000 belongs to the next unit.
    while scaled >= 999.5 and unit < len(_UNITS) - 1:
        scaled, unit = scaled / 1000, unit + 1
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:,.{digits}f} {_UNITS[unit]}"


def duration_text(seconds: float) -> str:
    """Write a duration in its two largest units: `42 s`, `3 min 20 s`, `1 h 5 min`."""
    whole = round(seconds)
    for size, unit, smaller_size, smaller in _SPANS:
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller_size} {smaller}"
    return f"{whole} s"


def shape_text(shape: Sequence[int | str]) -> str:
    """Write a shape as Python does, without the comma of a single axis."""
    return f"({', '.join(map(str, shape))})"


def ranges_text(numbers: Iterable[int]) -> str:
    """Write a set of numbers as ranges: `0-3, 7`."""
    known = set(numbers)
    starts = sorted(n for n in known if n - 1 not in known)
    ends = sorted(n for n in known if n + 1 not in known)
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


def slice_text(value: slice) -> str:
    """Write a slice as it is typed: `20000:30000`, `::2`."""
    parts = [value.start, value.stop, *([] if value.step is None else [value.step])]
    return ":".join("" if part is None else str(part) for part in parts)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Hint at the known name that is nearest to a wrong one; empty where none is near."""
    near = get_close_matches(name.lower(), list(known), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def printable(text: str, stream: object = None) -> str:
    """Escape control characters, which a terminal would obey, and what a stream cannot encode."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
