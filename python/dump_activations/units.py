"""How quantities are written for people."""

_UNITS = ("B", "kB", "MB", "GB", "TB")


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
