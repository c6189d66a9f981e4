"""What the journals beside an unfinished file hold, whichever processes wrote them."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dump_activations.errors import OutputError, switch
from dump_activations.storage.writing.private_files import open_ours
from dump_activations.storage.writing.records import (
    BatchDigests,
    BatchRecord,
    Header,
    parse_header,
    parse_record,
)
from dump_activations.storage.writing.targets import journal_path, journals_of_others, partial_path
from dump_activations.storage.writing.work import Work

_MAX_HEADER_NBYTES = 1 << 20

Place = Callable[[int, BatchRecord], object]
"""Takes each batch and its record while a journal is read: edges are not kept beyond that."""


def _nowhere(_batch: int, _record: BatchRecord) -> None:
    pass


@dataclass(frozen=True)
class Recorded:
    """What a journal holds.

    Attributes:
        path: the journal.
        file: which file that was.
        header: what its batches belong to.
        token: of the processes that share the file; None for a process alone.
        resumed: batches that the journal began with, where there is a token.
        batches: all that are recorded.
    """

    path: Path
    file: os.stat_result
    header: Header
    token: int | None
    resumed: frozenset[int]
    batches: Mapping[int, BatchDigests]

    def remove(self) -> None:
        """Remove the journal, if its name still leads to it and it is as it was read."""
        with suppress(FileNotFoundError):
            found = self.path.lstat()
            # The number of a file that was removed may be that of the next one.
            is_as_read = found.st_mtime_ns == self.file.st_mtime_ns
            if is_as_read and os.path.samestat(self.file, found):
                self.path.unlink()


class JournalError(ValueError):
    """There is nothing in a journal to go on from; the text says why."""


def read_journals(work: Work, place: Place = _nowhere) -> list[Recorded]:
    """Read the journals of all processes that wrote the partial file.

    The first of them that can be read says what the file belongs to; another that does not agree is
    left over from a file that was there before.

    Args:
        work: what the batches that are wanted belong to.
        place: called with each batch.

    Raises:
        JournalError: none can be read; the text says why the first cannot.
        OutputError: the file is of other work, or a journal may have been changed by others.
    """
    found: list[Recorded] = []
    errors: list[JournalError] = []
    for path in (journal_path(work.target), *journals_of_others(work.target)):
        try:
            recorded = read_journal(path, work.header, place)
        except JournalError as error:
            errors.append(error)
            continue
        if recorded.header == work.header:
            found.append(recorded)
        elif not found:
            raise OutputError(
                f"{partial_path(work.target)} is left over from other work, which differs in "
                f"{work.differences(recorded.header.work)}; repeat that work, or start anew by "
                f"{switch('overwrite')}"
            )
    if not found:
        raise errors[0]
    return found


def read_journal(path: Path, header: Header, place: Place = _nowhere) -> Recorded:
    """Read the header of a journal and, if it is `header`, the batches that are recorded.

    Raises:
        JournalError: there is no journal, or none that can be read.
        OutputError: there is one that is not this user's alone.
    """
    with _opened(path) as file:
        theirs = _read_header(file)
        token, resumed = None, frozenset[int]()
        batches: dict[int, BatchDigests] = {}
        for record in _records(file, header) if theirs == header else ():
            if isinstance(record, int):
                token, resumed = record, frozenset(batches)
            else:
                batch, of_batch = record
                batches[batch] = of_batch.digests
                place(batch, of_batch)
        return Recorded(path, os.fstat(file.fileno()), theirs, token, resumed, batches)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        file = os.fdopen(open_ours(path, os.O_RDONLY), "rb")
    except OutputError:
        raise
    except FileNotFoundError:
        raise JournalError("it has no journal") from None
    except OSError as error:
        raise _unreadable(error) from None
    with file:
        yield file


def _read_header(file: BinaryIO) -> Header:
    try:
        return parse_header(_read_line(file, _MAX_HEADER_NBYTES))
    except ValueError:
        raise JournalError("its journal is damaged") from None


def _records(file: BinaryIO, header: Header) -> Iterator[int | tuple[int, BatchRecord]]:
    longest = header.max_record_nbytes
    nbytes = os.fstat(file.fileno()).st_size - file.tell()
    if nbytes > (header.batches + 1) * longest:
        raise JournalError("its journal is damaged")
    while line := _read_line(file, longest):
        try:
            record = parse_record(header, line)
        except ValueError:
            return
        yield record


def _read_line(file: BinaryIO, longest: int) -> bytes:
    try:
        return file.readline(longest)
    except OSError as error:
        raise _unreadable(error) from None


def _unreadable(error: OSError) -> JournalError:
    return JournalError(f"its journal cannot be read: {error.strerror}")
