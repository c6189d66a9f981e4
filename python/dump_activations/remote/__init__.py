"""Datasets and dumps in buckets, on web servers and on the Hugging Face Hub, as local files."""

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import numpy as np

from dump_activations.errors import DatasetNotFoundError, OutputError, is_url, locate
from dump_activations.remote.mirror import BLOCK_NBYTES, fetch, requests_for, view_of

_DATASET_NAMES = ("steps-*.npy", "steps.npy", "metadata.db", "metadata.db-*")


def local_dataset(url: str) -> Path:
    """Return a local directory that mirrors a dataset's; only the shards' headers are read.

    Raises:
        DatasetNotFoundError: no shard is in it.
        RemoteError: the server refuses or does not answer, or the cache cannot be written.
        InvalidArgumentError: no store serves the URL.
    """
    from dump_activations.remote.stores import Location

    location = Location.of(url)
    files = location.list(lambda name: any(fnmatchcase(name, each) for each in _DATASET_NAMES))
    if not any(file.name.endswith(".npy") for file in files):
        raise DatasetNotFoundError(f"{location.url}: no steps-*.npy and no steps.npy in it")
    view = view_of(location, files)
    shards = [view / file.name for file in files if file.name.endswith(".npy")]
    for known in (BLOCK_NBYTES, None):
        # The first block holds the length of the header.
        stops = [known or header_nbytes(path) for path in shards]
        zero = np.zeros(1, np.int64)
        heads = {path: (zero, np.array([stop])) for path, stop in zip(shards, stops, strict=True)}
        fetch(requests_for(heads))
    return view


def header_nbytes(path: Path) -> int:
    """Return where a .npy header ends. NumPy's format: a length of 2 bytes, from 2.0 on of 4."""
    with path.open("rb") as file:
        start = file.read(12)
    width = 2 if start[6:7] <= b"\1" else 4
    return 8 + width + int.from_bytes(start[8 : 8 + width], "little")


def input_path(path: str | os.PathLike[str], name: str = "") -> Path:
    """Return the absolute path of an input file: of its local copy, where a URL is given.

    For a dump in shards that is the name of the whole, next to which the shards are.

    Args:
        path: the path, or the URL of a file or of a dump in shards.
        name: the option it was given for; errors name it.

    Raises:
        InvalidArgumentError: the path is empty, or no store serves the URL.
        OutputError: nothing is at the URL.
        RemoteError: the server refuses or does not answer, or the cache cannot be written.
    """
    if not is_url(path):
        return locate(path, name)
    from dump_activations.remote.stores import Location

    parent, _, file = os.fspath(path).rstrip("/").rpartition("/")
    location = Location.of(parent)
    stem, suffix = PurePosixPath(file).stem, PurePosixPath(file).suffix
    shard = re.compile(rf"{re.escape(stem)}-[0-9]{{5}}-of-[0-9]{{5}}{re.escape(suffix)}")
    found = location.head(file)
    files = [found] if found else location.list(lambda each: shard.fullmatch(each) is not None)
    if not files:
        raise OutputError(f"{location.url}/{file}: no such file, and no shards of it")
    return view_of(location, files) / file
