"""Boards for the forward pass, read ahead of it on a background thread.

Shape letters: W boards in a window, N boards that are counted, S cells (16).
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dump_activations import _rust
from dump_activations.board import CELLS
from dump_activations.errors import VocabularyError, option
from dump_activations.pipeline.device import current
from dump_activations.pipeline.shortage import empty_pinned
from dump_activations.pool.dataset import StepsDataset
from dump_activations.timing import Stopwatch

# Indices are read a window at a time: the more of them one read sees, the nearer its rows lie
# together. The first windows are small, so that the first batch does not wait for a large read.
_LARGEST_WINDOW = 1 << 20
_GROWTH = 4


@dataclass(frozen=True)
class BoardBatch:
    """Consecutive boards of a run.

    Attributes:
        first_row: place of the first board in the run, hence in the output.
        indices: global step indices, int64 (B,).
        boards_BS: exponents, uint8 (B, 16), in pinned memory if the run asked for that.
    """

    first_row: int
    indices: NDArray[np.int64]
    boards_BS: Tensor


def feed_boards(
    pool: StepsDataset,
    indices: NDArray[np.int64],
    *,
    batch_size: int,
    vocabulary: int,
    device: torch.device,
    start: int = 0,
    reading: Stopwatch,
    waiting: Stopwatch,
) -> Generator[BoardBatch, None, None]:
    """Yield the boards of the given steps in order, in batches; the last may be short.

    Args:
        pool: where the steps are.
        indices: global step indices, int64 (n,).
        batch_size: boards a batch.
        vocabulary: exponents must be below this.
        device: where they go; for a CUDA device they lie in page-locked memory, so that copies do
            not block.
        start: row to begin at, a multiple of `batch_size`.
        reading: counts the time spent reading.
        waiting: counts the time the consumer waited for boards.

    Raises:
        VocabularyError: a board has an exponent the model has no embedding for.
        PoolError: a shard cannot be read.
    """

    def read(first: int, stop: int) -> Tensor:
        with reading, current(device):
            shape = (stop - first, CELLS)
            if device.type == "cuda":
                window_WS = empty_pinned(shape, torch.uint8)
            else:
                window_WS = torch.empty(shape, dtype=torch.uint8, device="cpu")
            boards_WS = window_WS.numpy()
            pool.read_boards(indices[first:stop], out=boards_WS, cancel=cancel)
            if boards_WS.max(initial=0) >= vocabulary:
                # Reading this much again takes no time beside a run's.
                counted = slice(first, max(stop, _LARGEST_WINDOW))
                boards_NS = pool.read_boards(indices[counted], cancel=cancel)
                raise _outside(boards_NS, indices, vocabulary, first=first)
            return window_WS

    cancel = _rust.Cancel()
    windows = _windows(start, len(indices), batch_size)
    ahead: deque[tuple[int, Future[Tensor]]] = deque()
    asked = taken = start
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="boards")
    try:
        while taken < len(indices):
            # At most two of the largest windows; at the start all of a run that is no longer.
            while asked - taken <= _LARGEST_WINDOW and (window := next(windows, None)):
                ahead.append((window[0], reader.submit(read, *window)))
                asked = window[1]
            first, future = ahead.popleft()
            with waiting:
                window_WS = future.result()
            taken = first + len(window_WS)
            for row in range(first, taken, batch_size):
                _raise_early(future for _, future in ahead)
                boards_BS = window_WS[row - first : row - first + batch_size]
                yield BoardBatch(row, indices[row : row + len(boards_BS)], boards_BS)
    finally:
        cancel.ask()
        reader.shutdown(wait=True, cancel_futures=True)
        ahead.clear()


def _raise_early(reads: Iterable[Future[Tensor]]) -> None:
    """Raise what a read has met, although the batches before it are still to come."""
    for read in reads:
        if read.done():
            read.result()


def _windows(start: int, n: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Cut the rows into windows, (first, stop), each but the last of whole batches."""
    largest = max(_LARGEST_WINDOW // batch_size, 1) * batch_size
    size = batch_size
    while start < n:
        stop = min(start + size, n)
        yield start, stop
        start, size = stop, min(size * _GROWTH, largest)


def _outside(
    boards_NS: NDArray[np.uint8], indices: NDArray[np.int64], vocabulary: int, *, first: int
) -> VocabularyError:
    """Make the error of the boards from row `first` on; those before it have no such exponent."""
    highest_N = boards_NS.max(axis=1)
    outside_N = highest_N >= vocabulary
    at = int(np.argmax(outside_N))
    counted = first + len(boards_NS)
    return VocabularyError(
        f"step {indices[first + at]}: exponent {highest_N[at]} is outside the model's vocabulary "
        f"of {vocabulary} ({np.count_nonzero(outside_N):,} of the "
        f"{'first ' if counted < len(indices) else ''}{counted:,} boards have such); give the "
        f"others as {option('indices')}, indices[ds.read_boards(indices).max(axis=1) < "
        f"{vocabulary}], or use a model with a larger input_vocab_size"
    )
