"""Epochs of an iterable dataset, counted through the workers of a `DataLoader`.

A loader makes workers from the dataset of the main process, for every epoch unless they persist.
So the epochs begun are counted in memory that all these processes share.
"""

from typing import Any

import torch
from torch.utils.data import get_worker_info

from dump_activations.errors import InvalidArgumentError

_MOST_WORKERS = 1023

# Each process has a word: epochs begun, and the loop over the loader in which it began the last.
# Both are in one word, so that a process never sees one without the other.
_LOOP_BITS = 39
_LOOPS = (1 << _LOOP_BITS) - 1


class Epochs:
    """Epochs begun by the main process and its workers, and the position of this process.

    Args:
        epoch: the first epoch.
    """

    def __init__(self, epoch: int) -> None:
        self._words = torch.zeros(1 + _MOST_WORKERS, dtype=torch.int64).share_memory_()
        self._loops = 0  # of this worker, which may persist
        self.load(epoch, 0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._words.share_memory_()  # which a pickle does not, outside of `multiprocessing`

    def load(self, epoch: int, batch: int) -> None:
        """Let the next loop begin in an epoch at a batch; in a worker, its own loop."""
        self._position = (epoch, batch)
        self._loaded: tuple[int, int] | None = None
        if get_worker_info() is None:
            self._first = self._position
            self._words.zero_()
        else:
            self._loaded = self._position

    def begin(self) -> tuple[int, int]:
        """Begin an epoch, the same in all workers of one loop; return its number and first batch.

        Raises:
            InvalidArgumentError: the loader has more than 1,023 workers.
        """
        worker, place, loop = get_worker_info(), 0, 0
        if worker is not None:
            place = 1 + worker.id
            if place > _MOST_WORKERS:
                raise InvalidArgumentError(f"num_workers must be at most {_MOST_WORKERS}")
            loop = hash((worker.seed - worker.id, self._loops)) & _LOOPS
            self._loops += 1
        if self._loaded is not None:
            self._position, self._loaded = self._loaded, None
            count = max(self._position[0] - self._first[0], 0) + 1
        else:
            count = self._next_count(place, loop)
            first_batch = self._first[1] if count == 1 else 0
            self._position = (self._first[0] + count - 1, first_batch)
        self._words[place] = count << _LOOP_BITS | loop
        return self._position

    def _next_count(self, place: int, loop: int) -> int:
        """Return the count of the epoch that another worker began in this loop, or the next one.

        A loop has the seed that the loader gave its workers. Where a program seeds every loop
        alike, only a higher count than this worker's is of this loop.
        """
        words: list[int] = self._words.tolist()
        begun = [word >> _LOOP_BITS for word in words]
        own = begun[place] if words[place] & _LOOPS == loop else 0
        in_loop = [begun[i] for i, word in enumerate(words) if i and word & _LOOPS == loop]
        if place and max(in_loop, default=0) > own:
            return max(in_loop)
        return max(begun) + 1

    def move(self, epoch: int, batch: int) -> None:
        """Note the position of this process."""
        self._position = (epoch, batch)

    def position(self) -> tuple[int, int]:
        """Return the epoch and batch that come next in this process.

        Raises:
            InvalidArgumentError: the last epoch was begun by workers, and not by this process.
        """
        begun = [word >> _LOOP_BITS for word in self._words.tolist()]
        if get_worker_info() is None and max(begun[1:]) > begun[0]:
            raise InvalidArgumentError(
                "state_dict: workers of a DataLoader iterate, each at a position of its own; use "
                "torchdata's StatefulDataLoader and its state_dict, or num_workers=0"
            )
        return self._position
