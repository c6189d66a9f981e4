"""How quantities are written for people."""


def size_text(nbytes: int) -> str:
    """Write a number of bytes: `1.61 GB`, `0.25 MB`."""
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
