"""Cells of all boards in a shuffled order, a batch at a time.

Shape letters: B cells in a batch, D width of a cell's value.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dump_activations.dtypes import CELLS
from dump_activations.errors import DeviceError, InvalidArgumentError, option
from dump_activations.storage.reading.cell_feed import CellFeed
from dump_activations.storage.reading.cell_order import CellOrder, CellValues
from dump_activations.storage.reading.dump_files import DumpFiles
from dump_activations.storage.reading.epochs import Epochs
from dump_activations.storage.reading.inspection import Inspection


class CellBatch(NamedTuple):
    """Cells of several boards.

    Attributes:
        values: (B, D) as stored; a dict of such tensors where several keys are read.
        rows: the board of the file that each cell is of, int64 (B,), on the host.
        cells: the cell of that board, int64 (B,), on the host.
    """

    values: Tensor | dict[str, Tensor]
    rows: Tensor
    cells: Tensor


class Cells(IterableDataset[CellBatch]):
    """Batches of cells, as `ActivationsFile.cells` returns them: one epoch per loop.

    Every `iter()` begins the next epoch, of exactly `len()` batches; leaving a loop early ends its
    epoch. After `load_state_dict` the first loop is the rest of that epoch. Workers of a
    `DataLoader`, which needs `batch_size=None`, share the batches in the same order.
    """

    def __init__(
        self,
        files: DumpFiles,
        values: Mapping[str, CellValues],
        *,
        single: bool,
        batch_size: int,
        seed: int,
        epoch: int,
        rank: int,
        world_size: int,
        window: int,
        device: str | torch.device | None,
        drop_last: bool,
    ) -> None:
        for name, number in {"seed": seed, "epoch": epoch, "rank": rank}.items():
            if number < 0:
                raise InvalidArgumentError(f"{option(name)} must be at least 0; got {number}")
        if batch_size < 1:
            raise InvalidArgumentError(
                f"{option('batch_size')} must be at least 1; got {batch_size}"
            )
        if rank >= world_size:
            raise InvalidArgumentError(
                f"{option('rank')} must be less than {option('world_size', world_size)}; got {rank}"
            )
        batch_nbytes = batch_size * sum(each.nbytes for each in values.values())
        if window < batch_nbytes:
            raise InvalidArgumentError(
                f"{option('window')} must be at least the {batch_nbytes} bytes of a batch; got "
                f"{window}; take a larger window or a smaller {option('batch_size')}"
            )
        self._cells = files.boards * CELLS
        self._identity = f"{zlib.crc32(' '.join(map(_identity, files.files)).encode()):08x}"
        self._feed = CellFeed(files, values, batch_size, _device(device))
        self._single = single
        self._batch_size = batch_size
        self._window_batches = window // batch_nbytes
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._drop_last = drop_last
        self._epochs = Epochs(epoch)

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        return len(self._batches(0, self._rank, self._world_size))

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch in the process that iterates, and the order's data.

        After the last batch of an epoch it is the beginning of the next one. `batch` counts the
        batches of all ranks, so that another `world_size` can resume.

        Raises:
            InvalidArgumentError: Workers of a `DataLoader` iterate: each has a position of its own.
        """
        return self._state(*self._epochs.position())

    def _state(self, epoch: int, batch: int) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "epoch": epoch,
            "batch": batch,
            "batch_size": self._batch_size,
            "window": self._window_batches,
            "cells": self._cells,
            "file": self._identity,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next loop begin at a state's position, with its seed and window.

        Raises:
            InvalidArgumentError: It is not a state of cells, or of another file or batch size.
        """
        ours = self._state(0, 0)
        least = {**dict.fromkeys(ours, 0), "window": 1}
        if state.keys() != ours.keys() or not all(
            isinstance(value, int) and value >= least[name]
            for name, value in state.items()
            if name != "file"
        ):
            raise InvalidArgumentError(
                f"{option('state')} must have {', '.join(ours)}, numbers from 0 on; got "
                f"{dict(state)}"
            )
        for name in ("batch_size", "cells", "file"):
            if state[name] != ours[name]:
                raise InvalidArgumentError(
                    f"{option('state')} must be of the same {name}, {ours[name]}; got {state[name]}"
                )
        self._seed, self._window_batches = state["seed"], state["window"]
        self._epochs.load(state["epoch"], state["batch"])

    def __iter__(self) -> Iterator[CellBatch]:
        """Yield the batches of the next epoch, or the rest of a loaded one.

        Raises:
            OutputError: A row cannot be read, or a file was changed.
        """
        epoch, start = self._epochs.begin()
        return self._iterate(epoch, start)

    def _iterate(self, epoch: int, start: int) -> Iterator[CellBatch]:
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        step = self._world_size * workers
        batches = self._batches(start, self._rank + self._world_size * number, step)
        if not batches:
            self._epochs.move(epoch + 1, 0)
        order = CellOrder(self._cells, self._batch_size, self._window_batches, self._seed, epoch)
        feed = self._feed.read(order, batches)
        try:
            for taken, (values, rows, cells) in enumerate(feed, start=1):
                is_last = taken == len(batches)
                self._epochs.move(*((epoch + 1, 0) if is_last else (epoch, start + taken * step)))
                [value] = values.values() if self._single else [values]
                yield CellBatch(value, rows, cells)
        finally:
            feed.close()

    def _batches(self, start: int, rank: int, step: int) -> range:
        """Return the numbers of every `step`-th batch of an epoch, for one reader."""
        stop = -(-self._cells // self._batch_size)
        if self._drop_last:  # equally many whole batches for each rank
            whole = self._cells // self._batch_size
            stop = start + (whole - start) // self._world_size * self._world_size
        return range(start + rank, stop, step)


def _identity(file: Inspection) -> str:
    """Return a text that tells a file from others, for a state."""
    return file.contents.metadata.get("fingerprint") or repr(file.contents)


def _device(device: str | torch.device | None) -> torch.device:
    try:
        found = torch.device(device or "cpu")
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"{option('device')} must be cpu or cuda; got {str(device)!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"{option('device', str(device))}: this machine has {torch.cuda.device_count()} CUDA "
            "devices"
        )
    return found
