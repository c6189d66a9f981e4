"""The option `indices` as a file of step indices, which may be an earlier dump."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dump_activations.dataset.dataset import StepsDataset
from dump_activations.dataset.sampling import load_indices, step_indices
from dump_activations.dataset.scan import RUN, STEPS
from dump_activations.dtypes import LABEL_PREFIX
from dump_activations.errors import IndicesError, IndicesNotFoundError, note, option, warn
from dump_activations.options import Options
from dump_activations.paths import input_path
from dump_activations.remote.mirror import fetch_whole
from dump_activations.progress import Count, Phase, begin, counted
from dump_activations.storage.formats.registry import FORMATS
from dump_activations.storage.reading.inspection import Inspection, read_bytes
from dump_activations.storage.reading.whole import find_shards, inspect_dump

_NAME = "indices"
_RUN = LABEL_PREFIX + RUN
_STEPS = tuple(LABEL_PREFIX + name for name in STEPS)

_Options = TypeVar("_Options", bound=Options)


def indices_files(options: Options) -> list[Path]:
    """Return the file that the option names, if it names one."""
    given = options.indices
    return [input_path(given, _NAME)] if isinstance(given, str | os.PathLike) else []


def with_step_indices(
    dataset: str | os.PathLike[str] | StepsDataset, options: _Options
) -> tuple[str | os.PathLike[str] | StepsDataset, _Options]:
    """Read the file that the option names, if it names one, and open the dataset for that."""
    for path in indices_files(options):
        if not isinstance(dataset, StepsDataset):
            begin("opening the dataset")
            dataset = StepsDataset(dataset)
        looked_up = counted(Phase("looking up the indices", "rows"))
        options = replace(options, indices=read_step_indices(path, dataset, looked_up))
    return dataset, options


def read_step_indices(
    path: Path, dataset: StepsDataset, progress: Count | None = None
) -> NDArray[np.int64]:
    """Read step indices, int64 (n,), from a `.npy`, or `indices` of an `.npz` or a dump.

    Where a dump is of another dataset than this, its rows are found by what its labels say of them;
    without such labels that is cause for a warning.

    Raises:
        IndicesNotFoundError: there is no such file.
        IndicesError: there are no step indices in it, or their rows are not in the dataset.
        OutputError: it is not a whole file of its format.
        DatasetError: the rows are looked for, and one cannot be read.
    """
    if path.suffix.lower() not in FORMATS:
        fetch_whole(path)
        return load_indices(path)
    if not path.exists() and find_shards(path) is None:
        raise IndicesNotFoundError(f"{path}: no such file of step indices")
    dump = inspect_dump(path)
    contents = dump.contents
    tensors = {tensor.name: tensor for tensor in contents.tensors}
    if _NAME not in tensors:
        raise IndicesError(f"{path}: no {_NAME!r} in it, only {', '.join(tensors) or 'nothing'}")
    layout = dataset.layout_sha256
    if contents.metadata.get("dataset_layout_sha256", layout) == layout:
        return _read(dump, _NAME)
    other = (
        f"{path}: its indices are of another dataset, {contents.metadata.get('dataset')}, or of "
        f"other shards than {dataset.path} has now"
    )
    steps = next((name for name in _STEPS if name in tensors), None)
    if steps is None or _RUN not in tensors:
        warn(f"{other}; with {option('labels', 'run_id,step_index')} its rows could be found here")
        return _read(dump, _NAME)
    note(f"{other}; its rows are found by their run_id and step_index")
    run_ids, run_steps = _read(dump, _RUN), _read(dump, steps)
    return dataset.locate(run_ids, run_steps, progress=progress)


def _read(dump: Inspection, name: str) -> NDArray[np.int64]:
    """Read step indices, int64 (n,), of all files of a dump."""
    found = []
    for file in dump.files:
        tensor = file.tensor(name)
        try:
            if file.path.suffix.lower() == ".npz":  # May be compressed, or of another byte order.
                fetch_whole(file.path)
                with np.load(file.path, allow_pickle=False) as arrays:
                    array = arrays[name]
            else:
                assert tensor.offset is not None
                dtype = np.dtype(tensor.dtype)
                count = tensor.nbytes // dtype.itemsize
                array = np.empty(count, dtype)
                read_bytes(file, name, 0, array.view(np.uint8))
            found.append(step_indices(array.reshape(-1)))
        except (IndicesError, OSError, ValueError, TypeError) as error:
            raise IndicesError(f"{file.path}: {error}") from None
    return np.concatenate(found)
