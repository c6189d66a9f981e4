"""An output file under construction: reserved whole, written at offsets, renamed when complete."""

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from dump_activations.errors import OutputError
from dump_activations.storage.digests import Digest, RunningDigest
from dump_activations.storage.statistics import RunningStatistics, vectors_of
from dump_activations.storage.writing.batch_file import BatchFile
from dump_activations.storage.writing.handed_over import take_over
from dump_activations.storage.writing.journal import Journal, remove_journals, sync_directory
from dump_activations.storage.writing.partial import Partial
from dump_activations.storage.writing.places import Places
from dump_activations.storage.writing.recorded import JournalError, Recorded, read_journals
from dump_activations.storage.writing.records import BatchDigests, BatchRecord
from dump_activations.storage.writing.resume import edge_writer, read_back, resumable_batches
from dump_activations.storage.writing.targets import (
    check_output,
    files_of_others,
    journal_path,
    statistics_path,
)
from dump_activations.storage.writing.work import Work


def _nothing() -> None:
    pass


class OutputFile(BatchFile):
    """A file that this process begins and commits, and that others may join it in writing.

    Until `commit()` an existing target stays as it is.

    Attributes:
        unusable: why a partial file that was there was dropped; None if none was.
        token: what others join by; None where no others do.
    """

    def __init__(
        self,
        work: Work,
        partial: Partial,
        places: Places,
        journal: Journal,
        batches: Mapping[int, BatchDigests],
        *,
        statistics: RunningStatistics,
        unusable: str | None,
    ) -> None:
        """Private: `OutputFile.open` makes one."""
        super().__init__(work, partial, places, journal, batches, statistics=statistics)
        self.unusable = unusable
        self.token = journal.token
        self._specs = {spec.name: spec for spec in work.specs}
        self._digests = {spec.name: RunningDigest() for spec in work.specs}
        self._resumed = batches
        for batch, digests in batches.items():
            self._note_batch(batch, digests)

    @classmethod
    def open(
        cls,
        work: Work,
        *,
        inputs: Iterable[Path] = (),
        overwrite: bool = False,
        check: Callable[[], object] = _nothing,
        shared: bool = False,
    ) -> Self:
        """Take the space of the whole file; nothing else may fail for want of it later.

        A partial file of the same work is gone on with, whichever processes wrote it.

        Args:
            work: what the file is to hold.
            inputs: files that the target must not be.
            overwrite: drop a partial file, if there is one.
            check: called now and then while a partial file is verified; may raise.
            shared: whether other processes join.

        Raises:
            InvalidArgumentError: the format cannot hold a dtype, or the target is an input.
            OutputError: the file cannot be made, another process is making it, or there is a
                partial file of other work, or one that others can change.
        """
        target = work.target
        check_output(target, [spec.dtype for spec in work.specs], inputs=inputs)
        places = Places(work, work.layout())
        with OutputError.when(f"cannot make {target.parent}"):
            target.parent.mkdir(parents=True, exist_ok=True)
        partial = Partial.open(target, anew=overwrite)
        unusable = None
        batches: Mapping[int, BatchDigests] = {}
        statistics = RunningStatistics(vectors_of(work.specs))
        try:
            if not partial.is_new:
                try:
                    with OutputError.when(f"cannot read {partial.path}"):
                        batches = resumable_batches(partial, work, places, statistics, check)
                except JournalError as error:
                    unusable = str(error)
                    partial.close()
                    partial = Partial.open(target, anew=True)
            token = secrets.randbits(63) if shared else None
            journal = Journal(journal_path(target), work.header, token)
            file = cls(
                work,
                partial,
                places,
                journal,
                batches,
                statistics=statistics,
                unusable=unusable,
            )
            file._begin()
        except BaseException:
            partial.close()
            raise
        return file

    @property
    def last_resumed(self) -> tuple[range, BatchDigests] | None:
        """Rows and digests of the last batch that runs before have written."""
        if not self._resumed:
            return None
        last = max(self._resumed)
        return self.rows_of(range(last, last + 1)), self._resumed[last]

    def begin_ticket(self, batches: range) -> None:
        """Do nothing: pages that tickets share are this process's."""

    def write(self, name: str, data: npt.NDArray[np.uint8]) -> None:
        """Write the bytes of a tensor that does not come in batches.

        Raises:
            OutputError: the system refused; `errno` is its reason.
        """
        assert name not in self._header.tensors, name
        digest = self._write_bytes(name, 0, data)
        with self._lock:
            self._digests[name].add(0, digest)

    def _write_span(
        self, first_row: int, name: str, start: int, data: npt.NDArray[np.uint8]
    ) -> Digest:
        start += first_row * self._specs[name].row_nbytes
        return self._write_bytes(name, start, data)

    def commit(self) -> dict[str, Digest]:
        """Complete the file and give it the target's name; return each tensor's digest.

        All others must have left.

        Raises:
            OutputError: the system refused, or others did not write what is missing; an existing
                target is as it was.
        """
        with OutputError.when(f"cannot write {self.target}"):
            self._stop_sync()
            others = [] if self.token is None else self._gather()
            for name, values in self._statistics.tensors().items():
                self.write(name, values.reshape(-1).view(np.uint8))
            digests = self._whole_digests()
            layout = self._work.layout(digests)
            assert (layout.size, layout.offsets) == (self.size, self._places.layout.offsets)
            for offset, data in layout.skeleton:
                self._file.write_bytes(offset, data)
            self._file.publish()
        self.is_committed = True
        what = f"{self.target} is complete, but its directory cannot be brought to disk or tidied"
        try:
            with OutputError.when(what):
                sync_directory(self.target.parent)
                for each in others:
                    each.remove()
                    if self._statistics:
                        statistics_path(each.path).unlink(missing_ok=True)
                self._journal.remove()
        finally:
            self._close()
        return digests

    def discard(self) -> None:
        """Remove what was written, by any process; an existing target stays."""
        with suppress(OSError):
            self._stop_sync()
        with suppress(OSError):
            if self._file.is_in_place():
                remove_journals(files_of_others(self.target))
        with suppress(OSError):
            self._file.remove()
            self._journal.remove()
        self._close()

    def _begin(self) -> None:
        """Take the space of the file, and begin its one journal with the batches that it has."""
        try:
            with OutputError.when(f"cannot reserve {self.size:,} bytes for {self.target}"):
                self._file.reserve(self.size)
            self._journal.start(self._resumed)
            remove_journals(files_of_others(self.target))
        except OutputError:
            if self._resumed:
                self._close()
            else:
                self.discard()
            raise

    def _gather(self) -> list[Recorded]:
        """Take in what others have written; return their journals."""
        self._file.reopen()
        try:
            found = read_journals(self._work, edge_writer(self._file, self._places))
        except JournalError as error:
            raise OutputError(f"{self.partial} cannot be completed: {error}") from None
        self._file.sync()
        if self._file.size != self.size:
            raise OutputError(f"{self.partial} is not complete: it has another size by now")
        found = [each for each in found if each.token == self.token]
        others = [each for each in found if each.path != journal_path(self.target)]
        times = Counter(
            batch
            for each in found
            for batch, digests in each.batches.items()
            if self._places.fit(batch, digests)
        )
        for batch in range(self._header.batches):
            if times[batch] != 1:
                rows = self.rows_of(range(batch, batch + 1))
                where = f"{times[batch]} journals" if times[batch] else "no journal"
                raise OutputError(
                    f"{self.partial} is not complete: boards {rows.start:,} to {rows.stop - 1:,} "
                    f"are in {where}; the same call does the rest"
                )
        for each in others:
            for batch, digests in each.batches.items():
                self._note_batch(batch, digests)
            self._take_statistics(each)
        return others

    def _take_statistics(self, other: Recorded) -> None:
        """Add another's statistics: as it handed them over, or else of what it wrote."""
        if not self._statistics or take_over(self._statistics, other):
            return
        candidates = {batch: [digests] for batch, digests in other.batches.items()}
        found = read_back(self._file, self._places, candidates, self._statistics)
        if found != other.batches:
            raise OutputError(
                f"{self.partial} cannot be completed: it is not as it was written; the same call "
                "does the rest"
            )

    def _whole_digests(self) -> dict[str, Digest]:
        digests = {name: running.whole for name, running in self._digests.items()}
        for name, spec in self._specs.items():
            assert digests[name].nbytes == spec.nbytes, f"{name} is not complete"
        return digests

    def _write_bytes(self, name: str, start: int, data: npt.NDArray[np.uint8]) -> Digest:
        spec = self._specs[name]
        assert start + data.nbytes <= spec.nbytes, name
        return self._file.write_span(self._places.layout.offsets[name] + start, data, spec.dtype)

    def _record(self, batch: int, digests: BatchDigests) -> BatchRecord:
        with self._lock:
            self._note_batch(batch, digests)
        return BatchRecord(digests)

    def _note_batch(self, batch: int, digests: BatchDigests) -> None:
        first_row = batch * self._header.batch_rows
        for name, digest in digests.items():
            self._digests[name].add(first_row * self._specs[name].row_nbytes, digest)
