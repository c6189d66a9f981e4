"""What a run will find at its target and beside it, known without touching either."""

import os
from collections.abc import Iterator

from dump_activations.errors import OutputError
from dump_activations.storage.writing.recorded import JournalError, read_journals
from dump_activations.storage.writing.targets import partial_path
from dump_activations.storage.writing.unfinished import is_being_written
from dump_activations.storage.writing.work import Work, find_existing


def outlook(work: Work, *, resume: bool, overwrite: bool) -> Iterator[str]:
    """Say what becomes of the files that are there.

    Args:
        work: what the run is to make.
        resume: whether it leaves a complete file of this work as it is.
        overwrite: whether it drops a partial file.

    Raises:
        OutputError: the run is going to be refused.
    """
    existing, partial = find_existing(work.target), partial_path(work.target)
    has_partial = os.path.lexists(partial)
    if has_partial and not partial.is_symlink() and is_being_written(partial):
        raise OutputError(f"another dump to {work.target} is running")
    if resume and existing and existing.is_of(work):
        yield f"{work.target} is complete already: there will be nothing to do"
        if has_partial:
            yield f"{partial} is beside it, and stays: an unfinished dump of other work"
        return
    if has_partial and overwrite:
        yield f"{partial} will be dropped"
    elif has_partial:
        try:
            journals = read_journals(work)
        except JournalError as error:
            yield f"{partial} will be started anew: {error}"
        else:
            rows = work.header.count_rows({batch for each in journals for batch in each.batches})
            yield f"{partial} will be gone on with: it has {rows:,} of {work.header.rows:,} boards"
    if existing:
        yield f"{work.target} will be replaced when the new file is whole"
