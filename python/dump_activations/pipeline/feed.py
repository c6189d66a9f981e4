"""Boards for the forward pass, read ahead on a background thread.

Shape letters: B boards in a batch, N boards that are counted, S cells (16).
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dump_activations import _rust
from dump_activations.dataset.columns import Values
from dump_activations.dtypes import CELLS, LABEL_PREFIX
from dump_activations.errors import VocabularyError, option
from dump_activations.interrupts import HeldInterrupts
from dump_activations.pipeline.plan import Plan
from dump_activations.progress import Stopwatch

# Indices are read a window at a time: the more of them one read sees, the nearer its rows lie
# together. The first windows are small, so that the first batch does not wait for a large read.
_LARGEST_WINDOW = 1 << 20
_GROWTH = 4
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class BoardBatch:
    """Consecutive boards of a run.

    Attributes:
        first_row: row of the first board in the run.
        indices: global step indices, int64 (B,).
        boards_BS: exponents, uint8 (B, 16).
        labels: name -> tensor (B, *shape) in its storage dtype.
    """

    first_row: int
    indices: NDArray[np.int64]
    boards_BS: Tensor
    labels: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a file stores next to the activations: name -> tensor (B, *shape)."""
        labels = {LABEL_PREFIX + name: values for name, values in self.labels.items()}
        return {"indices": torch.from_numpy(self.indices), "boards": self.boards_BS, **labels}


def read_batch(plan: Plan, rows: range, cancel: _rust.Cancel | None = None) -> BoardBatch:
    """Read the boards of a run's rows, and their labels. Another thread ends that by `cancel`."""
    indices = plan.indices[rows.start : rows.stop]
    boards_BS = torch.empty((len(indices), CELLS), dtype=torch.uint8, device="cpu")
    values: Values = {}
    if plan.labels is None:
        plan.dataset.read_boards(indices, out=boards_BS.numpy(), cancel=cancel)
    else:
        values = plan.labels.read(indices, boards_BS.numpy(), cancel)
    tensors = {name: torch.from_numpy(each) for name, each in values.items()}
    return BoardBatch(rows.start, indices, boards_BS, tensors)


def feed_boards(
    plan: Plan, ranges: Iterable[range] | None = None, *, reading: Stopwatch, waiting: Stopwatch
) -> Generator[BoardBatch, None, None]:
    """Yield a plan's boards in batches; the last batch of a range may be short.

    `ranges` are rows of the run, as in `Run.batches`. `waiting` counts the consumer's time.

    Raises:
        VocabularyError: a board has an exponent without an embedding in the model.
        DatasetError: a shard cannot be read.
    """
    batch_size = plan.options.batch_size
    cancel = _rust.Cancel()

    def read(rows: range) -> BoardBatch:
        with reading:
            window = read_batch(plan, rows, cancel)
            if window.boards_BS.numpy().max(initial=0) >= plan.model.config.input_vocab_size:
                raise _vocabulary_error(plan, rows.start, cancel)
            return window

    windows = _windows([range(len(plan.indices))] if ranges is None else ranges, batch_size)
    held: deque[tuple[range, bool, Future[BoardBatch]]] = deque()
    reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="boards")
    try:
        while True:
            # At most two of the largest windows; at first a whole run that is no longer than one.
            while (
                sum(len(rows) for rows, _, _ in held) <= _LARGEST_WINDOW
                and sum(is_last for _, is_last, _ in held) <= 1
                and (window := next(windows, None))
            ):
                rows, is_last = window
                held.append((rows, is_last, reader.submit(read, rows)))
            if not held:
                return
            with waiting, HeldInterrupts() as interrupts:
                while not wait([held[0][-1]], _POLL_SECONDS).done:
                    interrupts.check()
                boards = held[0][-1].result()
            held.popleft()
            for i in range(0, len(boards.indices), batch_size):
                for *_, ahead in held:
                    if ahead.done():
                        ahead.result()  # Raise at once, before the batches that are still to come.
                stop = i + batch_size
                yield BoardBatch(
                    boards.first_row + i,
                    boards.indices[i:stop],
                    boards.boards_BS[i:stop],
                    {name: values[i:stop] for name, values in boards.labels.items()},
                )
    finally:
        cancel.ask()
        reader.shutdown(wait=True, cancel_futures=True)
        held.clear()


def _windows(ranges: Iterable[range], batch_size: int) -> Iterator[tuple[range, bool]]:
    """Cut ranges of rows into windows of whole batches, and tell the last window of each range."""
    largest = max(_LARGEST_WINDOW // batch_size, 1) * batch_size
    size = batch_size
    for rows in ranges:
        first = rows.start
        while first < rows.stop:
            stop = min(first + size, rows.stop)
            yield range(first, stop), stop == rows.stop
            first, size = stop, min(size * _GROWTH, largest)


def _vocabulary_error(plan: Plan, first_row: int, cancel: _rust.Cancel) -> VocabularyError:
    # Read on, so that the error tells a stray board from a wrong model.
    indices_N = plan.indices[first_row : first_row + _LARGEST_WINDOW]
    highest_N = plan.dataset.read_boards(indices_N, cancel=cancel).max(axis=1)
    vocabulary = plan.model.config.input_vocab_size
    outside_N = highest_N >= vocabulary
    at = int(np.argmax(outside_N))
    return VocabularyError(
        f"step {indices_N[at]}: exponent {highest_N[at]} is outside the model's vocabulary of "
        f"{vocabulary} (as in {np.count_nonzero(outside_N):,} of the {len(indices_N):,} boards "
        f"from row {first_row:,} on); leave such boards out with "
        f"{option('where', f'max_exponent < {vocabulary}')} or choose other {option('indices')}, "
        "or use a model with a larger input_vocab_size"
    )
