"""Files at an output and next to it before a run: finished files, partial files, shards.

Every decision about them is made here. `choose_shards` decides how the run is cut.
docs/file-format.md, "Already there", has the rules.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dump_activations.dtypes import TensorSpec
from dump_activations.errors import OutputError, option, switch
from dump_activations.storage.digests import Digest
from dump_activations.storage.reading.inspection import inspect
from dump_activations.storage.shards import list_shards
from dump_activations.storage.writing.journal import Header, JournalError, read_header, read_journal
from dump_activations.storage.writing.output import OtherWorkError
from dump_activations.storage.writing.partial import is_locked
from dump_activations.storage.writing.paths import PARTIAL, partial_path, target_of
from dump_activations.storage.writing.work import COMPUTED_BY_KEY, FINGERPRINT_KEY, FileWork, Work


@dataclass(frozen=True)
class Finished:
    """A file under its final name.

    Attributes:
        size: its bytes.
        digests: of each tensor.
        computed_by: text of the devices and threads that computed it.
    """

    size: int
    digests: Mapping[str, Digest]
    computed_by: str


@dataclass(frozen=True)
class Existing:
    """A file at an output's name.

    Attributes:
        path: where it is.
        found: its size, its times and its inode.
        metadata: empty where it is not a whole dump.
        digests: of each tensor, as it stores them.
    """

    path: Path
    found: os.stat_result
    metadata: Mapping[str, str]
    digests: Mapping[str, Digest]

    @property
    def finished(self) -> Finished:
        """The facts of the file as one of a dump's finished files."""
        computed_by = self.metadata.get(COMPUTED_BY_KEY, "")
        return Finished(self.found.st_size, self.digests, computed_by.rstrip())

    @property
    def content(self) -> tuple[int, int]:
        """Size and time of the last change, which identify the content. Inodes may be renewed."""
        return self.found.st_size, self.found.st_mtime_ns

    def is_of(self, work: FileWork) -> bool:
        """Return True where it is this file of this work, complete."""
        ours = (work.work.fingerprint, work.header.shard)
        return (self.metadata.get(FINGERPRINT_KEY), self.metadata.get("shard", "")) == ours

    def refusal(self, work: Work) -> OutputError:
        """Make the error that says what the file is, and how it differs from this work."""
        if FINGERPRINT_KEY not in self.metadata:
            return OutputError(
                f"{self.path} exists and is not a dump of this package; choose another output, or "
                f"replace it with {switch('overwrite')}"
            )
        differing = work.differences(self.metadata)
        return OtherWorkError(self.path, differing or "the model, the dataset or the steps")


def find_existing(target: Path) -> Existing | None:
    """Read the header of the file at a target; None where nothing is there."""
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    try:
        inspection = inspect(target)
    except OutputError:
        return Existing(target, found, {}, {})
    return Existing(target, found, inspection.contents.metadata, inspection.digests)


def choose_shards(
    work: Work, size: int | None, *, share: bool, overwrite: bool = False
) -> int | None:
    """Return the number of shards that a work is written in; None for one file.

    Args:
        work: the work.
        size: largest bytes of a shard, where the caller gave a size.
        share: True where several processes share the work, or it is limited to some shards.
        overwrite: True where the shards that are there may be of other work.

    Raises:
        OutputError: files that are there contradict it; nothing is changed.
    """
    there = _counts_there(work.whole)
    whole = [path for path in (work.whole, partial_path(work.whole)) if os.path.lexists(path)]
    if size is not None:
        shards = work.count_shards(size)
    elif there and not whole:
        shards = min(there)
        if not overwrite:
            _check_same_work(work, shards)
    elif share and not whole:
        shards = work.default_shards()
    elif share and work.whole not in whole:
        raise OutputError(
            f"{whole[0]} is unfinished; let one process finish it by the same call, or remove it"
        )
    else:
        if there:
            raise mixed_error(whole[0], work, there)
        return None
    if others := sorted(there - {shards}):
        raise OutputError(
            f"{work.whole} has shards of another cut, {_pattern(work, others[0])}, and this call "
            f"would write {_pattern(work, shards)}; leave out {option('shard_size')} to continue "
            "them, remove them, or choose another output"
        )
    if whole:
        raise mixed_error(whole[0], work, {shards})
    return shards


def _counts_there(whole: Path) -> set[int]:
    return {shard.count for ending in ("", PARTIAL) for shard in list_shards(whole, ending)}


def _check_same_work(work: Work, shards: int) -> None:
    """Raise where the shards that are there are of other work, and say how it differs."""
    for file in work.files(shards):
        existing = find_existing(file.target)
        if existing is not None and not existing.is_of(file):
            raise existing.refusal(work)
        if (
            header := header_of(file.target)
        ) is not None and header.fingerprint != work.fingerprint:
            raise OtherWorkError(partial_path(file.target), work.differences(header.work))
        if existing is not None or header is not None:
            return


def mixed_error(whole: Path, work: Work, counts: Iterable[int]) -> OutputError:
    """Make the error for a whole dump next to shards of its name."""
    return OutputError(
        f"{whole} is there, and so one name would stand for a whole dump and for shards "
        f"({_pattern(work, min(counts))}); remove one of them, or choose another output"
    )


def _pattern(work: Work, count: int) -> str:
    return f"{work.whole.stem}-*-of-{count:05}{work.whole.suffix}"


def header_of(target: Path) -> Header | None:
    """Read the header of a target's journal; None where there is none that is whole."""
    try:
        return read_header(target)
    except JournalError:
        return None


@dataclass(frozen=True)
class Unfinished:
    """A partial file as its journal describes it. None of its data is read.

    Attributes:
        path: where it is.
        size: its bytes, as many as the finished file has.
        header: the work that it belongs to.
        batches: numbers of the batches that are on disk.
        is_being_written: True while a process has it locked.
        written_at: time of the last record, in seconds since the epoch.
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
        """The tensors of the finished dump."""
        try:
            return [
                TensorSpec(name, dtype, tuple(shape))
                for name, dtype, shape in json.loads(self.header.work["tensors"])
            ]
        except (AssertionError, KeyError, TypeError, ValueError):
            raise OutputError(f"{self.path}: its journal names no tensors") from None


def find_unfinished(path: str | os.PathLike[str]) -> Unfinished | None:
    """Read the journal of the partial file of this name, or of a target that is not there yet.

    Returns None where there is none.

    Raises:
        OutputError: the partial file is not this user's, or its journal cannot be read.
    """
    target = target_of(path)
    if target.suffix == PARTIAL:
        target = target.with_suffix("")
    elif target.exists():
        return None
    partial = partial_path(target)
    if not os.path.lexists(partial):
        return None
    with OutputError.when(f"cannot read {partial}"):
        size, locked = partial.stat().st_size, is_locked(partial)
        try:
            recorded = read_journal(target)
        except JournalError as error:
            raise OutputError(f"{partial}: {error}") from None
    return Unfinished(
        partial, size, recorded.header, frozenset(recorded.batches), locked, recorded.modified
    )
