"""How quantities are written for people."""

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
