"""Reads cells ahead: the next window while batches of one are taken, the next batch to the device.

Shape letters: B cells in a batch, D width of a cell's value.
"""

import threading
import weakref
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dump_activations import _rust
from dump_activations.dtypes import CELLS
from dump_activations.storage.reading.cell_order import CellOrder, CellValues
from dump_activations.storage.reading.dump_files import DumpFiles

KeyedCells = tuple[dict[str, Tensor], Tensor, Tensor]
"""Values by key, rows and cells, as in a `CellBatch`."""


class CellFeed:
    """Reads batches of `batch_size` cells, whose values lie where `values` says, to a device."""

    def __init__(
        self,
        files: DumpFiles,
        values: Mapping[str, CellValues],
        batch_size: int,
        device: torch.device,
    ) -> None:
        self._files = files
        self._values = values
        self._batch_size = batch_size
        self._device = device
        self._memory = RecycledMemory()

    def read(self, order: CellOrder, batches: range) -> Generator[KeyedCells, None, None]:
        """Yield batches, by their numbers in the order."""
        on_host = self._read_windows(order, order.windows(batches))
        return _on_device(on_host, self._device) if self._device.type == "cuda" else on_host

    def _read_windows(
        self, order: CellOrder, windows: Iterator[tuple[int, range]]
    ) -> Generator[KeyedCells, None, None]:
        cancel = _rust.Cancel()
        reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cells")

        def read(window: int, batches: range, memory: Mapping[str, Tensor]) -> NDArray[np.int64]:
            numbers = order.read(window, batches)
            for name, values in self._values.items():
                out = memory[name][: len(numbers) * values.nbytes].numpy()
                out = out.reshape(len(numbers), -1)
                self._files.read(values.part, numbers, out, per_row=CELLS, cancel=cancel)
            return numbers

        def start() -> tuple[dict[str, Tensor], Future[NDArray[np.int64]]] | None:
            window, batches = next(windows, (0, range(0)))
            if not batches:
                return None
            most = len(batches) * self._batch_size
            memory = {name: self._new(name, most * of.nbytes) for name, of in self._values.items()}
            try:
                return memory, reader.submit(read, window, batches, memory)
            except RuntimeError:  # The main thread has ended, and no thread can start.
                if threading.current_thread().daemon:
                    return None  # The interpreter would end this thread inside of the read.
                numbers: Future[NDArray[np.int64]] = Future()
                numbers.set_result(read(window, batches, memory))
                return memory, numbers

        try:
            ahead = start()
            while ahead is not None:
                memory, numbers = ahead[0], torch.from_numpy(ahead[1].result())
                ahead = start()
                for first in range(0, len(numbers), self._batch_size):
                    if threading.current_thread().daemon and not threading.main_thread().is_alive():
                        return  # The interpreter would end this thread inside of a call.
                    yield self._cut(memory, numbers, first)
        finally:
            cancel.ask()
            reader.shutdown(wait=True, cancel_futures=True)

    def _new(self, name: str, nbytes: int) -> Tensor:
        if self._device.type != "cuda":
            return self._memory.take(name, nbytes)
        with torch.cuda.device(self._device):
            return torch.empty((nbytes,), dtype=torch.uint8, device="cpu", pin_memory=True)

    def _cut(self, memory: Mapping[str, Tensor], numbers: Tensor, first: int) -> KeyedCells:
        numbers = numbers[first : first + self._batch_size]
        values = {}
        for name, each in self._values.items():
            start, nbytes = first * each.nbytes, len(numbers) * each.nbytes
            cut = memory[name][start : start + nbytes].view(getattr(torch, each.dtype))
            values[name] = cut.view(len(numbers), each.width)
        rows = numbers // CELLS
        return values, rows, numbers - rows * CELLS


class RecycledMemory:
    """Blocks of memory by name, used again when no tensor holds them.

    Fresh pages cost as much as reading into them.
    """

    def __init__(self) -> None:
        self._free: dict[str, list[NDArray[np.uint8]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_free": {}}

    def take(self, name: str, nbytes: int) -> Tensor:
        """Return a tensor of bytes, uint8 (nbytes,); it and its views hold the block."""
        free = self._free.setdefault(name, [])
        block = free.pop() if free else np.empty(0, np.uint8)
        if block.nbytes < nbytes:
            block = np.empty(nbytes, np.uint8)
        lease = block[:nbytes]
        weakref.finalize(lease, free.append, block).atexit = False
        return torch.from_numpy(lease)


def _on_device(
    batches: Generator[KeyedCells, None, None], device: torch.device
) -> Generator[KeyedCells, None, None]:
    """Yield batches on a CUDA device, for the caller's current stream.

    The next batch is copied from pinned memory, on a stream of its own, while one is used.
    """
    stream = torch.cuda.Stream(device)
    ahead = None
    try:
        for batch in batches:
            before, ahead = ahead, _start_copy(batch, device, stream)
            if before is not None:
                yield _finish_copy(*before, device)
        if ahead is not None:
            yield _finish_copy(*ahead, device)
    finally:
        if ahead is not None:  # Its memory is the caller's stream's to use again.
            _finish_copy(*ahead, device)
        batches.close()


def _start_copy(
    batch: KeyedCells, device: torch.device, stream: torch.cuda.Stream
) -> tuple[KeyedCells, torch.cuda.Event]:
    """Queue a batch's copy, behind work that the caller's stream still has on that memory."""
    on_host, rows, cells = batch
    with torch.cuda.device(device):
        values = {
            name: torch.empty(host.shape, dtype=host.dtype, device=device)
            for name, host in on_host.items()
        }
        stream.wait_stream(torch.cuda.current_stream(device))
        copied = torch.cuda.Event()
        with torch.cuda.stream(stream):
            for name, host in on_host.items():
                values[name].copy_(host, non_blocking=True)
            copied.record(stream)
    return (values, rows, cells), copied


def _finish_copy(batch: KeyedCells, copied: torch.cuda.Event, device: torch.device) -> KeyedCells:
    """Let the caller's stream wait for the copy."""
    torch.cuda.current_stream(device).wait_event(copied)
    return batch
