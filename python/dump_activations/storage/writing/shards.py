"""The files of a dump, which one process or many write: each takes the next that is free.

Processes do not talk to one another. A file is free where it is neither finished nor locked. The
files under their final names are all that counts, so a process may come and go at any time.
docs/architecture.md has the rules of the lock.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from dump_activations.errors import OutputError, note, option, size_text
from dump_activations.progress import begin
from dump_activations.remote.upload import MOST_LOCAL, uploads_of
from dump_activations.storage.shards import list_names, list_shards
from dump_activations.storage.writing.card import card
from dump_activations.storage.writing.existing import (
    Existing,
    check_partial,
    find_existing,
    find_unfinished,
    header_of,
    mixed_error,
)
from dump_activations.storage.writing.journal import JournalError, read_journal, remove_journal
from dump_activations.storage.writing.output import OutputFile
from dump_activations.storage.writing.partial import BusyError, Partial
from dump_activations.storage.writing.paths import (
    JOURNAL,
    PARTIAL,
    Mount,
    check_space,
    journal_path,
    partial_path,
    probe,
)
from dump_activations.storage.writing.work import COMPUTED_BY_KEY, FileWork

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
    """The files of a dump, as a context manager that suspends those that it has open."""

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
        self.files = list(files)  # that this process may write
        self.open_files: list[OutputFile] = []
        self.replaced: dict[Path, Existing] = {}  # of other work, to be replaced
        self.written = 0  # files that this process finished
        self.commit_seconds = 0.0  # that it took to complete and rename them
        self._own_boards = 0
        self._place = place
        self._overwrite = overwrite
        self._check = check
        self.finished: dict[Path, Existing] = {}  # whichever process wrote them
        self._uploads = uploads_of(self._directory)
        self._start = place.rank * len(self.files) // place.size
        for file in self.files:
            if not self._is_finished(file, at_start=True):
                check_partial(file, overwrite=overwrite)

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        self.suspend()

    @property
    def boards_of_others(self) -> int:
        """Boards of finished files that this process did not write."""
        return self._count_boards() - self._own_boards

    @property
    def url(self) -> str | None:
        """Where the output is uploaded to; None for a local one."""
        return None if self._uploads is None else self._uploads.url_of(self.files[0].work.whole)

    @property
    def missing(self) -> list[FileWork]:
        """Files that were not finished when this process looked last."""
        return [file for file in self.files if file.target not in self.finished]

    def take(self) -> OutputFile | None:
        """Lock and open the next file that is free; None where no file is free now.

        Raises:
            OutputError: the file cannot be made, or another process writes other work there.
        """
        has_locks = self._mount.has_locks and self._uploads is None
        if not has_locks and self._place.size > 1:
            # This process has no other files from now on, so it returns after its share.
            self.files = self.files[self._place.rank :: self._place.size]
            self._place, self._start = Place(), 0
        if self._uploads is not None:
            self._uploads.wait(self._check, MOST_LOCAL - 1)
            self._uploads.refresh(self.files[0].work.whole.stem)
        under_way = {each.work for each in self.open_files}
        for file in [*self.files[self._start :], *self.files[: self._start]]:
            if file in under_way or file.target in self.finished or self._is_finished(file):
                continue
            if (taken := self._open(file)) is not None:
                # The next search starts behind it, where no other process is likely to be.
                self._start = self.files.index(file) + 1
                self.open_files.append(taken)
                return taken
        return None

    def next(self) -> OutputFile | None:
        """Take the next file, and wait while others write the rest; None when all are finished.

        A file whose process ended becomes free, because the system releases its lock.
        """
        next_note = time.monotonic() + _FIRST_NOTE_SECONDS
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
        file.commit()
        self.commit_seconds += time.perf_counter() - started
        self.written += 1
        self.open_files.remove(file)
        if self._is_finished(file.work):
            self._own_boards += file.work.rows
            self._upload(file.work)

    def suspend(self, *, discard: bool = False) -> int:
        """Leave the open files for a later run, or discard them; return the boards that are kept.

        Boards in finished files count.
        """
        kept = [file.suspend(discard=discard) for file in self.open_files]
        self.open_files = []
        return self._count_boards() + sum(kept)

    def tidy(self) -> None:
        """Remove journals next to finished files, which a kill after the rename leaves there.

        Where the output is remote, the finished files are uploaded then.
        """
        names = list_names(self._directory)
        for file in self.files:
            if journal_path(file.target).name in names and file.target in self.finished:
                what = f"{file.target} is complete, but its journal cannot be removed"
                with suppress(BusyError), OutputError.when(what):
                    partial = Partial.open(file.target, self._mount)
                    if partial.is_new:
                        remove_journal(file.target)
                        partial.remove()
                    else:
                        partial.close()
        if self._uploads is not None:
            begin("uploading the output")
            for file in self.files:
                self._upload(file)
            self._uploads.wait(self._check, 0)

    def _upload(self, file: FileWork) -> None:
        if self._uploads is not None:
            self._uploads.start(file.target, card(file.work, self._uploads.url_of(file.work.whole)))

    @cached_property
    def _mount(self) -> Mount:
        return probe(self.files[0].target)

    @property
    def _directory(self) -> Path:
        return self.files[0].target.parent

    def _open(self, file: FileWork) -> OutputFile | None:
        """Lock and open one file; None where another process has it, or finished it."""
        if not self._mount.has_locks:
            self._check_not_recent(file)
        try:
            partial = Partial.open(file.target, self._mount)
        except BusyError:
            if file.shard is None:
                raise
            return None
        try:
            # A network file system may answer a look at one name from its cache, and rereads a
            # directory that is opened.
            if file.target.name in list_names(self._directory) and self._is_finished(file):
                partial.remove()
                return None
            existing = self.replaced.get(file.target)
            taken = OutputFile(
                file,
                partial,
                overwrite=self._overwrite,
                replaced=existing.content if existing else None,
                check=self._check,
            )
        except BaseException:
            partial.close()
            raise
        try:
            self._look_again(file)
        except OutputError:
            taken.suspend()
            raise
        return taken

    def _check_not_recent(self, file: FileWork) -> None:
        """Refuse a partial file that another process may be writing, where locks do not work."""
        with suppress(JournalError):
            modified = read_journal(file.target, header_only=True).modified
            if time.time() + self._mount.clock_ahead - modified < _RECENT_SECONDS:
                raise OutputError(
                    f"{partial_path(file.target)} was written less than a minute ago, and this "
                    "file system has no locks that tell whether its process is still at work; wait "
                    f"a minute, or give each process its own {option('shards')}"
                )

    def _count_boards(self) -> int:
        return sum(file.rows for file in self.files if file.target in self.finished)

    def _is_finished(self, file: FileWork, *, at_start: bool = False) -> bool:
        """Return True where the finished file is there.

        Raises:
            OutputError: the file there is of other work, and `overwrite` does not replace it: it
                replaces only what was there at the start.
        """
        existing = find_existing(file.target)
        if existing is None:
            return False
        if file.is_described_by(existing.metadata):
            kept = {COMPUTED_BY_KEY: existing.computed_by}  # Many shards have much metadata.
            self.finished[file.target] = replace(existing, metadata=kept)
            return True
        if at_start and self._overwrite:
            self.replaced[file.target] = existing
        before = self.replaced.get(file.target)
        if before is None or before.content != existing.content:
            raise existing.refusal(file.work)
        return False

    def _look_again(self, file: FileWork) -> None:
        """Refuse where a process of other work, or of another cut, came at the same moment.

        Each of two such processes makes its journal before it looks, so that one sees the other.
        """
        work, names = file.work, list_names(self._directory)
        shards = {
            path: shard
            for ending in ("", PARTIAL, JOURNAL)
            for shard, path in list_shards(work.whole, ending, names).items()
        }
        if file.shard is None:
            if shards:
                raise mixed_error(work.whole, work, {shard.count for shard in shards.values()})
            return
        for path in (work.whole, partial_path(work.whole)):
            if path.name in names:
                raise mixed_error(path, work, {file.shard.count})
        for path, shard in shards.items():
            if shard.count != file.shard.count:
                raise OutputError(
                    f"{path} is of another cut of {work.whole}; one dump has one "
                    f"{option('shard_size')}: remove one of the cuts, or choose another output"
                )
            if path == shard.path and path not in self.finished:
                self._is_finished(work.shard(shard))
            elif path.name.endswith(JOURNAL) and shard != file.shard:
                check_partial(work.shard(shard), overwrite=self._overwrite)

    def _is_whole(self) -> bool:
        """Return True where one fresh listing shows every file finished."""
        names = list_names(self._directory)
        for file in self.files:
            if file.target.name not in names:
                self.finished.pop(file.target, None)  # Somebody deleted it since.
        return all(file.target in self.finished or self._is_finished(file) for file in self.files)

    @property
    def files_are(self) -> str:
        """The beginning of a sentence about the files: "activations.pt is"."""
        shards = [each.shard for each in self.files if each.shard is not None]
        name = self.url or str(self.files[0].work.whole)
        if shards and len(shards) < shards[0].count:
            return f"shards {shards[0].number} to {shards[-1].number} of {name} are"
        return f"{name} is"

    def check_space(self) -> None:
        """Raise OutputError where the disk has no room for the missing files."""
        files = self.missing if self._uploads is None else self.missing[:MOST_LOCAL]
        check_space([each.target for each in files], sum(each.tensor_nbytes for each in files))

    def notes(self) -> Iterator[str]:
        """Describe what becomes of finished files that are there."""
        if not self.missing:
            yield f"{self.files_are} already complete"
            return
        for existing in self.replaced.values():
            boards = "" if "shard" in existing.metadata else existing.metadata.get("n_samples", "")
            holds = f", {int(boards):,} boards" if boards.isdecimal() and len(boards) < 20 else ""
            size = size_text(existing.size)
            yield f"{existing.path} ({size}{holds}) is replaced when the new file is whole"
        if finished := len(self.files) - len(self.missing):
            yield f"{finished:,} of {len(self.files):,} shards are already complete"

    def notes_on_partial_files(self) -> Iterator[str]:
        """Describe what a run would do with each partial file. None is locked or changed.

        Raises:
            OutputError: another process is writing the only file.
        """
        for file in self.missing:
            partial = partial_path(file.target)
            try:
                found = find_unfinished(partial)
            except OutputError as error:
                yield f"{error}; it will be started over"
                continue
            if found is None:
                continue
            if found.header != file.header:
                yield f"{partial} is of other work and will be dropped"
            elif found.is_being_written and file.shard is None:
                raise OutputError(
                    f"another dump to {file.target} is running; wait for it, or choose another "
                    "output"
                )
            elif found.is_being_written:
                yield f"{partial} is being written by another process"
            else:
                yield f"{partial} will be resumed: it has {found.rows:,} of {file.rows:,} boards"

    def _waiting_text(self) -> str:
        texts = []
        for file in self.missing[:3]:
            header = header_of(file.target)
            holder = f" (host {header.host}, process {header.pid})" if header else ""
            texts.append(f"{file.target.name}{holder}")
        more = f" and {len(self.missing) - 3:,} more" if len(self.missing) > 3 else ""
        return f"waiting for {', '.join(texts)}{more}"
