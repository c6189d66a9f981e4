"""An output file that another process has begun, and this one helps to write."""

from collections.abc import Collection
from contextlib import suppress
from typing import Self

import numpy as np
import numpy.typing as npt

from dump_activations import _rust
from dump_activations.errors import OutputError
from dump_activations.storage.digests import Digest
from dump_activations.storage.statistics import RunningStatistics, vectors_of
from dump_activations.storage.writing.batch_file import BatchFile
from dump_activations.storage.writing.handed_over import hand_over
from dump_activations.storage.writing.journal import Journal, sync_directory
from dump_activations.storage.writing.partial import Partial
from dump_activations.storage.writing.places import Places
from dump_activations.storage.writing.recorded import JournalError, read_journal
from dump_activations.storage.writing.records import BatchDigests, BatchRecord
from dump_activations.storage.writing.targets import journal_path, partial_path
from dump_activations.storage.writing.tickets import Tickets
from dump_activations.storage.writing.work import Work


class JoinedFile(BatchFile):
    """Batches of a file that the first of several processes begins and commits.

    They are written tickets at a time. `leave()` ends it.
    """

    def __init__(
        self, work: Work, partial: Partial, places: Places, journal: Journal, kept: Collection[int]
    ) -> None:
        """Private: `JoinedFile.join` makes one."""
        statistics = RunningStatistics(vectors_of(work.specs))
        super().__init__(work, partial, places, journal, kept, statistics=statistics)
        self._tickets = Tickets(places)

    @classmethod
    def join(cls, work: Work, *, rank: int, token: int) -> Self:
        """Open the file that the first process has opened.

        Args:
            work: what the file is to hold.
            rank: number of this process, from 1.
            token: of the file that the first process has opened.

        Raises:
            OutputError: this process does not see that file, or cannot write beside it.
        """
        assert rank > 0, rank
        with OutputError.when(f"cannot write {partial_path(work.target)}"):
            kept = _resumed(work, token)
            partial = Partial.join(work.target)
        journal = Journal(journal_path(work.target, rank), work.header, token)
        try:
            file = cls(work, partial, Places(work, work.layout()), journal, kept)
            journal.join()
        except BaseException:
            journal.remove()
            partial.close()
            raise
        return file

    def begin_ticket(self, batches: range) -> None:
        """Say which consecutive batches are this process's to write, before the first of them."""
        self._tickets.begin(batches)

    def _write_span(
        self, first_row: int, name: str, start: int, data: npt.NDArray[np.uint8]
    ) -> Digest:
        """Write the whole pages of a span, and keep the rest for the journal."""
        batch = first_row // self._header.batch_rows
        at = self._places.of(range(batch, batch + 1), name)[0] + start
        pages = self._tickets.whole_pages(batch, name)
        first, last = (min(max(place - at, 0), data.nbytes) for place in pages)
        digest = self._keep(batch, name, start, data[:first])
        if first < last:
            dtype = self._places.dtypes[name]
            digest += self._file.write_span(at + first, data[first:last], dtype)
        return digest + self._keep(batch, name, start + last, data[last:])

    def leave(self) -> None:
        """End this process's part, with all that it wrote on disk and in its journal.

        Raises:
            OutputError: it could not be brought to disk.
        """
        with OutputError.when(f"cannot write {self.partial}"):
            self._stop_sync()
            self._file.check_place()
            if self._statistics:
                hand_over(self._statistics, self._journal)
        self._close()

    def discard(self) -> None:
        """Remove this process's journal."""
        with suppress(OSError):
            self._stop_sync()
        with suppress(OSError):
            self._journal.remove()
        self._close()

    def _record(self, batch: int, digests: BatchDigests) -> BatchRecord:
        return BatchRecord(digests, self._tickets.finish(batch))

    def _keep(self, batch: int, name: str, start: int, data: npt.NDArray[np.uint8]) -> Digest:
        if data.nbytes == 0:
            return Digest()
        self._tickets.keep(batch, name, start, data.tobytes())
        return Digest(data.nbytes, *_rust.digest(data, self._places.dtypes[name]))


def _resumed(work: Work, token: int) -> frozenset[int]:
    """Return the batches that the first process has found on disk."""
    directory = work.target.parent
    with suppress(JournalError, FileNotFoundError):
        # A network file system looks anew at a directory that is opened.
        sync_directory(directory)
        recorded = read_journal(journal_path(work.target), work.header)
        if recorded.token == token:
            return recorded.resumed
    raise OutputError(
        f"{partial_path(work.target)} is not here as the first process has made it: {directory} is "
        "not shared by all processes; choose an output on a file system that is"
    )
