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
from dump_activations.dataset.columns import LabelReader, Values
from dump_activations.dataset.dataset import StepsDataset
from dump_activations.dataset.sampling import StepIndices
from dump_activations.dtypes import CELLS, LABEL_PREFIX
from dump_activations.errors import VocabularyError, option
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
        boards_BS: exponents, uint8 (B, 16).
        labels: name -> tensor (B, *shape) in the dtype it is stored in.
    """

    first_row: int
    indices: NDArray[np.int64]
    boards_BS: Tensor
    labels: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a file stores of the rows: name -> tensor (B, *shape)."""
        labels = {LABEL_PREFIX + name: values for name, values in self.labels.items()}
        return {"indices": torch.from_numpy(self.indices), "boards": self.boards_BS, **labels}

    def cut(self, start: int, stop: int) -> "BoardBatch":
        """Return its boards from number `start` up to `stop`, in the same memory."""
        return BoardBatch(
            self.first_row + start,
            self.indices[start:stop],
            self.boards_BS[start:stop],
            {name: values[start:stop] for name, values in self.labels.items()},
        )


def read_batch(
    dataset: StepsDataset,
    labels: LabelReader | None,
    indices: NDArray[np.int64],
    *,
    first_row: int,
    cancel: _rust.Cancel | None = None,
) -> BoardBatch:
    """Read boards, and their labels from the same bytes of the shards.

    Args:
        dataset: where the steps are.
        labels: reads what is wanted of the rows beside the boards; None for nothing.
        indices: global step indices, int64 (B,).
        first_row: place of the first board in the run.
        cancel: lets another thread end the read.
    """
    boards_BS = torch.empty((len(indices), CELLS), dtype=torch.uint8, device="cpu")
    values: Values = {}
    if labels is None:
        dataset.read_boards(indices, out=boards_BS.numpy(), cancel=cancel)
    else:
        values = labels.read(indices, boards_BS.numpy(), cancel)
    tensors = {name: torch.from_numpy(each) for name, each in values.items()}
    return BoardBatch(first_row, indices, boards_BS, tensors)


def feed_boards(
    dataset: StepsDataset,
    indices: StepIndices,
    labels: LabelReader | None = None,
    *,
    batch_size: int,
    vocabulary: int,
    stretches: Iterable[range] | None = None,
    reading: Stopwatch,
    waiting: Stopwatch,
) -> Generator[BoardBatch, None, None]:
    """Yield the boards of the given steps, in batches; the last may be short.

    Args:
        dataset: where the steps are.
        indices: global step indices.
        labels: reads what is wanted of the rows beside the boards.
        batch_size: boards a batch.
        vocabulary: exponents must be below this.
        stretches: rows of the run to read, each stretch beginning at a multiple of `batch_size`;
            all rows by default. The next one is taken when boards are to be read ahead, and never
            more than one beyond that whose batches are yielded.
        reading: counts the time spent reading.
        waiting: counts the time the consumer waited for boards.

    Raises:
        VocabularyError: a board has an exponent the model has no embedding for.
        DatasetError: a shard cannot be read.
    """

    def read(first: int, stop: int) -> BoardBatch:
        with reading:
            window = read_batch(
                dataset, labels, indices[first:stop], first_row=first, cancel=cancel
            )
            if window.boards_BS.numpy().max(initial=0) >= vocabulary:
                # Reading this much again takes no time beside a run's.
                begin = 0 if first < _LARGEST_WINDOW else first
                counted_N = indices[begin : max(stop, _LARGEST_WINDOW)]
                boards_NS = dataset.read_boards(counted_N, cancel=cancel)
                raise _outside(boards_NS, counted_N, vocabulary, begin=begin, n=len(indices))
            return window

    cancel = _rust.Cancel()
    if stretches is None:
        stretches = [range(len(indices))]
    windows = _windows(stretches, batch_size)
    ahead: deque[Future[BoardBatch]] = deque()
    held: deque[_Window] = deque()
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="boards")
    try:
        while True:
            # At most two of the largest windows; at the start all of a run that is no longer.
            while _may_read_on(held) and (window := next(windows, None)):
                ahead.append(reader.submit(read, window.first, window.stop))
                held.append(window)
            if not ahead:
                return
            future = ahead.popleft()
            with waiting:
                boards = future.result()
            held.popleft()
            for i in range(0, len(boards.indices), batch_size):
                _raise_early(ahead)
                yield boards.cut(i, i + batch_size)
    finally:
        cancel.ask()
        reader.shutdown(wait=True, cancel_futures=True)
        ahead.clear()


@dataclass(frozen=True)
class _Window:
    """Rows that are read in one call; `is_last` of their stretch."""

    first: int
    stop: int
    is_last: bool


def _may_read_on(held: Iterable[_Window]) -> bool:
    """Whether another window may be read while those are held."""
    return (
        sum(window.stop - window.first for window in held) <= _LARGEST_WINDOW
        and sum(window.is_last for window in held) <= 1
    )


def _raise_early(reads: Iterable[Future[BoardBatch]]) -> None:
    """Raise what a read has met, although the batches before it are still to come."""
    for read in reads:
        if read.done():
            read.result()


def _windows(stretches: Iterable[range], batch_size: int) -> Iterator[_Window]:
    """Cut stretches of rows into windows, each but the last of a stretch of whole batches."""
    largest = max(_LARGEST_WINDOW // batch_size, 1) * batch_size
    size = batch_size
    for stretch in stretches:
        first = stretch.start
        while first < stretch.stop:
            stop = min(first + size, stretch.stop)
            yield _Window(first, stop, is_last=stop == stretch.stop)
            first, size = stop, min(size * _GROWTH, largest)


def _outside(
    boards_NS: NDArray[np.uint8],
    indices_N: NDArray[np.int64],
    vocabulary: int,
    *,
    begin: int,
    n: int,
) -> VocabularyError:
    """Make the error of a run of `n` boards, of those from row `begin` on."""
    highest_N = boards_NS.max(axis=1)
    outside_N = highest_N >= vocabulary
    at = int(np.argmax(outside_N))
    counted = f"{len(boards_NS):,} boards"
    if begin:
        counted += f" from number {begin:,} on"
    elif len(boards_NS) < n:
        counted = f"first {counted}"
    return VocabularyError(
        f"step {indices_N[at]}: exponent {highest_N[at]} is outside the model's vocabulary of "
        f"{vocabulary} ({np.count_nonzero(outside_N):,} of the "
        f"{counted} have such); leave them out by "
        f"{option('where', f'max_exponent < {vocabulary}')} or of the {option('indices')} given, "
        "or use a model with a larger input_vocab_size"
    )
