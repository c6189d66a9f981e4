"""Lists of global step indices: what callers may give, as the dataset reads it."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dump_activations.errors import IndicesError, IndicesNotFoundError
from dump_activations.paths import check_ordinary

# Below it no two whole numbers are the same float64.
_FLOAT_EXACT = 2.0**53


def load_indices(path: str | os.PathLike[str]) -> NDArray[np.int64]:
    """Read step indices, int64 (n,), from a `.npy` of whole numbers of any shape, in C order.

    Raises:
        IndicesNotFoundError: there is no such file.
        IndicesError: the file is no such array, or has no entries.
    """
    check_ordinary(Path(path), IndicesError)
    try:
        # A mapping checks the header against the file's size before any memory is taken for it.
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
        if array.dtype.kind in "iuf":
            array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise IndicesNotFoundError(f"{os.fspath(path)}: no such file of step indices") from error
    except Exception as error:  # NumPy raises almost anything on a damaged file.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise IndicesError(
            f"{os.fspath(path)}: not a readable .npy of step indices ({reason});"
            " write one with numpy.save"
        ) from error
    if array.size == 0:
        raise IndicesError(f"{os.fspath(path)}: no step indices in it")
    try:
        return step_indices(array.reshape(-1))
    except IndicesError as error:
        raise IndicesError(f"{os.fspath(path)}: {error.args[0]}") from None


def step_indices(indices: ArrayLike) -> NDArray[np.int64]:
    """Check that `indices` are a list of whole numbers; give them as contiguous native int64."""
    array = np.asarray(indices)
    if array.ndim != 1:
        raise IndicesError(f"step indices must be one-dimensional, not of the shape {array.shape}")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind == "f" and (np.abs(array) < _FLOAT_EXACT).all():
        array = array.astype(np.int64) if (array == np.floor(array)).all() else array
    if array.dtype.kind not in "iu":
        raise IndicesError(f"step indices must be integers, not {array.dtype}")
    if array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        raise IndicesError(f"step index {array.max()} does not fit into int64")
    return np.require(array, np.int64, ["C", "ALIGNED"])
