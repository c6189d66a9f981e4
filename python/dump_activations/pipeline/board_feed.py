"""Boards for the forward pass, read ahead of it on a background thread.

Shape letters: W boards in a window, S cells (16).
"""

from collections import deque
from collections.abc import Generator, Iterator
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
from dump_activations.pool.dataset import StepsDataset
from dump_activations.timing import Stopwatch

# Indices are read a window at a time: the more of them one read sees, the nearer its rows lie
# together. The first windows are small, so that the first batch does not wait for a large read.
_LARGEST_WINDOW = 1 << 20
_GROWTH = 4
_WINDOWS_AHEAD = 2


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
            window_WS = torch.empty(
                (stop - first, CELLS), dtype=torch.uint8, device="cpu", pin_memory=pinned
            )
            boards_WS = window_WS.numpy()
            pool.read_boards(indices[first:stop], out=boards_WS, cancel=cancel)
            _check_vocabulary(boards_WS, indices[first:stop], vocabulary)
            return window_WS

    pinned = device.type == "cuda"
    cancel = _rust.Cancel()
    windows = _windows(start, len(indices), batch_size)
    ahead: deque[tuple[int, Future[Tensor]]] = deque()
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="boards")
    try:
        while True:
            while len(ahead) < _WINDOWS_AHEAD and (window := next(windows, None)):
                ahead.append((window[0], reader.submit(read, *window)))
            if not ahead:
                return
            first, future = ahead.popleft()
            with waiting:
                window_WS = future.result()
            for i in range(0, len(window_WS), batch_size):
                boards_BS = window_WS[i : i + batch_size]
                row = first + i
                yield BoardBatch(row, indices[row : row + len(boards_BS)], boards_BS)
    finally:
        cancel.ask()
        reader.shutdown(wait=True, cancel_futures=True)


def _windows(start: int, n: int, batch_size: int) -> Iterator[tuple[int, int]]:
    largest = max(_LARGEST_WINDOW // batch_size, 1) * batch_size
    size = batch_size
    while start < n:
        stop = min(start + size, n)
        yield start, stop
        start, size = stop, min(size * _GROWTH, largest)


def _check_vocabulary(
    boards_WS: NDArray[np.uint8], indices: NDArray[np.int64], vocabulary: int
) -> None:
    highest = int(boards_WS.max(initial=0))
    if highest >= vocabulary:
        row = int(np.argmax(boards_WS.max(axis=1) >= vocabulary))
        raise VocabularyError(
            f"step {indices[row]}: exponent {boards_WS[row].max()} is outside the model's "
            f"vocabulary of {vocabulary}; leave such boards out with {option('indices')}, or use a "
            "model with a larger input_vocab_size"
        )
