"""Lists of names as callers write them. Importing this module does not import NumPy."""

from collections.abc import Sequence


def split_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Split comma-separated names, or a list of such; each comes once."""
    texts = [names] if isinstance(names, str) else names
    split = (name.strip() for text in texts for name in text.split(","))
    return tuple(dict.fromkeys(name for name in split if name))
