"""An output's path: the names beside it, and all that is wrong with it before any work is done."""

import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from dump_activations.errors import InvalidArgumentError, OutputError, option
from dump_activations.storage.formats.registry import format_of

# No rank has more digits.
_LARGE_RANK = 99_999


def target_of(path: str | os.PathLike[str]) -> Path:
    """Say which file an output is, past all links."""
    return Path(os.path.realpath(path))


def partial_path(target: Path) -> Path:
    """Say where a target is while it is being written."""
    return target.with_name(target.name + ".partial")


def journal_path(target: Path, rank: int = 0) -> Path:
    """Say where a process of those that write an unfinished target has its journal."""
    return target.with_name(f"{target.name}.partial.journal" + (f".{rank}" if rank else ""))


def journals_of_others(target: Path) -> list[Path]:
    """List the journals of all processes but the first."""
    name = re.compile(re.escape(journal_path(target).name) + r"\.[1-9][0-9]{0,8}")
    with OutputError.when(f"cannot list {target.parent}"):
        found = [path for path in target.parent.iterdir() if name.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.suffix[1:]))


def statistics_path(journal: Path) -> Path:
    """Say where a process that has left hands over its statistics of what is in its journal."""
    return journal.with_name(journal.name + ".statistics")


def files_of_others(target: Path) -> list[Path]:
    """List the files beside an unfinished target that are not the first process's."""
    name = re.compile(re.escape(journal_path(target).name) + r"\.[1-9][0-9]{0,8}(\.statistics)?")
    return [path for path in target.parent.iterdir() if name.fullmatch(path.name)]


def replacement_path(path: Path) -> Path:
    """Say where a journal is written anew before it takes the place of the one at `path`."""
    return path.with_name(path.name + ".new")


def all_journals(target: Path) -> list[Path]:
    """List where journals of an unfinished target may be, and statistics beside them."""
    first = journal_path(target)
    return [first, replacement_path(first), *files_of_others(target)]


def check_output(
    path: str | os.PathLike[str], dtypes: Iterable[str], *, inputs: Iterable[Path] = ()
) -> None:
    """Find what makes a dump to `path` impossible.

    Args:
        path: the output.
        dtypes: those of the tensors that are to go there.
        inputs: files that must not be replaced, or appear.

    Raises:
        InvalidArgumentError: the suffix names no format, or one that cannot hold one of `dtypes`;
            or the output is one of `inputs`.
        OutputError: no file can be made or replaced there.
    """
    with OutputError.when(f"cannot write {os.fspath(path)}"):
        target = target_of(path)
        format_of(target, dtypes)
        directory = nearest_directory(target)
        _check_directory(directory, target)
        with suppress(FileNotFoundError):
            _check_replaceable(target, target.lstat(), directory.stat())
        _check_apart(target, inputs)


def nearest_directory(target: Path) -> Path:
    """Return the directory that a target goes to, or the one in which that has to be made."""
    for directory in target.parents:
        with suppress(FileNotFoundError):
            if not stat.S_ISDIR(directory.stat().st_mode):
                raise OutputError(f"{directory} is no directory; choose another output")
            return directory
    raise AssertionError(target)


def _check_directory(directory: Path, target: Path) -> None:
    longest = statistics_path(journal_path(target, _LARGE_RANK)).name
    if len(os.fsencode(longest)) > os.pathconf(directory, "PC_NAME_MAX"):
        raise OutputError(f"{target} has too long a name for the files beside it; shorten it")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise OutputError(f"{directory} cannot be written; choose another output")


def _check_replaceable(target: Path, found: os.stat_result, directory: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise OutputError(f"{target} is a directory; name a file in it")
    if not stat.S_ISREG(found.st_mode):
        raise OutputError(f"{target} is not an ordinary file; choose another output")
    # Root may write what nobody may; whoever took the permission away meant root too.
    if not found.st_mode & 0o222 or not os.access(target, os.W_OK):
        raise OutputError(f"{target} is write-protected; permit it, or choose another output")
    is_sticky = directory.st_mode & stat.S_ISVTX
    if is_sticky and os.geteuid() not in (0, found.st_uid, directory.st_uid):
        raise OutputError(
            f"{target} belongs to another user, in a directory where only its owner may replace "
            "it; choose another output"
        )


def _check_apart(target: Path, inputs: Iterable[Path]) -> None:
    if any(_is_same(target, path) for path in inputs):
        raise InvalidArgumentError(
            f"{option('output')}: {target} is read by this run, or would be taken for what is; "
            "choose another output"
        )


def _is_same(target: Path, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return target.samefile(path)
    # Neither is there: two spellings of one name.
    return target.name == path.name and target == target_of(path)
