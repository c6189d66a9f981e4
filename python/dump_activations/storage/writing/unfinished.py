"""Looks at an unfinished file, which another process may be writing, and leaves it as it is."""

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path

from dump_activations.dtypes import TensorSpec
from dump_activations.errors import OutputError
from dump_activations.storage.writing.private_files import open_ours
from dump_activations.storage.writing.recorded import JournalError, Recorded, read_journal
from dump_activations.storage.writing.records import Header
from dump_activations.storage.writing.targets import (
    journal_path,
    journals_of_others,
    partial_path,
    target_of,
)

_SUFFIX = partial_path(Path("x")).suffix
_NO_HEADER = Header({}, 0, 1, ())


@dataclass(frozen=True)
class Unfinished:
    """A partial file, as its journals have it: nothing of its data is read.

    Attributes:
        path: where it is.
        size: its bytes, which are those of the finished file.
        header: the work that it is of.
        batches: numbers of those that are on disk.
        is_being_written: whether a process is at work on it.
        written_at: when a journal was last written, in seconds of the epoch.
    """

    path: Path
    size: int
    header: Header
    batches: frozenset[int]
    is_being_written: bool
    written_at: float

    @property
    def rows(self) -> int:
        """Boards that are on disk."""
        return self.header.count_rows(self.batches)

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors of the finished file."""
        try:
            return [
                TensorSpec(name, dtype, tuple(shape))
                for name, dtype, shape in json.loads(self.header.work["tensors"])
            ]
        except (AssertionError, KeyError, TypeError, ValueError):
            raise OutputError(f"{self.path}: its journal has no tensors") from None


def find_unfinished(path: str | os.PathLike[str]) -> Unfinished | None:
    """Look at the partial file of this name, or of a target that there is not yet.

    Returns None where there is none.

    Raises:
        OutputError: it may be changed by others, or its journals tell nothing.
    """
    target = target_of(path)
    if target.suffix == _SUFFIX:
        target = target.with_suffix("")
    elif target.exists():
        return None
    partial = partial_path(target)
    if not os.path.lexists(partial):
        return None
    with OutputError.when(f"cannot read {partial}"):
        size, is_locked = partial.stat().st_size, is_being_written(partial)
        journals = _read_journals(target)
    header = journals[0].header
    batches = {batch for each in journals if each.header == header for batch in each.batches}
    written_at = max(each.file.st_mtime for each in journals)
    return Unfinished(partial, size, header, frozenset(batches), is_locked, written_at)


def _read_journals(target: Path) -> list[Recorded]:
    """Read the journals that can be read: of those of one file the first says what it is of."""
    found: list[Recorded] = []
    errors: list[JournalError] = []
    for path in (journal_path(target), *journals_of_others(target)):
        try:
            theirs = read_journal(path, _NO_HEADER)
            found.append(read_journal(path, theirs.header))
        except JournalError as error:
            errors.append(error)
    if not found:
        raise OutputError(f"{partial_path(target)}: {errors[0]}")
    return found


def is_being_written(partial: Path) -> bool:
    """Whether a dump is at work on a partial file; one that starts at this moment tries again.

    Raises:
        OutputError: it may be changed by others.
        OSError: it cannot be opened.
    """
    fd = open_ours(partial, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # A file system without locks.
        pass
    finally:
        os.close(fd)
    return False
