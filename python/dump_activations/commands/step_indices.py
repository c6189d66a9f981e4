"""The option `indices` of the command: a file of step indices, which may be an earlier dump."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dump_activations.errors import IndicesError, IndicesNotFoundError, warn
from dump_activations.pool.indices import load_indices, step_indices
from dump_activations.storage.formats.registry import FORMATS
from dump_activations.storage.reading.inspection import inspect

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from dump_activations.pool.dataset import StepsDataset
    from dump_activations.storage.formats.contents import StoredTensor

_NAME = "indices"


def read_step_indices(path: Path, pool: StepsDataset) -> NDArray[np.int64]:
    """Read step indices, int64 (n,), from a `.npy`, or `indices` of an `.npz` or a dump.

    Warns where a dump is of another pool than this.

    Raises:
        IndicesNotFoundError: there is no such file.
        IndicesError: there are no step indices in it.
        OutputError: it is no whole file of its format.
    """
    if path.suffix.lower() not in FORMATS:
        return load_indices(path)
    if not path.exists():
        raise IndicesNotFoundError(f"{path}: no such file of step indices")
    contents = inspect(path).contents
    tensors = {tensor.name: tensor for tensor in contents.tensors}
    if _NAME not in tensors:
        raise IndicesError(f"{path}: no {_NAME!r} in it, only {', '.join(tensors) or 'nothing'}")
    if contents.metadata.get("dataset_sha256", pool.sha256) != pool.sha256:
        warn(
            f"{path}: its indices are of another pool, {contents.metadata.get('dataset')}, or of "
            f"other shards than {pool.path} has now"
        )
    try:
        return step_indices(_read(path, tensors[_NAME]).reshape(-1))
    except (IndicesError, OSError, ValueError, TypeError) as error:
        raise IndicesError(f"{path}: {error}") from None


def _read(path: Path, tensor: StoredTensor) -> NDArray[Any]:
    if path.suffix.lower() == ".npz":  # They may be compressed, or of another byte order.
        with np.load(path, allow_pickle=False) as arrays:
            array: NDArray[Any] = arrays[_NAME]
        return array
    assert tensor.offset is not None
    dtype = np.dtype(tensor.dtype)
    return np.fromfile(path, dtype, tensor.nbytes // dtype.itemsize, offset=tensor.offset)
