"""Cells of all boards in a shuffled order, a batch at a time."""

from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dump_activations import _rust
from dump_activations.dtypes import CELLS
from dump_activations.errors import DeviceError, InvalidArgumentError, option
from dump_activations.storage.reading.cell_batch import CellBatch, KeyedCells
from dump_activations.storage.reading.cell_order import CellOrder, Stretch
from dump_activations.storage.reading.cell_values import CellValues
from dump_activations.storage.reading.device_feed import on_device
from dump_activations.storage.reading.host_memory import RecycledMemory
from dump_activations.storage.reading.tensor_files import TensorFiles


class Cells(IterableDataset[CellBatch]):
    """What `ActivationsFile.cells` returns: batches of cells, an epoch an iteration.

    An iteration begins where the one before it was left, or where `load_state_dict` says, and goes
    to the end of the epoch; the next begins the next epoch. Each worker of a `DataLoader`, which
    has to have `batch_size=None`, takes its share of the batches; the order stays the same. Which
    epoch it is only they know: without `persistent_workers=True` each is the first.
    """

    def __init__(
        self,
        files: TensorFiles,
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
                raise InvalidArgumentError(f"{option(name, number)}: at least 0 is wanted")
        if batch_size < 1:
            raise InvalidArgumentError(f"{option('batch_size', batch_size)}: no cells")
        if rank >= world_size:
            raise InvalidArgumentError(
                f"{option('rank', rank)}: ranks of {option('world_size', world_size)} are counted "
                "from 0"
            )
        batch_nbytes = batch_size * sum(each.nbytes for each in values.values())
        if window < batch_nbytes:
            raise InvalidArgumentError(
                f"{option('window', window)}: a batch has {batch_nbytes} bytes; take a larger "
                f"window or a smaller {option('batch_size')}"
            )
        self._files = files
        self._values = values
        self._single = single
        self._batch_size = batch_size
        self._window_batches = window // batch_nbytes
        self._rank = rank
        self._world_size = world_size
        self._device = _device(device)
        self._drop_last = drop_last
        self._memory = RecycledMemory()
        self._state = {"seed": seed, "epoch": epoch, "batch": 0}

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        return len(self._batches(self._order(), 0, self._rank, self._world_size))

    def state_dict(self) -> dict[str, int]:
        """Say where the next batch is: `seed`, `epoch`, and `batch`, those that all ranks had."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next iteration begin where a state says; the world size may be another.

        Raises:
            InvalidArgumentError: It is no state of cells.
        """
        if state.keys() != self._state.keys() or min(state.values()) < 0:
            names = ", ".join(self._state)
            raise InvalidArgumentError(f"{option('state', dict(state))}: {names} are wanted")
        self._state = {name: int(state[name]) for name in self._state}

    def __iter__(self) -> Iterator[CellBatch]:
        """Yield the rest of the epoch.

        Raises:
            OutputError: A row cannot be read, or a file was changed.
        """
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        world_size = self._world_size * workers
        order = self._order()
        batches = self._batches(
            order, self._state["batch"], self._rank + self._world_size * number, world_size
        )
        feed = self._feed(order, batches)
        if self._device.type == "cuda":
            feed = on_device(feed, self._device)
        try:
            for values, rows, cells in feed:
                self._state["batch"] += world_size
                [value] = values.values() if self._single else [values]
                yield CellBatch(value, rows, cells)
        finally:
            feed.close()
        self._state |= {"epoch": self._state["epoch"] + 1, "batch": 0}

    def _order(self) -> CellOrder:
        return CellOrder(
            self._files.boards * CELLS,
            self._batch_size,
            self._window_batches,
            self._state["seed"],
            self._state["epoch"],
        )

    def _batches(self, order: CellOrder, start: int, rank: int, world_size: int) -> range:
        stop = order.batches
        if self._drop_last:
            whole = order.cells // self._batch_size
            stop = start + (whole - start) // self._world_size * self._world_size
        return range(start + rank, stop, world_size)

    def _feed(self, order: CellOrder, batches: range) -> Generator[KeyedCells, None, None]:
        """Yield batches in host memory; while those of one window are taken the next is read."""

        def read(stretch: Stretch, memory: dict[str, Tensor]) -> NDArray[np.int64]:
            numbers = order.read(stretch)
            for name, values in self._values.items():
                out = memory[name][: len(numbers) * values.nbytes].numpy()
                values.read(self._files, numbers, out.reshape(len(numbers), -1), cancel)
            return numbers

        def start() -> tuple[dict[str, Tensor], Future[NDArray[np.int64]]] | None:
            stretch = next(stretches, None)
            if stretch is None:
                return None
            most = len(stretch.batches) * self._batch_size
            memory = {name: new(name, most * each.nbytes) for name, each in self._values.items()}
            return memory, reader.submit(read, stretch, memory)

        new = self._pinned if self._device.type == "cuda" else self._memory.take
        stretches = order.stretches(batches)
        cancel = _rust.Cancel()
        reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cells")
        try:
            ahead = start()
            while ahead is not None:
                memory, numbers = ahead[0], torch.from_numpy(ahead[1].result())
                ahead = start()
                for first in range(0, len(numbers), self._batch_size):
                    yield self._cut(memory, numbers, first)
        finally:
            cancel.ask()
            reader.shutdown(wait=True, cancel_futures=True)

    def _cut(self, memory: dict[str, Tensor], numbers: Tensor, first: int) -> KeyedCells:
        numbers = numbers[first : first + self._batch_size]
        values = {}
        for name, each in self._values.items():
            start, nbytes = first * each.nbytes, len(numbers) * each.nbytes
            cut = memory[name][start : start + nbytes].view(getattr(torch, each.dtype))
            values[name] = cut.view(len(numbers), each.width)
        rows = numbers // CELLS
        return KeyedCells(values, rows, numbers - rows * CELLS)

    def _pinned(self, _name: str, nbytes: int) -> Tensor:
        with torch.cuda.device(self._device):
            return torch.empty((nbytes,), dtype=torch.uint8, device="cpu", pin_memory=True)


def _device(device: str | torch.device | None) -> torch.device:
    text = option("device", str(device))
    try:
        found = torch.device(device or "cpu")
    except RuntimeError:  # no type of device at all
        raise InvalidArgumentError(f"{text}: neither cpu nor cuda") from None
    if found.type not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"{text}: neither cpu nor cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"{text}: there is no such CUDA device")
    return found
