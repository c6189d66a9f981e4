"""An output file under construction, as each process sees it that writes batches of it."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from contextlib import suppress
from threading import Lock
from typing import Self

import numpy as np
import numpy.typing as npt

from dump_activations.errors import OutputError
from dump_activations.storage.digests import Digest
from dump_activations.storage.statistics import RunningStatistics
from dump_activations.storage.writing.durability import BackgroundSync
from dump_activations.storage.writing.journal import Journal
from dump_activations.storage.writing.partial import Partial
from dump_activations.storage.writing.places import Places
from dump_activations.storage.writing.recorded import JournalError, read_journals
from dump_activations.storage.writing.records import BatchDigests, BatchRecord
from dump_activations.storage.writing.work import Work


class BatchFile(ABC):
    """Tensors written in batches, in any order, from any thread.

    The data is in `NAME.partial` beside the target, with a journal a process beside that. Use as a
    context manager: leaving it early is `suspend()`. No writer may still be at work then.

    Attributes:
        target: the file's name once it is complete.
        partial: its name until then.
        missing: stretches of batches, ascending, that no run before has written.
        resumed_rows: rows of the others.
        is_committed: whether it is complete.
    """

    def __init__(
        self,
        work: Work,
        partial: Partial,
        places: Places,
        journal: Journal,
        kept: Collection[int],
        *,
        statistics: RunningStatistics,
    ) -> None:
        """Private: `OutputFile.open` and `JoinedFile.join` make one."""
        self.target = work.target
        self.partial = partial.path
        self.missing = _stretches(b for b in range(work.header.batches) if b not in kept)
        self.resumed_rows = work.header.count_rows(kept)
        self.is_committed = False
        self._work = work
        self._header = work.header
        self._file = partial
        self._places = places
        self._journal = journal
        self._statistics = statistics
        self._is_open = True
        self._sync: BackgroundSync | None = None
        self._lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_open:
            self.suspend()

    @property
    def size(self) -> int:
        """Bytes of the finished file."""
        return self._places.layout.size

    def rows_of(self, batches: range) -> range:
        """Return the rows of consecutive batches."""
        return self._header.rows_of(batches)

    @abstractmethod
    def begin_ticket(self, batches: range) -> None:
        """Say which consecutive batches are this process's to write, before the first of them."""

    def span_nbytes(self, name: str, most: int) -> int:
        """Return of how many bytes spans of a tensor are to be: at most so many, if it can be."""
        return self._statistics.whole_vectors(name, most)

    def write_span(
        self, first_row: int, name: str, start: int, data: npt.NDArray[np.uint8]
    ) -> Digest:
        """Write bytes that begin `start` bytes into the batch of a tensor at `first_row`.

        Nothing is noted of them before `finish_batch`, but for the statistics.

        Raises:
            OutputError: the system refused; `errno` is its reason.
        """
        digest = self._write_span(first_row, name, start, data)
        self._statistics.add(name, first_row * self._places.row_nbytes[name] + start, data)
        return digest

    def finish_batch(self, first_row: int, digests: BatchDigests) -> None:
        """Note that all of the batch at `first_row` was written by `write_span`.

        Raises:
            OutputError: data written before could not be brought to disk.
        """
        batch, remainder = divmod(first_row, self._header.batch_rows)
        assert remainder == 0, first_row
        assert digests.keys() == set(self._header.tensors)
        record = self._record(batch, digests)
        with self._lock:
            if self._sync is None:
                self._sync = BackgroundSync(self._file, self._journal)
        with OutputError.when(f"cannot write {self.partial}"):
            self._sync.add(batch, record)

    def suspend(self) -> int:
        """Leave what is on disk for a later run to resume; returns the rows that are kept in all.

        With none, nothing is left behind.
        """
        if self.is_committed:
            return 0
        with suppress(OSError):  # What the journal has is on disk; the rest is written again.
            self._stop_sync()
        kept = self._kept_batches()
        if kept and self._file.is_in_place():
            self._close()
            return self._header.count_rows(kept)
        self.discard()
        return 0

    @abstractmethod
    def discard(self) -> None:
        """Remove what this process may remove of what was written; an existing target stays."""

    @abstractmethod
    def _write_span(
        self, first_row: int, name: str, start: int, data: npt.NDArray[np.uint8]
    ) -> Digest: ...

    @abstractmethod
    def _record(self, batch: int, digests: BatchDigests) -> BatchRecord: ...

    def _kept_batches(self) -> set[int]:
        """Return the batches that are recorded, by any process."""
        kept = set(self._journal.batches)
        if self._journal.token is not None:
            with suppress(OSError, JournalError):
                kept.update(*(each.batches for each in read_journals(self._work)))
        return kept

    def _stop_sync(self) -> None:
        sync, self._sync = self._sync, None
        if sync is not None:
            sync.close()

    def _close(self) -> None:
        self._journal.close()
        self._file.close()
        self._is_open = False


def _stretches(numbers: Iterable[int]) -> tuple[range, ...]:
    """Return ascending numbers as ranges without gaps."""
    found: list[range] = []
    for number in numbers:
        start = found.pop().start if found and found[-1].stop == number else number
        found.append(range(start, number + 1))
    return tuple(found)
