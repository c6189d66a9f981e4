"""The file formats, by suffix. A new format is one module and one entry here."""

from collections.abc import Iterable
from pathlib import Path

from dump_activations.dtypes import DTYPES
from dump_activations.errors import InvalidArgumentError
from dump_activations.storage.formats import npz, pt, safetensors
from dump_activations.storage.formats.layout import Format

FORMATS: dict[str, Format] = {
    each.suffix: each for each in (safetensors.FORMAT, pt.FORMAT, npz.FORMAT)
}


def format_of(path: Path, dtypes: Iterable[str] = ()) -> Format:
    """Return the format that a file's suffix selects, or raise InvalidArgumentError."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        *others, last = FORMATS
        raise InvalidArgumentError(
            f"{path}: the suffix has to be {', '.join(others)} or {last}, which selects the format"
        )
    file_format = FORMATS[suffix]
    for dtype in dtypes:
        if dtype not in file_format.dtypes:
            raise InvalidArgumentError(
                f"{path}: {suffix} cannot hold {dtype} ({DTYPES[dtype].choice}); choose another "
                "dtype or suffix"
            )
    return file_format
