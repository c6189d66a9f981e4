"""The file formats, by suffix. A new format is one module and one entry here."""

from collections.abc import Iterable
from pathlib import Path

from dump_activations.errors import InvalidArgumentError
from dump_activations.output import npz_format, pt_format, safetensors_format
from dump_activations.output.layout import Format

_ALL: tuple[Format, ...] = (safetensors_format.FORMAT, pt_format.FORMAT, npz_format.FORMAT)

FORMATS: dict[str, Format] = {file_format.suffix: file_format for file_format in _ALL}


def format_of(path: Path, dtypes: Iterable[str] = ()) -> Format:
    """The format that a file's suffix asks for.

    Raises:
        InvalidArgumentError: another suffix, or a format that cannot hold one of `dtypes`.
    """
    suffix = path.suffix
    if suffix not in FORMATS:
        *others, last = FORMATS
        raise InvalidArgumentError(
            f"{path}: the suffix has to be {', '.join(others)} or {last}, which selects the format"
        )
    file_format = FORMATS[suffix]
    for dtype in dtypes:
        if dtype in file_format.unsupported_dtypes:
            raise InvalidArgumentError(
                f"{path}: {suffix} cannot hold {dtype} (bf16); choose another dtype or suffix"
            )
    return file_format
