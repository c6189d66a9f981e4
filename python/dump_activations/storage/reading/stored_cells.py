"""Shuffled cells of finished files, read ahead: the next window, and the next batch to a GPU."""

import math
import threading
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dump_activations import _rust
from dump_activations.dtypes import CELLS, READABLE_DTYPES
from dump_activations.errors import DeviceError, InvalidArgumentError, option
from dump_activations.storage.formats.layout import Contents
from dump_activations.storage.reading.cells import (
    CellOrder,
    Cells,
    KeyedCells,
    Values,
    rows_and_cells,
)
from dump_activations.storage.reading.dump_files import DumpFiles
from dump_activations.storage.reading.keys import Key, Part

# The values of a window's cells by key, (M, D), and the cells, int64 (M,).
_Window = tuple[dict[str, Tensor], NDArray[np.int64]]

# Keys with a value per pair of cells, whose first axis is attention heads.
_OF_PAIRS = frozenset({"attn_scores", "attn_pattern"})


class CellValues(NamedTuple):
    """The values of a key's cells: the layer's part of rows, D, and bytes per cell."""

    part: Part
    dtype: str
    width: int
    nbytes: int


def find_cells(key: Key, layer: int | None) -> CellValues:
    """Find the values of a key's cells; InvalidArgumentError if it has no axis of cells."""
    if key.layers and layer is None:
        raise InvalidArgumentError(
            f"{key.name} has layers {', '.join(map(str, key.layers))}; choose one by "
            f"{option('layer')}"
        )
    key = key if layer is None else key.layer(layer)
    [part] = key.parts
    has_cells = key.of_boards and key.value[:1] == (CELLS,) and 0 not in key.value
    if not has_cells or key.name.partition(".")[0] in _OF_PAIRS:
        raise InvalidArgumentError(f"{key.name} has no axis of cells")
    width = math.prod(key.value[1:])
    return CellValues(part, key.dtype, width, width * READABLE_DTYPES[key.dtype].nbytes)


class StoredCells(Cells[Values]):
    """Cells of files, whose values lie where `values` says by key, on a device."""

    def __init__(
        self,
        order: CellOrder,
        files: DumpFiles,
        values: Mapping[str, CellValues],
        device: str | torch.device | None,
        **loop: Any,
    ) -> None:
        identities = [
            file.metadata.get("fingerprint") or repr(Contents(file.tensors, file.metadata))
            for file in files.files
        ]
        super().__init__(order, " ".join(identities), **loop)
        self._files = files
        self._values = values
        self._device = _device(device)
        self._memory = RecycledMemory()

    def _read(self, order: CellOrder, batches: Sequence[int]) -> Generator[KeyedCells, None, None]:
        on_host = self._read_windows(order, order.windows(batches))
        return _on_device(on_host, self._device) if self._device.type == "cuda" else on_host

    def _read_windows(
        self, order: CellOrder, windows: Iterator[tuple[int, list[int]]]
    ) -> Generator[KeyedCells, None, None]:
        """Read each window while batches of the window before it are taken."""
        cancel = _rust.Cancel()
        reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cells")

        def read(window: int, batches: list[int]) -> _Window:
            cells = order.read(window, batches)
            values = {name: self._new(name, len(cells), of) for name, of in self._values.items()}
            for name, of in self._values.items():
                out = values[name].view(torch.uint8).numpy()
                self._files.read(of.part, cells, out, per_row=CELLS, cancel=cancel)
            return values, cells

        def start() -> Future[_Window] | None:
            window, batches = next(windows, (0, []))
            if not batches:
                return None
            try:
                return reader.submit(read, window, batches)
            except RuntimeError:  # The program ends, and no thread can start.
                if threading.current_thread().daemon:
                    return None  # The interpreter would end this thread inside of the read.
                done: Future[_Window] = Future()
                done.set_result(read(window, batches))
                return done

        try:
            ahead = start()
            while ahead is not None:
                values, cells = ahead.result()
                ahead = start()
                for first in range(0, len(cells), order.batch_size):
                    if threading.current_thread().daemon and not threading.main_thread().is_alive():
                        return  # The interpreter would end this thread inside of a call.
                    batch = slice(first, first + order.batch_size)
                    rows_B, cells_B = rows_and_cells(cells[batch])
                    yield {name: of[batch] for name, of in values.items()}, rows_B, cells_B
        finally:
            cancel.ask()
            reader.shutdown(wait=True, cancel_futures=True)

    def _new(self, name: str, cells: int, of: CellValues) -> Tensor:
        """Return memory for values, (cells, D), which is pinned if a GPU takes it."""
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                memory = torch.empty(
                    (cells * of.nbytes,), dtype=torch.uint8, device="cpu", pin_memory=True
                )
        else:
            memory = self._memory.take(name, cells * of.nbytes)
        return memory.view(getattr(torch, of.dtype)).view(cells, of.width)


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
    try:
        torch.cuda.init()
    except RuntimeError as error:  # Such as in a process that was forked from one that used CUDA.
        reason = str(error).partition(".")[0]
        raise DeviceError(
            f"{option('device', str(device))}: {reason}; start workers with spawn, or take cells "
            "on the CPU there"
        ) from error
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
