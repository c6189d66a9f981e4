"""What of an unfinished file can be trusted: batches that journals have and the disk confirms."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from dump_activations.storage.digests import Digest
from dump_activations.storage.reading.inspection import READ_NBYTES
from dump_activations.storage.statistics import RunningStatistics
from dump_activations.storage.writing.partial import Partial
from dump_activations.storage.writing.places import Places
from dump_activations.storage.writing.recorded import JournalError, read_journals
from dump_activations.storage.writing.records import BatchDigests, BatchRecord
from dump_activations.storage.writing.work import Work

# Several reads at once are what a disk is fast with.
_THREADS = 8
# Batches looked at between two looks at whether the user wants an end.
_BATCHES_AT_ONCE = 32


def resumable_batches(
    partial: Partial,
    work: Work,
    places: Places,
    statistics: RunningStatistics,
    check: Callable[[], object],
) -> dict[int, BatchDigests]:
    """Return the batches of a partial file that need not be written again.

    Each is read back. What journals have of the file's bytes is written to it first.

    Args:
        partial: the file.
        work: what it is to hold.
        places: where in it.
        statistics: to which those of the batches that are returned are added.
        check: called now and then; what it raises ends the reading.

    Raises:
        JournalError: there are none; the text says why.
        OutputError: the file is of other work, or may be changed by others.
    """
    recorded = read_journals(work, edge_writer(partial, places))
    if partial.size != places.layout.size:
        raise JournalError("it has another size than it was given")
    partial.sync()
    partial.drop_cache()
    candidates: dict[int, list[BatchDigests]] = {}
    for each in recorded:
        for batch, digests in each.batches.items():
            candidates.setdefault(batch, []).append(digests)
    resumable = read_back(partial, places, candidates, statistics, check)
    if not resumable:
        raise JournalError("no batch of it is whole")
    return resumable


def edge_writer(partial: Partial, places: Places) -> Callable[[int, BatchRecord], None]:
    """Return what writes the edges of a batch from its record into a file."""

    def write(batch: int, record: BatchRecord) -> None:
        if not record.edges or not places.fit(batch, record.digests):
            return
        for name, edges in record.edges.items():
            at, _ = places.of(range(batch, batch + 1), name)
            for start, data in edges:
                partial.write_bytes(at + start, data)

    return write


def read_back(
    partial: Partial,
    places: Places,
    candidates: Mapping[int, Sequence[BatchDigests]],
    statistics: RunningStatistics,
    check: Callable[[], object] = lambda: None,
) -> dict[int, BatchDigests]:
    """Return batches of which one of the candidates is on disk, and add up their statistics."""
    reader = _Reader(partial, places, candidates, statistics)
    batches = sorted(candidates)
    found: dict[int, BatchDigests] = {}
    executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="verify")
    try:
        for first in range(0, len(batches), _BATCHES_AT_ONCE):
            group = batches[first : first + _BATCHES_AT_ONCE]
            for batch, digests in zip(group, executor.map(reader.read, group), strict=True):
                check()
                if digests is not None:
                    found[batch] = digests
    finally:
        reader.ended.set()
        executor.shutdown(cancel_futures=True)
    return found


class _Reader:
    """Reads batches, from any thread.

    Attributes:
        ended: set where what is read is no longer wanted.
    """

    def __init__(
        self,
        partial: Partial,
        places: Places,
        candidates: Mapping[int, Sequence[BatchDigests]],
        statistics: RunningStatistics,
    ) -> None:
        self.ended = threading.Event()
        self._partial = partial
        self._places = places
        self._candidates = candidates
        self._statistics = statistics

    def read(self, batch: int) -> BatchDigests | None:
        """Return the digests of what is on disk, if it is one of the candidates."""
        statistics = self._statistics.new()
        found = {
            name: self._digest(batch, name, statistics) for name in self._places.header.tensors
        }
        if found not in self._candidates[batch]:
            return None
        self._statistics.merge(statistics.state())
        return found

    def _digest(self, batch: int, name: str, statistics: RunningStatistics) -> Digest:
        at, stop = self._places.of(range(batch, batch + 1), name)
        offset, dtype = self._places.layout.offsets[name], self._places.dtypes[name]
        whole = Digest()
        at_once = statistics.whole_vectors(name, READ_NBYTES)
        for start in range(at, stop, at_once):
            if self.ended.is_set():
                break
            nbytes = min(at_once, stop - start)
            whole += statistics.read(
                name, dtype, self._partial.fd, offset=start, nbytes=nbytes, start=start - offset
            )
        return whole
