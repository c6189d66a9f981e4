"""The option `indices` as a file of step indices, which may be an earlier dump."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dump_activations.dataset.dataset import StepsDataset
from dump_activations.dataset.filters import RUN, STEPS
from dump_activations.dataset.sampling import Steps, step_indices
from dump_activations.dtypes import LABEL_PREFIX
from dump_activations.errors import (
    IndicesError,
    IndicesNotFoundError,
    check_ordinary,
    note,
    option,
    warn,
)
from dump_activations.pipeline.options import Options
from dump_activations.progress import Count, Phase, begin, counted
from dump_activations.remote import input_path
from dump_activations.remote.mirror import fetch_whole
from dump_activations.storage.formats.registry import FORMATS
from dump_activations.storage.reading.dump_files import DumpFiles, find_shards, inspect_dump
from dump_activations.storage.reading.inspection import Inspection

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


def read_step_indices(path: Path, dataset: StepsDataset, progress: Count | None = None) -> Steps:
    """Read step indices, int64 (n,), from a `.npy`, or `indices` of an `.npz` or a dump.

    They may be whole numbers of any dtype and shape, in C order. Where a dump is of another dataset
    than this, its rows are found by their labels. Without such labels that causes a warning.

    Raises:
        IndicesNotFoundError: there is no such file.
        IndicesError: there are no step indices in it, or their rows are not in the dataset.
        OutputError: it is not a whole file of its format.
        DatasetError: the rows are looked for, and one cannot be read.
    """
    is_dump = path.suffix.lower() in FORMATS
    try:
        path.stat()
    except OSError as error:
        if not is_dump or find_shards(path) is None:
            reason = "" if isinstance(error, FileNotFoundError) else f": {error.strerror}"
            raise IndicesNotFoundError(f"{path}: no such file of step indices{reason}") from None
    if not is_dump:
        check_ordinary(path, IndicesError)
        fetch_whole(path)
        return _steps_in(path, partial(_read_npy, path))
    dump = inspect_dump(path)
    tensors, metadata = dump.tensors, dump.metadata
    if _NAME not in tensors:
        raise IndicesError(f"{path}: no {_NAME!r} in it, only {', '.join(tensors) or 'nothing'}")
    layout = dataset.layout_sha256
    if metadata.get("dataset_layout_sha256", layout) == layout:
        return _read(dump, _NAME)
    other = (
        f"{path}: its indices are of another dataset, {metadata.get('dataset')}, or of "
        f"other shards than {dataset.path} has now"
    )
    steps = next((name for name in _STEPS if name in tensors), None)
    if steps is None or _RUN not in tensors:
        warn(f"{other}; with {option('labels', 'run_id,step_index')} its rows could be found here")
        return _read(dump, _NAME)
    note(f"{other}; its rows are found by their run_id and step_index")
    return dataset.locate(_read(dump, _RUN), _read(dump, steps), progress=progress)


def _read(dump: DumpFiles, name: str) -> Steps:
    """Read a tensor of integers from all files of a dump, int64 (n,)."""
    found = [_steps_in(file.path, partial(_stored, file, name)) for file in dump.files]
    return np.concatenate(found)


def _stored(file: Inspection, name: str) -> NDArray[Any]:
    tensor = file.tensors[name]
    array: NDArray[Any]
    fetch_whole(file.path)
    if file.path.suffix.lower() == ".npz":  # May be compressed, or of another byte order.
        with np.load(file.path, allow_pickle=False) as arrays:
            array = arrays[name]
    else:
        assert tensor.offset is not None
        dtype = np.dtype(tensor.dtype)
        count = tensor.nbytes // dtype.itemsize
        array = np.fromfile(file.path, dtype, count, offset=tensor.offset)
    return array


def _read_npy(path: Path) -> NDArray[Any]:
    # A mapping checks the header against the file's size before memory is allocated for it.
    array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    # Read numbers: a mapped file that is cut short would end the process.
    return np.load(path, allow_pickle=False) if array.dtype.kind in "iuf" else array


def _steps_in(path: Path, read: Callable[[], NDArray[Any]]) -> Steps:
    """Return the step indices in an array of any shape in a file."""
    try:
        steps = step_indices(read().reshape(-1))
    except IndicesError as error:
        raise IndicesError(f"{path}: {error.args[0]}") from None
    except Exception as error:  # NumPy raises almost anything on a damaged file.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise IndicesError(
            f"{path}: step indices cannot be read ({reason}); write them with numpy.save"
        ) from error
    if len(steps) == 0:
        raise IndicesError(f"{path}: it has no step indices")
    return steps
