"""What of an unfinished file can be trusted: batches that the journal has and the disk confirms."""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count, islice, takewhile

from dump_activations import _rust
from dump_activations.errors import OutputError, switch
from dump_activations.storage.digests import Digest
from dump_activations.storage.formats.layout import Layout
from dump_activations.storage.reading.inspection import READ_NBYTES
from dump_activations.storage.writing.journal import BatchDigests, JournalError, read_journal
from dump_activations.storage.writing.partial import Partial
from dump_activations.storage.writing.targets import journal_path
from dump_activations.storage.writing.work import Work

# Several reads at once are what a disk is fast with.
_THREADS = 8
# Batches looked at between two looks at whether the user wants an end.
_BATCHES_AT_ONCE = 32


def resumable_batches(
    partial: Partial, work: Work, layout: Layout, check: Callable[[], object]
) -> dict[int, BatchDigests]:
    """Return the batches of a partial file that need not be written again.

    They have no gap before them: several writers finish batches out of order, so that those past a
    gap are few. Every one of them is read back.

    Args:
        partial: the file.
        work: what it is to hold.
        layout: that of the finished file.
        check: called now and then; what it raises ends the reading.

    Raises:
        JournalError: there are none; the text says why.
        OutputError: the file is of other work, or may be changed by others.
    """
    header, batches = read_journal(journal_path(work.target), work.header)
    if header != work.header:
        raise OutputError(
            f"{partial.path} is left over from other work, which differs in "
            f"{work.differences(header.work)}; repeat that work, or start anew by "
            f"{switch('overwrite')}"
        )
    if partial.size != layout.size:
        raise JournalError("it has another size than it was given")
    partial.drop_cache()
    with closing(_confirmed(partial, work, layout, batches, check)) as confirmed:
        resumable = {batch: batches[batch] for batch in confirmed}
    if not resumable:
        raise JournalError("no batch of it is whole")
    return resumable


def until_gap(batches: Iterable[int]) -> Iterator[int]:
    """Yield the numbers of batches, from 0, that have no gap before them."""
    return takewhile(frozenset(batches).__contains__, count())


def _confirmed(
    partial: Partial,
    work: Work,
    layout: Layout,
    batches: Mapping[int, BatchDigests],
    check: Callable[[], object],
) -> Generator[int, None, None]:
    """Yield batches until one of them is not on disk as it was written."""
    specs = {spec.name: spec for spec in work.specs}
    ended = threading.Event()

    def digest(offset: int, nbytes: int, dtype: str) -> Digest:
        whole = Digest()
        for start in range(0, nbytes, READ_NBYTES):
            if ended.is_set():
                break
            some = min(READ_NBYTES, nbytes - start)
            whole += Digest(some, *_rust.digest_span(partial.fd, offset + start, some, dtype))
        return whole

    def is_on_disk(batch: int) -> bool:
        first_row = batch * work.header.batch_rows
        rows = work.header.rows_in(batch + 1) - first_row
        return all(
            known
            == digest(
                layout.offsets[name] + first_row * specs[name].row_nbytes,
                rows * specs[name].row_nbytes,
                specs[name].dtype,
            )
            for name, known in batches[batch].items()
        )

    numbers = until_gap(batches)
    executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="verify")
    try:
        while group := list(islice(numbers, _BATCHES_AT_ONCE)):
            for batch, is_whole in zip(group, executor.map(is_on_disk, group), strict=True):
                check()
                if not is_whole:
                    return
                yield batch
    finally:
        ended.set()
        executor.shutdown(cancel_futures=True)
