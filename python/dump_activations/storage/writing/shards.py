"""The files of a dump, which one process or many write: each takes the next that is free.

Processes do not talk to one another. A file is free where it is neither finished nor locked. The
files under their final names are all that counts, so a process may come and go at any time.
docs/architecture.md has the rules of the lock.
"""

import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dump_activations.errors import OutputError, note, option
from dump_activations.storage.shards import list_shards
from dump_activations.storage.writing.existing import (
    Existing,
    Finished,
    find_existing,
    header_of,
    mixed_error,
)
from dump_activations.storage.writing.journal import JournalError, read_journal, remove_journal
from dump_activations.storage.writing.output import OtherWorkError, OutputFile
from dump_activations.storage.writing.partial import BusyError, Partial, is_locked
from dump_activations.storage.writing.paths import (
    JOURNAL,
    PARTIAL,
    journal_path,
    partial_path,
)
from dump_activations.storage.writing.work import FileWork

POLL_SECONDS = 0.2
_FIRST_NOTE_SECONDS = 10.0
_NOTE_SECONDS = 60.0
# Without locks, a journal that changed this recently is taken for one that is being written.
_RECENT_SECONDS = 60.0


@dataclass(frozen=True)
class Place:
    """One of several processes that a launcher started. By default a process is alone."""

    rank: int = 0
    size: int = 1


