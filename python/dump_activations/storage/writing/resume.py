"""What of an unfinished file can be trusted: batches that journals have and the disk confirms."""

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from dump_activations import _rust
from dump_activations.storage.digests import Digest
from dump_activations.storage.reading.inspection import READ_NBYTES
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
    partial: Partial, work: Work, places: Places, check: Callable[[], object]
) -> dict[int, BatchDigests]:
    """Return the batches of a partial file that need not be written again.

    Each is read back. What journals have of the file's bytes is written to it first.

    Args:
        partial: the file.
        work: what it is to hold.
        places: where in it.
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
    with closing(_read_back(partial, places, sorted(candidates), check)) as found:
        resumable = {batch: digests for batch, digests in found if digests in candidates[batch]}
    if not resumable:
        raise JournalError("no batch of it is whole")
    return resumable


def edge_writer(partial: Partial, places: Places) -> Callable[[int, BatchRecord], None]:
    """Return what writes the edges of a batch from its record into a file."""

    def write(batch: int, record: BatchRecord) -> None:
        if not places.fit(batch, record.digests):
            return
        for name, edges in record.edges.items():
            at, _ = places.of(range(batch, batch + 1), name)
            for start, data in edges:
                partial.write_bytes(at + start, data)

    return write


def _read_back(
    partial: Partial, places: Places, batches: Sequence[int], check: Callable[[], object]
) -> Generator[tuple[int, BatchDigests], None, None]:
    """Yield batches with the digests of what is on disk."""
    ended = threading.Event()

    def digest(offset: int, nbytes: int, dtype: str) -> Digest:
        whole = Digest()
        for start in range(0, nbytes, READ_NBYTES):
            if ended.is_set():
                break
            some = min(READ_NBYTES, nbytes - start)
            whole += Digest(some, *_rust.digest_span(partial.fd, offset + start, some, dtype))
        return whole

    def digests(batch: int) -> BatchDigests:
        found = {}
        for name in places.header.tensors:
            at, stop = places.of(range(batch, batch + 1), name)
            found[name] = digest(at, stop - at, places.dtypes[name])
        return found

    executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="verify")
    try:
        for first in range(0, len(batches), _BATCHES_AT_ONCE):
            group = batches[first : first + _BATCHES_AT_ONCE]
            for found in zip(group, executor.map(digests, group), strict=True):
                check()
                yield found
    finally:
        ended.set()
        executor.shutdown(cancel_futures=True)
