"""Reads a finished file back: shuffled cells and rows, against NumPy, safetensors and the disk.

A cell is 512 values in fp16, 1 KB. The file is cached, except where a name has "cold". Every
contender has all cores, and NumPy uses one.

Shape letters: N boards in the file, L layers, S cells (16), D width of a cell.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from limits import drop_from_cache, warm
from measure import Figure, Section, compare, timed
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
        """Take from the whole array in memory, as a shuffle without a window does."""
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
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "cells": (cells, partial(_exhaust, shuffled)),
        "cells, 64 MB windows": (cells, partial(_exhaust, in_windows)),
        "one layer of a stacked file": _layer_of(stacked),
        "one layer of a split file": _layer_of(split),
        "np.take in memory": (32 * _BATCH, take),
        "NumPy, 64 MB windows": (cells, take_windows),
        "DataLoader over a memory map": (_FEW, loader),
        "safe_open slices": (_FEW // 8, slices),
    }
    rounds = compare(
        {name: lambda n=n, run=run: n / 1e6 / timed(run) for name, (n, run) in ways.items()},
        rounds=setting.rounds,
    )
    cold = compare(
        {
            "cold, cells": lambda: _cold_speed(whole, partial(_exhaust, shuffled)),
            "cold, raw": lambda: _cold_speed(whole, partial(warm, whole)),
        },
        rounds=setting.rounds,
    )
    return Section(
        "Reading",
        f"{_NBYTES >> 20} MB of cells of {_WIDTH} fp16 values, batches of {_BATCH}",
        [
            Figure.of("cells", rounds["cells"], "M cells/s", at_least=3),
            *rounds.figures("M cells/s", *[name for name in ways if name != "cells"]),
            rounds.ratio("cells", "np.take in memory", at_least=2.5),
            *cold.figures("GB/s"),
            cold.ratio("cold, cells", "cold, raw", at_least=0.8),
        ],
    )


def _write(directory: Path) -> list[Path]:
    """Write a file of one key, and files of a key with layers, stacked and split."""
    hidden_NSD = torch.randn(_BOARDS, CELLS, _WIDTH, dtype=torch.float32).half()
    few_NLSD = hidden_NSD.view(-1, _LAYERS, CELLS, _WIDTH)
    layers = {f"resid.{layer}": few_NLSD[:, layer].contiguous() for layer in range(_LAYERS)}
    metadata = {"layers": ",".join(map(str, range(_LAYERS)))}
    whole, stacked, split = (directory / f"{name}.safetensors" for name in ("a", "b", "c"))
    save_file({"resid": hidden_NSD}, whole)
    save_file({"resid": few_NLSD}, stacked, metadata)
    save_file(layers, split, metadata)
    return [whole, stacked, split]


def _memmap(path: Path) -> np.memmap:
    """Map a file's cells, (C, D). While it lives the page cache cannot be emptied of them."""
    [tensor] = inspect(path).tensors.values()
    mapped_NSD = np.memmap(path, np.float16, "c", offset=tensor.offset, shape=tensor.shape)
    return mapped_NSD.reshape(-1, _WIDTH)


def _layer_of(path: Path) -> tuple[int, Callable[[], object]]:
    acts = ActivationsFile(path)
    of_layer = acts.cells("resid", 1, window=_WINDOW)
    return len(acts) * CELLS, partial(_exhaust, of_layer)


def _batches(order: np.ndarray) -> Iterable[np.ndarray]:
    return (order[first : first + _BATCH] for first in range(0, len(order), _BATCH))


def _exhaust(batches: Iterable[object]) -> None:
    for _ in batches:
        pass


def _cold_speed(path: Path, read: Callable[[], object]) -> float:
    """GB per second of a read of a file that the page cache does not hold."""
    drop_from_cache(path)
    return _NBYTES / 1e9 / timed(read)
