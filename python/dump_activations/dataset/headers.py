"""Dtypes of shards: NumPy turns the `descr` text of a header into the dtype of a row.

The extension cuts the text out of each header and calls `read_layout` once per distinct text.
"""

import ast
from pathlib import Path

import numpy as np

from dump_activations.dtypes import CELLS
from dump_activations.errors import DatasetError

# Rows of datasets have some 50 bytes. All bytes between the board and its mask are read with them.
_MAX_ITEMSIZE = 1 << 20
# Characters of a hostile text, and field names, that an error shows.
_SHOWN = 200
_NAMES_SHOWN = 20

_BOARD_FIELDS = {
    "board": np.dtype("<u8"),
    "tile_65536_mask": np.dtype("<u2"),
    "exps": np.dtype((np.uint8, (CELLS,))),
}


def row_dtype(path: Path, descr: str) -> np.dtype[np.void]:
    """Return the dtype of a shard's rows from the text in its header, padding included.

    Raises:
        DatasetError: NumPy refuses it, or rows are not structured, too large or Python objects.
    """
    try:
        dtype = np.lib.format.descr_to_dtype(ast.literal_eval(descr))
        "".join(dtype.names or ()).encode()  # Messages can then show the names.
    except Exception as error:  # NumPy raises almost anything on a damaged text.
        reason = str(error).partition("\n")[0][:_SHOWN] or type(error).__name__
        raise DatasetError(
            f"{path}: NumPy refuses its dtype ({reason}); write the shard with numpy.save"
        ) from error
    if dtype.hasobject:
        raise DatasetError(
            f"{path}: its rows hold pickled Python objects, which are never loaded; "
            "save plain numbers"
        )
    if dtype.names is None:
        raise DatasetError(f"{path}: its rows must have named fields; got {str(dtype)[:_SHOWN]}")
    if dtype.itemsize > _MAX_ITEMSIZE:
        raise DatasetError(
            f"{path}: its rows must have at most {_MAX_ITEMSIZE} bytes; got {dtype.itemsize}"
        )
    return dtype


def read_layout(path: Path, descr: str) -> tuple[int, int | None, int | None, int | None]:
    """Return the bytes of a row and the offsets of `board`, `tile_65536_mask` and `exps`.

    None stands for a field that rows lack; `board` wins over `exps`.

    Raises:
        DatasetError: as `row_dtype`, or rows have no board, or have it in another dtype.
    """
    row = row_dtype(path, descr)
    fields = {name: row.fields[name] for name in row.names or () if row.fields}
    names = ["board", "tile_65536_mask"] if "board" in fields else ["exps"]
    found = {name: fields[name] for name in names if name in fields}
    if not found:
        shown = [repr(name[:_SHOWN]) for name in [*fields][:_NAMES_SHOWN]]
        raise DatasetError(
            f"{path}: its rows must have 'board' or 'exps'; got {', '.join(shown) or 'no fields'}"
        )
    for name, (dtype, *_) in found.items():
        if dtype != _BOARD_FIELDS[name]:
            raise DatasetError(
                f"{path}: field {name!r} must be little-endian {_BOARD_FIELDS[name]}; "
                f"got {str(dtype)[:_SHOWN]}; convert it and save the shard again"
            )
    board, mask, exps = (found[name][1] if name in found else None for name in _BOARD_FIELDS)
    return row.itemsize, board, mask, exps
