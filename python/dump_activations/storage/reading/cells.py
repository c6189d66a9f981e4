"""Shuffled cells in batches: their order, epochs, the position to resume from, and their values.

The order is normative: equally many cells, read with the same numbers, always come in the same one.
Cell c is cell c % 16 of board c // 16. `permutation(n, *key)` is
`numpy.random.default_rng(key).permutation(n)` of NumPy 2. A window is as many consecutive cells as
whole batches fit in its bytes; the cells left at the end are one more, shorter window. The windows
come in the order `permutation(whole windows, seed, epoch, 0)`, the short one last; the cells of
window w in the order `permutation(cells of it, seed, epoch, 1 + w)`. Batches are cut from that one
after the other. Where boards are shuffled first, board b above stands for board
`permutation(boards, seed, epoch, 0, 1)[b]`.

Shape letters: B cells in a batch, M cells read at once, D width of a cell's value.
"""

import math
import threading
import weakref
import zlib
from abc import abstractmethod
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, islice, repeat
from threading import Event
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dump_activations import _rust
from dump_activations.dtypes import CELLS, READABLE_DTYPES
from dump_activations.errors import DeviceError, InvalidArgumentError, option
from dump_activations.interrupts import closed_at_exit
from dump_activations.remote.mirror import fetch
from dump_activations.storage.formats.layout import Contents
from dump_activations.storage.reading.dump_files import DumpFiles
from dump_activations.storage.reading.keys import Key, Part

Values = TypeVar("Values", Tensor, dict[str, Tensor])

KeyedCells = tuple[dict[str, Tensor], Tensor, Tensor]
"""Values by key, rows and cells, as in a `CellBatch`."""

# The values of a window's cells by key, (M, D), and the cells, int64 (M,).
_Window = tuple[dict[str, Tensor], NDArray[np.int64]]

# Keys with a value per pair of cells, whose first axis is attention heads.
_OF_PAIRS = frozenset({"attn_scores", "attn_pattern"})

_MOST_WORKERS = 1023
# Each process has a word: epochs begun, and the loop over the loader in which it began the last.
# Both are in one word, so that a process never sees one without the other.
_LOOP_BITS = 39
_LOOPS = (1 << _LOOP_BITS) - 1


class CellArguments(TypedDict, total=False):
    """Arguments by name of `ActivationsFile.cells`, for its overloads."""

    batch_size: int
    seed: int
    epoch: int
    epochs: int | None
    rank: int
    world_size: int
    window: int
    device: str | torch.device | None
    dtype: torch.dtype | None
    drop_last: bool
    shuffle_boards: bool


class CellBatch(NamedTuple, Generic[Values]):
    """Cells of several boards.

    Attributes:
        values: (B, D) as stored; a dict of such tensors where several keys are read.
        rows: the board of the file that each cell is of, int64 (B,), on the host.
        cells: the cell of that board, int64 (B,), on the host.
    """

    values: Values
    rows: Tensor
    cells: Tensor