class Output:
    """The files of a dump, as a context manager that suspends those that it has open.

    Attributes:
        files: the files that this process may write.
        found: boards of files that were finished when the process came.
        written: number of files that this process finished.
        commit_seconds: time that it took to complete and rename them.
    """

    def __init__(
        self,
        files: Sequence[FileWork],
        *,
        place: Place = Place(),
        overwrite: bool = False,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        """Look at what is there. Nothing is created or changed.

        Args:
            files: the files to write, in the order of their boards.
            place: where to start among them; how to split them where locks do not work.
            overwrite: replace finished files of other work, and drop partial files of other work.
            check: called while the process waits or verifies; may raise.

        Raises:
            OutputError: files of other work are there.
        """
        self.files = list(files)
        self.open_files: list[OutputFile] = []
        self.written = 0
        self._own_boards = 0
        self.commit_seconds = 0.0
        self._place = place
        self._overwrite = overwrite
        self._check = check
        self._finished: dict[Path, Finished] = {}
        self._replaceable: dict[Path, Existing] = {}
        start = place.rank * len(self.files) // place.size
        self._order = [*self.files[start:], *self.files[:start]]
        for file in self.files:
            self._look(file)
        self.found = self._count_boards()

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.open_files:
            file.suspend()

    @property
    def boards_of_others(self) -> int:
        """Boards of finished files that this process did not write."""
        return self._count_boards() - self._own_boards

    @property
    def finished(self) -> Collection[Finished]:
        """The finished files, whichever process wrote them."""
        return self._finished.values()

    @property
    def replaced(self) -> list[Existing]:
        """Files of other work that this call replaces."""
        return list(self._replaceable.values())

    @property
    def missing(self) -> list[FileWork]:
        """Files that were not finished when this process looked last."""
        return [file for file in self.files if file.target not in self._finished]

    def take(self) -> OutputFile | None:
        """Lock and open the next file that is free; None where no file is free now.

        Raises:
            OutputError: the file cannot be made, or another process writes other work there.
        """
        under_way = {each.work for each in self.open_files}
        for file in list(self._order):
            if file in under_way or file not in self._order or self._is_finished(file):
                continue
            if (taken := self._take(file)) is not None:
                # The next search starts behind it, where no other process is likely to be.
                start = self._order.index(file) + 1
                self._order = [*self._order[start:], *self._order[:start]]
                self.open_files.append(taken)
                return taken
        return None

    def next(self) -> OutputFile | None:
        """Take the next file, and wait while others write the rest; None when all are finished.

        A file whose process died becomes free, because the system releases its lock.
        """
        started = time.monotonic()
        next_note = started + _FIRST_NOTE_SECONDS
        while True:
            if (taken := self.take()) is not None:
                return taken
            if self._is_whole():
                self.tidy()
                return None
            self._check()
            time.sleep(POLL_SECONDS)
            if time.monotonic() >= next_note:
                next_note = time.monotonic() + _NOTE_SECONDS
                note(self._waiting_text())

    def commit(self, file: OutputFile) -> None:
        """Give a file that is written whole its final name."""
        started = time.perf_counter()
        self._finished[file.work.target] = Finished(file.size, file.commit(), file.computed_by)
        self.commit_seconds += time.perf_counter() - started
        self.written += 1
        self._own_boards += file.work.rows
        self.open_files.remove(file)

    def suspend(self, *, discard: bool = False) -> int:
        """Leave the open files for a later run, or discard them; return the boards that are kept.

        Boards in finished files count.
        """
        kept = self._count_boards()
        for file in self.open_files:
            if discard:
                file.discard()
            else:
                kept += file.suspend()
        self.open_files = []
        return kept

    def _take(self, file: FileWork) -> OutputFile | None:
        try:
            partial = Partial.open(
                file.target, is_finished=lambda: self._is_finished(file, by_listing=True)
            )
        except BusyError:
            if file.shard is None:
                raise
            return None
        if partial is None:
            return None
        if not partial.has_lock and not self._may_write_without_lock(file):
            partial.remove() if partial.is_new else partial.close()
            return None
        replaced = self._replaceable.get(file.target)
        taken = OutputFile.begin(
            file,
            partial,
            start_over=self._overwrite and self._is_of_other_work(file),
            replaced=replaced.found if replaced else None,
            check=self._check,
        )
        try:
            self._look_again(file)
        except OutputError:
            taken.suspend()
            raise
        return taken

    def _may_write_without_lock(self, file: FileWork) -> bool:
        """Split the files by rank where locks do not work, or refuse what another may write."""
        if self._place.size > 1:
            # From now on this process has no other files, so it returns after its share.
            self.files = self.files[self._place.rank :: self._place.size]
            self._order = [each for each in self._order if each in self.files]
            self._place = Place()
            return file in self.files
        with suppress(JournalError):
            if time.time() - read_journal(file.target).modified < _RECENT_SECONDS:
                raise OutputError(
                    f"{partial_path(file.target)} was written less than a minute ago, and this "
                    "file system has no locks that tell whether its process is still at work; wait "
                    f"a minute, or give each process its own {option('shards')}"
                )
        return True

    def _count_boards(self) -> int:
        return sum(file.rows for file in self.files if file.target in self._finished)

    def _look(self, file: FileWork) -> None:
        """Look at one file before the run: is it finished, replaceable, or in the way?"""
        existing = find_existing(file.target)
        if existing is not None and existing.is_of(file):
            self._finished[file.target] = existing.finished
            return
        if existing is not None:
            if not self._overwrite:
                raise existing.refusal(file.work)
            self._replaceable[file.target] = existing
        self._check_partial(file)

    def _check_partial(self, file: FileWork) -> None:
        """Raise where a partial file is of other work, unless `overwrite` may start it over."""
        if self._is_of_other_work(file):
            path, header = partial_path(file.target), header_of(file.target)
            if not self._overwrite or is_locked(path):
                raise OtherWorkError(path, file.work.differences(header.work) if header else "")

    def _is_of_other_work(self, file: FileWork) -> bool:
        header = header_of(file.target) if os.path.lexists(partial_path(file.target)) else None
        return header is not None and header != file.header

    def _is_finished(self, file: FileWork, *, by_listing: bool = False) -> bool:
        """Return True where the finished file is there; raise where it is of other work.

        Args:
            file: the file.
            by_listing: list the directory. A network file system may answer a look at one name from
                its cache, and rereads a directory that is opened.
        """
        if file.target in self._finished and not by_listing:
            return True
        if by_listing and file.target.name not in os.listdir(file.target.parent):  # noqa: PTH208
            return False
        existing = find_existing(file.target)
        if existing is None or self._may_replace(existing):
            return False
        if not existing.is_of(file):
            raise existing.refusal(file.work)
        self._finished[file.target] = existing.finished
        return True

    def _may_replace(self, existing: Existing) -> bool:
        """Return True for a file of other work that was there at the start, with `overwrite`."""
        before = self._replaceable.get(existing.path)
        return before is not None and before.content == existing.content

    def _look_again(self, file: FileWork) -> None:
        """Refuse where a process of other work, or of another cut, came at the same moment.

        Each of two such processes makes its journal before it looks, so that one sees the other.
        """
        whole = file.work.whole
        if file.shard is None:
            shards = [*list_shards(whole), *list_shards(whole, PARTIAL)]
            if shards:
                raise mixed_error(whole, file.work, {shard.count for shard in shards})
            return
        for path in (whole, partial_path(whole)):
            if os.path.lexists(path):
                raise mixed_error(path, file.work, {file.shard.count})
        ours = {each.target: each for each in file.work.files(file.shard.count)}
        for ending in ("", PARTIAL, JOURNAL):
            for shard, path in list_shards(whole, ending).items():
                other = ours.get(shard.path)
                if other is None:
                    raise OutputError(
                        f"{path} is of another cut of {whole}; one dump has one "
                        f"{option('shard_size')}: remove one of the cuts, or choose another output"
                    )
                if ending == JOURNAL and shard != file.shard:
                    self._check_partial(other)
                if not ending:
                    self._is_finished(other)

    def _is_whole(self) -> bool:
        """Return True where one fresh listing shows every file finished."""
        with OutputError.when(f"cannot list {self.files[0].target.parent}"):
            names = set(os.listdir(self.files[0].target.parent))  # noqa: PTH208
        for file in self.files:
            if file.target.name not in names:
                self._finished.pop(file.target, None)  # Somebody deleted it since.
        return all(self._is_finished(file) for file in self.files)

    def tidy(self) -> None:
        """Remove journals next to finished files, which a kill after the rename leaves there."""
        for file in self.files:
            if os.path.lexists(journal_path(file.target)) and file.target in self._finished:
                with suppress(BusyError):
                    tidy(file.target)

    def _waiting_text(self) -> str:
        texts = []
        for file in self.missing[:3]:
            header = header_of(file.target)
            holder = f" (host {header.host}, process {header.pid})" if header else ""
            texts.append(f"{file.target.name}{holder}")
        more = f" and {len(self.missing) - 3:,} more" if len(self.missing) > 3 else ""
        return f"waiting for {', '.join(texts)}{more}"


def tidy(target: Path) -> None:
    """Remove what a killed process left next to a finished file, under the lock of its name."""
    partial = Partial.open(target)
    if partial is not None and partial.is_new:
        remove_journal(target)
        partial.remove()
    elif partial is not None:
        partial.close()
