"""The unfinished form of an output file: `NAME.partial` beside the target, locked, with a journal.

Whatever is wrong with a target is found here, before any work for it is done.
"""

import errno
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

from dump_activations import _rust
from dump_activations.errors import OutputError, switch
from dump_activations.paths import check_reachable
from dump_activations.storage.formats.registry import format_of
from dump_activations.storage.writing.journal import read_journal, replacement_path

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def partial_path(target: Path) -> Path:
    """Say where a target is while it is being written."""
    return target.with_name(target.name + ".partial")


def journal_path(target: Path) -> Path:
    """Say where the journal of an unfinished target is."""
    return target.with_name(target.name + ".partial.journal")


def check_output(path: str | os.PathLike[str], dtypes: Iterable[str]) -> None:
    """Find what makes a dump to `path` impossible.

    Raises:
        InvalidArgumentError: the suffix names no format, or one that cannot hold one of `dtypes`.
        OutputError: `path` is a directory, in a directory that cannot be written, or too long.
    """
    check_reachable(Path(path), OutputError)
    target = Path(os.path.realpath(path))
    format_of(target, dtypes)
    if target.is_dir():
        raise OutputError(f"{target} is a directory; name a file in it")
    if target.exists() and not target.is_file():
        raise OutputError(f"{target} is not an ordinary file; choose another output")
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent} is no directory; make it or choose another output")
    longest = replacement_path(journal_path(target)).name
    if len(os.fsencode(longest)) > os.pathconf(target.parent, "PC_NAME_MAX"):
        raise OutputError(f"{target} has too long a name for the files beside it; shorten it")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target.parent} cannot be written; choose another output")


def open_partial(target: Path, *, may_exist: bool) -> int:
    """Open a locked descriptor of the partial file, which is made if it is not there.

    Raises:
        OutputError: another process holds the lock, or the file exists and may not.
    """
    partial = partial_path(target)
    while True:
        try:
            fd, is_new = _open_or_create(partial)
        except OSError as error:
            raise OutputError.of_system(f"cannot write {partial}", error) from error
        try:
            _lock(fd, target)
            # Whoever held the lock may have renamed or removed the file meanwhile.
            is_current = _is_at(fd, partial)
            if is_current and not is_new and not may_exist:
                raise OutputError(_leftover(target))
        except BaseException:
            os.close(fd)
            raise
        if is_current:
            return fd
        os.close(fd)


def open_direct(fd: int, path: Path) -> int | None:
    """Open the same file past the page cache, where the file system has that.

    A dump is written once and not read back, so the cache would only cost a copy and memory, and
    leave a flush for the end.
    """
    return os.open(path, os.O_WRONLY | os.O_DIRECT) if _rust.supports_direct(fd) else None


def reserve(fd: int, size: int) -> None:
    """Take `size` bytes of disk for a file; OSError if they are not to be had."""
    if _rust.reserve(fd, size):
        return
    # A file system that cannot reserve space can at least be asked for it.
    disk = os.fstatvfs(fd)
    taken = os.fstat(fd).st_blocks * 512
    if disk.f_bavail * disk.f_frsize + taken < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _open_or_create(path: Path) -> tuple[int, bool]:
    """Return a descriptor, and whether the file was made by this call."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), False


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _lock(fd: int, target: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"another dump to {target} is running; wait for it or choose another output"
        ) from None
    except OSError as error:
        # Some network file systems have no locks; a dump there goes unguarded.
        if error.errno not in NO_LOCKS:
            raise OutputError.of_system(f"cannot lock {partial_path(target)}", error) from error


def _leftover(target: Path) -> str:
    left = read_journal(journal_path(target))
    progress = ""
    if left is not None:
        header, batches = left
        progress = f" with {header.rows_in(len(batches)):,} of {header.rows:,} boards"
    return (
        f"{partial_path(target)} is left over from an unfinished dump{progress}; "
        f"go on with it by {switch('resume')}, or drop it by {switch('overwrite')}"
    )