@dataclass(frozen=True)
class CellOrder:
    """The order of an epoch, and the share of it that a process takes."""

    cells: int  # all cells
    nbytes: int  # bytes per cell, of all keys
    window: int  # bytes per window, at least one batch
    batch_size: int  # cells per batch; the last may have fewer
    seed: int
    epoch: int
    rank: int  # number of this process
    world_size: int  # processes that share the batches
    drop_last: bool  # leave out a short last batch, and batches that not every rank would have
    shuffle_boards: bool = False  # take the boards in a random order before windows are cut

    def __post_init__(self) -> None:
        for name, least in {"seed": 0, "epoch": 0, "rank": 0, "batch_size": 1}.items():
            if (number := getattr(self, name)) < least:
                raise InvalidArgumentError(f"{option(name)} must be at least {least}; got {number}")
        if self.rank >= self.world_size:
            raise InvalidArgumentError(
                f"{option('rank')} must be less than {option('world_size', self.world_size)}; got "
                f"{self.rank}"
            )
        if self.window < self.batch_nbytes:
            raise InvalidArgumentError(
                f"{option('window')} must be at least the {self.batch_nbytes} bytes of a batch; "
                f"got {self.window}; take a larger window or a smaller {option('batch_size')}"
            )

    @property
    def batch_nbytes(self) -> int:
        """Bytes of a whole batch."""
        return self.batch_size * self.nbytes

    @property
    def window_batches(self) -> int:
        """Whole batches per window."""
        return self.window // self.batch_nbytes

    def windows(self, batches: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Cut a process's batches where windows end; yield the windows' numbers with them."""
        whole = self.cells // (self.window_batches * self.batch_size)
        windows = [*self._permutation(whole, 0).tolist(), whole]
        for place, inside in groupby(batches, lambda batch: batch // self.window_batches):
            yield windows[place], list(inside)

    def read(self, window: int, batches: Sequence[int]) -> NDArray[np.int64]:
        """Return the cells of a window's batches in order, int64 (M,)."""
        length = self.window_batches * self.batch_size
        order = self._permutation(min(length, self.cells - window * length), 1 + window)
        order += window * length
        if self.shuffle_boards:
            order = self._boards[order // CELLS] * CELLS + (order & CELLS - 1)
        starts = [batch % self.window_batches * self.batch_size for batch in batches]
        if len(batches) == batches[-1] - batches[0] + 1:
            return order[starts[0] : starts[-1] + self.batch_size]
        return np.concatenate([order[start : start + self.batch_size] for start in starts])

    @cached_property
    def _boards(self) -> NDArray[np.int64]:
        return self._permutation(self.cells // CELLS, 0, 1)

    def _permutation(self, n: int, *key: int) -> NDArray[np.int64]:
        state = np.random.PCG64([self.seed, self.epoch, *key]).state["state"]
        out = np.empty(n, np.int64)
        _rust.permutation(state["state"], state["inc"], out)
        return out


class Epochs:
    """Epochs begun by the main process and its workers, and the position of this process.

    A `DataLoader` makes workers from the dataset of the main process, for every epoch unless they
    persist. So the epochs begun are counted in memory that all these processes share.
    """

    position: tuple[int, int]  # the epoch and the batch that come next in this process

    def __init__(self, epoch: int) -> None:
        self._words = torch.zeros(1 + _MOST_WORKERS, dtype=torch.int64).share_memory_()
        self._loops = 0  # of this worker, which may persist
        self.load(epoch, 0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._words.share_memory_()  # which a pickle does not, outside of `multiprocessing`

    def load(self, epoch: int, batch: int) -> None:
        """Let the next loop begin in an epoch at a batch; in a worker, its own loop."""
        self.position = (epoch, batch)
        self._loaded = None if get_worker_info() is None else self.position
        if self._loaded is None:
            self._first = self.position
            self._words.zero_()

    def begin(self) -> tuple[int, int]:
        """Begin an epoch, one for all workers of a loop; return its number and first batch."""
        worker, place, loop = get_worker_info(), 0, 0
        if worker is not None:
            place = 1 + worker.id
            if place > _MOST_WORKERS:
                raise InvalidArgumentError(f"num_workers must be at most {_MOST_WORKERS}")
            loop = hash((worker.seed - worker.id, self._loops)) & _LOOPS
            self._loops += 1
        if self._loaded is not None:
            self.position, self._loaded = self._loaded, None
            count = max(self.position[0] - self._first[0], 0) + 1
        else:
            count = self._next_count(place, loop)
            first_batch = self._first[1] if count == 1 else 0
            self.position = (self._first[0] + count - 1, first_batch)
        self._words[place] = count << _LOOP_BITS | loop
        return self.position

    def _next_count(self, place: int, loop: int) -> int:
        """Return the count of the epoch that another worker began in this loop, or the next one.

        A loop has the seed that the loader gave its workers. Where a program seeds every loop
        alike, only a higher count than this worker's is of this loop.
        """
        words: list[int] = self._words.tolist()
        own = words[place] >> _LOOP_BITS if words[place] & _LOOPS == loop else 0
        in_loop = [word >> _LOOP_BITS for word in words[1:] if word & _LOOPS == loop]
        if place and max(in_loop, default=0) > own:
            return max(in_loop)
        return (max(words) >> _LOOP_BITS) + 1

    def check_own(self) -> None:
        """Raise InvalidArgumentError where workers, not this process, began the last epoch."""
        words: list[int] = self._words.tolist()
        if get_worker_info() is None and max(words[1:]) >> _LOOP_BITS > words[0] >> _LOOP_BITS:
            raise InvalidArgumentError(
                "state_dict: workers of a DataLoader iterate, each at a position of its own; use "
                "torchdata's StatefulDataLoader and its state_dict, or num_workers=0"
            )


def rows_and_cells(numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Split numbers of cells into boards and the cells of these."""
    return torch.from_numpy(numbers // CELLS), torch.from_numpy(numbers & CELLS - 1)


class Cells(IterableDataset[CellBatch[Values]]):
    """Batches of cells, as `ActivationsFile.cells` returns them: one epoch per loop.

    Every `iter()` begins the next epoch, of exactly `len()` batches; leaving a loop early ends its
    epoch. After `load_state_dict` the first loop is the rest of that epoch. Workers of a
    `DataLoader`, which needs `batch_size=None`, share the batches in the same order.
    """

    def __init__(
        self,
        order: CellOrder,  # of the first epoch
        source: str,  # tells the source of the cells from others, for a state
        *,
        single: bool,  # The values are a key's, not a dict.
        epochs: int | None,  # per loop; None for loops without an end
        dtype: torch.dtype | None,  # of the values; None for the stored one
    ) -> None:
        if epochs is not None and epochs < 1:
            raise InvalidArgumentError(
                f"{option('epochs')} must be at least 1 or None; got {epochs}"
            )
        if not isinstance(dtype, torch.dtype | None):
            raise InvalidArgumentError(f"{option('dtype')} must be a torch.dtype; got {dtype!r}")
        self._loop_epochs = epochs
        self._dtype = dtype
        self._order = order
        self._source = f"{zlib.crc32(source.encode()):08x}"
        self._single = single
        self._epochs = Epochs(order.epoch)

    def __repr__(self) -> str:
        order, epochs = self._order, self._loop_epochs
        batches = -(-order.cells // order.batch_size)
        loops = "without an end" if epochs is None else f"per epoch, {epochs} per loop"
        share = f", rank {order.rank} of {order.world_size}" if order.world_size > 1 else ""
        return (
            f"{type(self).__name__}({order.cells:,} cells in {batches:,} batches of "
            f"{order.batch_size:,} {loops}{share})"
        )

    @abstractmethod
    def _read(self, order: CellOrder, batches: Sequence[int]) -> Generator[KeyedCells, None, None]:
        """Yield batches, by their numbers in the order."""

    def _share(self, start: int, rank: int, step: int) -> Sequence[int]:
        """Return the numbers of every `step`-th batch of an epoch, for one reader."""
        order = self._order
        stop = -(-order.cells // order.batch_size)
        if order.drop_last:  # equally many whole batches for each rank
            whole = order.cells // order.batch_size
            stop = start + (whole - start) // order.world_size * order.world_size
        return range(start + rank, stop, step)

    def __len__(self) -> int:
        """Batches of a loop on this rank; TypeError if it has no end."""
        if self._loop_epochs is None:
            raise TypeError("epochs=None: a loop has no end, and no length")
        return self._loop_epochs * len(self._share(0, self._order.rank, self._order.world_size))

    def __iter__(self) -> Iterator[CellBatch[Values]]:
        """Yield the batches of the next epoch, or the rest of a loaded one."""
        return closed_at_exit(self._loop(*self._epochs.begin()))

    def _loop(self, epoch: int, start: int) -> Generator[CellBatch[Values], None, None]:
        yield from self._epoch(epoch, start)
        for _ in repeat(None) if self._loop_epochs is None else range(self._loop_epochs - 1):
            yield from self._epoch(*self._epochs.begin())

    def _epoch(self, epoch: int, start: int) -> Iterator[CellBatch[Values]]:
        worker, order = get_worker_info(), replace(self._order, epoch=epoch)
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        step = order.world_size * workers
        batches = self._share(start, order.rank + order.world_size * number, step)
        if not batches:
            self._epochs.position = (epoch + 1, 0)
        feed = self._read(order, batches)
        try:
            for taken, (values, rows, cells) in enumerate(feed, start=1):
                is_last = taken == len(batches)
                self._epochs.position = (epoch + 1, 0) if is_last else (epoch, start + taken * step)
                typed = {key: each.to(self._dtype or each.dtype) for key, each in values.items()}
                [value] = typed.values() if self._single else [typed]
                yield CellBatch(cast("Values", value), rows, cells)
        finally:
            feed.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch in the process that iterates, and the order's data.

        After the last batch of an epoch it is the beginning of the next one. `batch` counts the
        batches of all ranks, so that another `world_size` can resume.

        Raises:
            InvalidArgumentError: Workers of a `DataLoader` iterate: each has a position of its own.
        """
        self._epochs.check_own()
        epoch, batch = self._epochs.position
        moving = {"seed": self._order.seed, "epoch": epoch, "batch": batch}
        return {**moving, "window": self._order.window_batches, **self._fixed()}

    def _fixed(self) -> dict[str, Any]:
        """Return the parts of a state that must be these."""
        of_order = ("batch_size", "cells", "shuffle_boards")
        return {name: getattr(self._order, name) for name in of_order} | {"file": self._source}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next loop begin at a state's position, with its seed and window.

        Raises:
            InvalidArgumentError: It is not a state of cells, or of another file or batch size.
        """
        least: dict[str, int] = {"seed": 0, "epoch": 0, "batch": 0, "window": 1}
        fixed: dict[str, Any] = self._fixed()
        if state.keys() != {**least, **fixed}.keys() or not all(
            isinstance(state[name], int) and state[name] >= least[name] for name in least
        ):
            raise InvalidArgumentError(
                f"{option('state')} must have {', '.join([*least, *fixed])}, numbers from 0 on; "
                f"got {dict(state)}"
            )
        for name, ours in fixed.items():
            if state[name] != ours:
                raise InvalidArgumentError(
                    f"{option('state')} must be of the same {name}, {ours}; got {state[name]}"
                )
        window = state["window"] * self._order.batch_nbytes
        self._order = replace(self._order, seed=state["seed"], window=window)
        self._epochs.load(state["epoch"], state["batch"])


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
        """Read each window while batches of the window before it are taken.

        Of remote files two are under way: the link is busy while blocks that came are read.
        """
        cancel, depth = _rust.Cancel(), 2 if self._files.is_remote else 1
        reader = ThreadPoolExecutor(max_workers=depth, thread_name_prefix="cells")
        ahead: deque[Future[_Window]] = deque()
        turns = [Event()]
        turns[0].set()

        def read(window: int, batches: list[int], turn: Event, next_turn: Event) -> _Window:
            try:
                cells = order.read(window, batches)
                requests = [
                    self._files.requests_for(of.part, cells, of.nbytes, per_row=CELLS)
                    for of in self._values.values()
                ]
                # Fetch one window at a time: two that share the link would both be late.
                turn.wait()
                for each in requests:
                    fetch(each, cancel.is_asked)
            finally:
                next_turn.set()
            values = {name: self._new(name, len(cells), of) for name, of in self._values.items()}
            for name, of in self._values.items():
                out = values[name].view(torch.uint8).numpy()
                self._files.read(of.part, cells, out, per_row=CELLS, cancel=cancel)
            return values, cells

        def start() -> None:
            for window, batches in islice(windows, depth - len(ahead)):
                turns.append(Event())
                try:
                    ahead.append(reader.submit(read, window, batches, *turns[-2:]))
                except RuntimeError:  # The program ends, and no thread can start.
                    if threading.current_thread().daemon:
                        return  # The interpreter would end this thread inside of the read.
                    ahead.append(Future())
                    ahead[-1].set_result(read(window, batches, *turns[-2:]))

        try:
            start()
            while ahead:
                values, cells = ahead.popleft().result()
                start()
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
        nbytes = cells * of.nbytes
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        else:
            memory = self._memory.take(name, nbytes)
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
    """Let the caller's stream wait for the copy, and its memory's next user for that stream.

    The memory is of the stream that was current at the batch before, which may be another.
    """
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    for values in batch[0].values():
        values.record_stream(stream)
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
