"""Reads a finished file back: shuffled cells and rows, against NumPy, safetensors and the disk.

A cell is 512 values in fp16, 1 KB. The file is cached but where "cold" stands, and lies under
--directory. CPU only; every contender has all cores, and NumPy takes one. What other packages do is
measured by reading_others.py, in an environment of its own.

Shape letters: N boards in the file, L layers, S cells (16), D width of a cell.
"""

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measure import Figure, Section, alternate, ratios, timed
from safetensors import safe_open
from safetensors.torch import save_file
from setting import Setting
from torch.utils.data import DataLoader

from dump_activations import ActivationsFile
from dump_activations.dtypes import CELLS
from dump_activations.storage.reading.inspection import inspect

_WIDTH = 512
_NBYTES = 1 << 30
_BOARDS = _NBYTES // (CELLS * _WIDTH * 2)
_LAYERS = 4
_BATCH = 8192
_WINDOW = 64 << 20
# Cells of the contenders that are slow.
_FEW = 4 * _BATCH


def measure(setting: Setting) -> Section:
    """Take all cells of a file in a shuffled order, as an SAE is trained."""
    whole, stacked, split = _write(setting.scratch)
    acts = ActivationsFile(whole)
    shuffled, in_windows = acts.cells("resid"), acts.cells("resid", window=_WINDOW)
    values_CD = np.array(_memmap(whole))
    generator = np.random.default_rng(0)

    def take() -> None:
        """Draw from the whole array in memory, as a shuffle without a window does."""
        for rows in _batches(generator.permutation(len(values_CD))[: 32 * _BATCH]):
            np.take(values_CD, rows, axis=0)

    def take_windows() -> None:
        """Read a window, shuffle it, and hand out batches: one thread."""
        flat_CD = _memmap(whole)
        length = _WINDOW // (2 * _WIDTH)
        for first in range(0, len(flat_CD), length):
            window_CD = np.array(flat_CD[first : first + length])
            for rows in _batches(generator.permutation(len(window_CD))):
                np.take(window_CD, rows, axis=0)

    def slices() -> None:
        """Ask safetensors for a cell at a time."""
        with safe_open(whole, framework="pt") as file:
            hidden = file.get_slice("resid")
            for cell in generator.integers(0, len(values_CD), _FEW // 8):
                hidden[cell // CELLS : cell // CELLS + 1, cell % CELLS : cell % CELLS + 1]

    def loader() -> None:
        """Let a DataLoader index a memory map."""
        flat = torch.from_numpy(_memmap(whole))
        few = torch.utils.data.Subset(flat, generator.integers(0, len(flat), _FEW).tolist())
        for _ in DataLoader(few, batch_size=_BATCH):
            pass

    cells = len(values_CD)
    speeds = alternate(
        {
            "cells": lambda: cells / timed(partial(_exhaust, shuffled)),
            "cells, 64 MB windows": lambda: cells / timed(partial(_exhaust, in_windows)),
            "one layer of a stacked file": _layer_speed(stacked),
            "one layer of a split file": _layer_speed(split),
            "np.take in memory": lambda: 32 * _BATCH / timed(take),
            "NumPy, 64 MB windows": lambda: cells / timed(take_windows),
            "DataLoader over a memory map": lambda: _FEW / timed(loader),
            "safe_open slices": lambda: _FEW // 8 / timed(slices),
        },
        rounds=setting.rounds,
    )
    cold = alternate(
        {
            "cells": lambda: _cold(whole, lambda: _exhaust(shuffled)),
            "raw": lambda: _cold(whole, lambda: _read_raw(whole)),
        },
        rounds=setting.rounds,
    )
    at_least = {"cells": 3.0}
    return Section(
        "Reading",
        f"{_NBYTES >> 20} MB of cells of {_WIDTH} fp16 values, batches of {_BATCH}",
        [
            *(
                Figure.of(name, [v / 1e6 for v in values], "M cells/s", at_least=at_least.get(name))
                for name, values in speeds.items()
            ),
            Figure.of(
                "cells to np.take", ratios(speeds, "cells", "np.take in memory"), "x", at_least=2.5
            ),
            *(
                Figure.of(f"cold, {name}", [v / 1e9 for v in values], "GB/s")
                for name, values in cold.items()
            ),
            Figure.of("cold, cells to raw", ratios(cold, "cells", "raw"), "x", at_least=0.8),
        ],
    )


def _write(directory: Path) -> list[Path]:
    """Write a file of one key, and files of a key with layers, stacked and split."""
    hidden_NSD = torch.randn(_BOARDS, CELLS, _WIDTH, dtype=torch.float32).half()
    few_NLSD = hidden_NSD.view(-1, _LAYERS, CELLS, _WIDTH)
    layers = {f"resid.{layer}": few_NLSD[:, layer].contiguous() for layer in range(_LAYERS)}
    metadata = {"layers": ",".join(map(str, range(_LAYERS)))}
    paths = [directory / f"{name}.safetensors" for name in ("whole", "stacked", "split")]
    for path, tensors in zip(
        paths, ({"resid": hidden_NSD}, {"resid": few_NLSD}, layers), strict=True
    ):
        save_file(tensors, path, metadata if path != paths[0] else None)
    return paths


def _memmap(path: Path) -> np.memmap:
    """Map a file's cells, (C, D). While it lives the page cache cannot be emptied of them."""
    [tensor] = inspect(path).tensors.values()
    mapped_NSD = np.memmap(path, np.float16, "c", offset=tensor.offset, shape=tensor.shape)
    return mapped_NSD.reshape(-1, _WIDTH)


def _layer_speed(path: Path) -> Callable[[], float]:
    acts = ActivationsFile(path)
    of_layer = acts.cells("resid", 1, window=_WINDOW)
    return lambda: len(acts) * CELLS / timed(partial(_exhaust, of_layer))


def _batches(order: np.ndarray) -> Iterable[np.ndarray]:
    return (order[first : first + _BATCH] for first in range(0, len(order), _BATCH))


def _exhaust(batches: Iterable[object]) -> None:
    for _ in batches:
        pass


def _read_raw(path: Path) -> None:
    """Read a file from its start to its end."""
    buffer = bytearray(8 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _cold(path: Path, read: Callable[[], None]) -> float:
    """Bytes a second of a read of a file that the page cache does not hold."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        for _ in range(10):  # a page that another CPU has in hand is not dropped at once
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _NBYTES / timed(read)
