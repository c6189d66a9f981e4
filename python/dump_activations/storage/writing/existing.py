"""Files at an output and next to it before a run: finished files, partial files, shards.

`choose_shards` decides how the run is cut, and `Output` in shards.py what becomes of each file.
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
from dump_activations.storage.shards import list_names, list_shards
from dump_activations.storage.writing.journal import Header, JournalError, Recorded, read_journal
from dump_activations.storage.writing.output import OtherWorkError
from dump_activations.storage.writing.partial import content, is_locked
from dump_activations.storage.writing.paths import PARTIAL, partial_path, target_of
from dump_activations.storage.writing.work import COMPUTED_BY_KEY, FINGERPRINT_KEY, FileWork, Work


@dataclass(frozen=True)
class Existing:
    """A file at an output's name."""

    path: Path
    content: tuple[int, int]  # its size and the time of its last change
    metadata: Mapping[str, str]  # empty where it is not a whole dump
    digests: Mapping[str, Digest]  # as it stores them

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.content[0]

    @property
    def computed_by(self) -> str:
        """JSON list of the devices and threads that computed it."""
        return self.metadata.get(COMPUTED_BY_KEY, "").rstrip()

    def refusal(self, work: Work) -> OutputError:
        """Make the error that names the file's work, and how it differs from this work."""
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
        found = content(target.stat())
    except FileNotFoundError:
        return None
    try:
        inspection = inspect(target)
    except OutputError:
        return Existing(target, found, {}, {})
    return Existing(target, found, inspection.metadata, inspection.digests)


def choose_shards(work: Work, size: int | None, *, share: bool) -> int | None:
    """Return the number of shards that a work is written in; None for one file.

    Args:
        work: the work.
        size: largest bytes of a shard, where the caller gave a size.
        share: True where several processes share the work, or it is limited to some shards.

    Raises:
        OutputError: files that are there contradict it; nothing is changed.
    """
    names = list_names(work.whole.parent)
    there = {shard.count for end in ("", PARTIAL) for shard in list_shards(work.whole, end, names)}
    whole = [each for each in (work.whole, partial_path(work.whole)) if os.path.lexists(each)]
    if size is not None:
        shards = work.count_shards(size)
    elif there and not whole:
        shards = min(there)
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
        return read_journal(target, header_only=True).header
    except JournalError:
        return None


def check_partial(file: FileWork, *, overwrite: bool) -> None:
    """Raise OtherWorkError where a partial file is of other work.

    With `overwrite` it may be, unless a process has it locked.
    """
    path = partial_path(file.target)
    header = header_of(file.target) if os.path.lexists(path) else None
    if header is not None and header != file.header and (not overwrite or is_locked(path)):
        raise OtherWorkError(path, file.work.differences(header.work))


@dataclass(frozen=True)
class Unfinished(Recorded):
    """A partial file as its journal describes it. None of its data is read."""

    path: Path
    size: int  # as many bytes as the finished file has
    is_being_written: bool  # True while a process has it locked

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
    return Unfinished(**vars(recorded), path=partial, size=size, is_being_written=locked)
