"""Files that only this user writes, in directories where others may make and move files too."""

import errno
import fcntl
import os
import stat
import time
from pathlib import Path

from dump_activations.errors import OutputError, switch

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)

# Seconds before each attempt to lock a file.
_PAUSES = (0.0, 0.01, 0.02)


def create(path: Path, flags: int) -> int:
    """Make a file that nobody else can open, and open it.

    Raises:
        FileExistsError: there is something of that name; it is not touched.
    """
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)


def open_ours(path: Path, flags: int) -> int:
    """Open a file of this user's that nobody else can have changed; waits for nothing.

    Raises:
        OutputError: there is something else, and what.
        OSError: there is nothing, or the system refuses.
    """
    _check_ours(path, path.lstat())
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        _check_ours(path, os.fstat(fd))  # It may have been exchanged meanwhile.
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_at(fd: int, path: Path) -> bool:
    """Whether a name still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def lock(fd: int) -> bool:
    """Lock an open file against other dumps; False where one of them has it.

    Who asks whether a file is locked holds a lock for a moment, so this tries more than once. Some
    network file systems have no locks; a dump there goes unguarded.
    """
    for pause in _PAUSES:
        time.sleep(pause)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        return True
    return False


def _check_ours(path: Path, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        reason = "is a link"
    elif not stat.S_ISREG(found.st_mode):
        reason = "is not an ordinary file"
    elif found.st_uid != os.geteuid():
        reason = "belongs to another user"
    elif found.st_nlink > 1:
        reason = "has another name too"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        reason = "may be written by others"
    else:
        return
    raise OutputError(
        f"{path} {reason}, so that its content cannot be trusted; remove it, start anew by "
        f"{switch('overwrite')}, or choose another output"
    )
