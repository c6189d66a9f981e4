"""The Rust extension. Private: the Python modules around it are the interface."""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

__version__: str
"""The version of the package."""

@final
class Dataset:
    """A dataset directory whose shards' headers were read; no file is kept open."""

    def __new__(
        cls,
        path: str | PathLike[str],
        names: Sequence[str],
        read_layout: Callable[[Path, str], tuple[int, int | None, int | None, int | None]],
    ) -> Dataset: ...
    @property
    def path(self) -> Path: ...
    @property
    def rows(self) -> int: ...
    @property
    def descrs(self) -> list[str]: ...
    @property
    def shards(self) -> list[tuple[Path, int, int]]: ...
    def read_boards(
        self, indices: NDArray[np.int64], out: NDArray[np.uint8], cancel: Cancel | None = None
    ) -> None: ...
    def read_rows(self, indices: NDArray[np.int64], out: NDArray[np.uint8]) -> None: ...

@final
class Selection:
    """The boards and chosen fields of the rows of a dataset, (offset, bytes) per layout."""

    def __new__(
        cls, dataset: Dataset, fields: Sequence[Sequence[tuple[int, int]]]
    ) -> Selection: ...
    def read(
        self, indices: NDArray[np.int64], out: NDArray[np.uint8], cancel: Cancel | None = None
    ) -> None: ...
    def scan(
        self,
        rows: tuple[int, int],
        scratch: NDArray[np.uint8],
        boards: NDArray[np.uint8] | None,
        out: Sequence[NDArray[np.uint8]],
        cancel: Cancel | None = None,
    ) -> None: ...

@final
class StoredTensor:
    """A tensor in finished files, in equal parts of its rows; no file is kept open."""

    def __new__(
        cls,
        name: str,
        places: Sequence[tuple[str | PathLike[str], int, int]],
        parts: int,
        part_nbytes: int,
    ) -> StoredTensor: ...
    def read(
        self,
        parts: NDArray[np.int64],
        out: NDArray[np.uint8],
        *,
        threads: int | None,
        cancel: Cancel | None = None,
    ) -> None: ...

@final
class Cancel:
    """Tells a read on another thread to end. It stays asked."""

    def __new__(cls) -> Cancel: ...
    def ask(self) -> None: ...
    def is_asked(self) -> bool: ...

def shuffle_tail(population: int, state: int, increment: int, out: NDArray[np.int64]) -> None: ...
def permutation(state: int, increment: int, out: NDArray[np.int64]) -> None: ...
def combine_crc32(first: int, second: int, second_len: int) -> int: ...
def write_span(
    fd: int, direct_fd: int | None, offset: int, data: NDArray[np.uint8], dtype: str
) -> tuple[int, int, int]: ...
def digest_span(fd: int, offset: int, nbytes: int, dtype: str) -> tuple[int, int, int]: ...
def measure(
    data: NDArray[np.uint8], dtype: str, run: int, records: NDArray[np.float64]
) -> None: ...
def supports_direct(fd: int) -> bool: ...
def reserve(fd: int, size: int) -> bool: ...
