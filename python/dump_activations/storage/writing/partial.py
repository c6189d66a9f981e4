"""The unfinished form of an output file: `NAME.partial`, locked by the process that writes it.

The lock is a `flock`: it belongs to the open file, so the system releases it when the process ends,
however it ends. docs/architecture.md has the rules of the lock and what breaks without each.
"""

import errno
import fcntl
import os
import secrets
import stat
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from dump_activations import _rust
from dump_activations.errors import OutputError, switch
from dump_activations.storage.digests import Digest
from dump_activations.storage.writing.paths import free_bytes, partial_path

# Cray's DVS answers with this number, which has no name in user space.
_ENOTSUPP = 524
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, _ENOTSUPP)

# Seconds before each attempt to lock: inspection holds a shared lock for a moment.
_PAUSES = (0.0, 0.01, 0.02)


class BusyError(OutputError):
    """Another process has locked the partial file."""


class _Descriptor:
    """An open file, closed when its last user drops it.

    A write that is still under way when the run is given up must not find another file under the
    same number.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        if self.number >= 0:
            number, self.number = self.number, -1
            os.close(number)


# A forked child inherits the lock: without this, the lock outlives its process for as long as the
# child lives. The child closes its copy. Unlocking it would take the lock from the parent.
_locked: weakref.WeakSet[_Descriptor] = weakref.WeakSet()


def _close_in_child() -> None:
    for descriptor in list(_locked):
        descriptor.close()


os.register_at_fork(after_in_child=_close_in_child)


class Partial:
    """A locked partial file, until it is published under the target's name.

    Attributes:
        path: where it is.
        is_new: True where this process created it.
        has_lock: False where the file system has no working locks.
    """

    def __init__(self, target: Path, fd: _Descriptor, *, is_new: bool, has_lock: bool) -> None:
        """Private: `Partial.open` makes one."""
        self.path = partial_path(target)
        self.is_new = is_new
        self.has_lock = has_lock
        self._target = target
        self._process = os.getpid()
        self._file: _Descriptor | None = fd
        direct_fd = _open_direct(fd.number)
        self._direct = None if direct_fd is None else _Descriptor(direct_fd)

    @classmethod
    def open(cls, target: Path, *, is_finished: Callable[[], bool] = lambda: False) -> Self | None:
        """Create or open the partial file of a target, and lock it.

        Args:
            target: the output, past all links.
            is_finished: lists the directory for the finished target, after the lock is taken.

        Returns:
            None where the target is finished: its writer published it before this lock was taken.

        Raises:
            BusyError: another process has it locked.
            OutputError: it is a link, not an ordinary file, or belongs to another user.
        """
        path = partial_path(target)
        while True:
            with OutputError.when(f"cannot write {path}"):
                number, is_new = _create_or_open(path)
                if number is None:
                    continue
                fd = _Descriptor(number)
                _locked.add(fd)
                has_lock = _lock(number, target)
                # The previous owner may have published or removed the file before this lock: then
                # the name leads elsewhere, and writing would damage a finished file.
                if not is_at(number, path):
                    continue
                has_lock = has_lock and not _can_lock_twice(path)
                partial = cls(target, fd, is_new=is_new, has_lock=has_lock)
                if is_finished():
                    partial.remove()
                    return None
                return partial

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self.fd).st_size

    @property
    def is_of_this_process(self) -> bool:
        """False in a forked child, which must not remove what its parent writes."""
        return os.getpid() == self._process

    @property
    def is_closed(self) -> bool:
        """True once the file was closed or published."""
        return self._file is None

    @property
    def fd(self) -> int:
        """The descriptor, while the file is open."""
        assert self._file is not None
        return self._file.number

    def reserve(self, size: int) -> None:
        """Take `size` bytes of disk; raise OSError where the disk has fewer."""
        if _rust.reserve(self.fd, size):
            return
        # Without fallocate the file system can still report its free space.
        free = free_bytes(self.fd)
        if free is not None and free + os.fstat(self.fd).st_blocks * 512 < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def clear(self) -> None:
        """Drop the content. The file stays the same, so the lock does too."""
        os.ftruncate(self.fd, 0)

    def write_span(self, offset: int, data: npt.NDArray[np.uint8], dtype: str) -> Digest:
        """Write elements at an offset, from any thread, and digest them.

        Raises:
            OutputError: the system refused; `errno` is its reason.
        """
        file, direct = self._file, self._direct
        assert file is not None
        try:
            with OutputError.when(f"cannot write {self.path}"):
                direct_fd = None if direct is None else direct.number
                digest = _rust.write_span(file.number, direct_fd, offset, data, dtype)
        finally:
            del file, direct  # A traceback would keep them open.
        return Digest(data.nbytes, *digest)

    def write_bytes(self, offset: int, data: bytes) -> None:
        """Write bytes that are not elements at an offset."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self.fd, view, offset)
            view, offset = view[written:], offset + written

    def drop_cache(self) -> None:
        """Make the next reads come from the disk.

        Pages that could not be written back may still be in the cache, and look right there.
        """
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Return once all written data is on disk.

        Raises:
            OutputError: the file's name leads elsewhere, so nothing of it can be kept.
        """
        os.fdatasync(self.fd)
        self.check_place()

    def check_place(self) -> None:
        """Raise OutputError where the file's name leads elsewhere."""
        if not self.is_in_place():
            raise OutputError(
                f"{self.path} was removed or replaced while it was being written; nothing is kept"
            )

    def is_in_place(self) -> bool:
        """Return True where the file's name leads to the open file."""
        return is_at(self.fd, self.path)

    def publish(self, replaced: os.stat_result | None) -> None:
        """Bring the file to disk, then rename it to the target.

        The order matters: a crash must never leave a torn file under the final name.

        Args:
            replaced: the file that may be replaced, as it was found; None where there was none.

        Raises:
            OutputError: another file appeared at the target, or this one was removed.
        """
        os.fsync(self.fd)
        with suppress(FileNotFoundError):
            found = self._target.lstat()
            if replaced is None or _content(found) != _content(replaced):
                raise OutputError(
                    f"{self._target} appeared or changed while it was being written; move it away, "
                    f"and the same call finishes the dump from {self.path}"
                )
            # Mounts without permissions refuse, each with an errno of its own.
            with suppress(OSError):
                os.fchmod(self.fd, found.st_mode & 0o777)
        self.check_place()
        self.path.replace(self._target)

    def remove(self) -> None:
        """Remove the file if its name leads to it, and close it."""
        if self.is_in_place():
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Close the file, which releases the lock once the last write has ended."""
        self._file = self._direct = None


def is_locked(path: Path) -> bool:
    """Return True while another process has a partial file locked; False where it is gone.

    Raises:
        OSError: it cannot be opened.
    """
    try:
        fd = _Descriptor(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
    except FileNotFoundError:  # Its owner finished or removed it since it was listed.
        return False
    try:
        fcntl.flock(fd.number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # This file system has no locks.
        pass
    return False


def create(path: Path, flags: int) -> int:
    """Create a file, with the permissions that any new file gets there, and open it.

    Raises:
        FileExistsError: the name is taken; it may be a link that somebody planted.
    """
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def open_own(path: Path, flags: int) -> int:
    """Open a file that this user created; never follow a link or wait for a pipe.

    Raises:
        OutputError: it is something else.
        OSError: nothing is there, or the system refuses.
    """
    _check_ordinary(path, path.lstat())
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        _check_ordinary(path, found)  # The name may have been exchanged since the first look.
        if found.st_uid != os.geteuid() and found.st_uid != _owner_of_new_files(path.parent):
            raise _untrusted(path, "belongs to another user")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_ordinary(path: Path, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise _untrusted(path, "is a link")
    if not stat.S_ISREG(found.st_mode):
        raise _untrusted(path, "is not an ordinary file")
    if found.st_nlink > 1:
        raise _untrusted(path, "has a second name")


def _untrusted(path: Path, reason: str) -> OutputError:
    return OutputError(f"{path} {reason}; remove it, or choose another output")


def _owner_of_new_files(directory: Path) -> int:
    """Create a file to see its owner: some network mounts show one owner for all files."""
    path = directory / f".{secrets.token_hex(8)}.owner"
    fd = create(path, os.O_RDWR)
    try:
        return os.fstat(fd).st_uid
    finally:
        os.close(fd)
        path.unlink()


def _create_or_open(path: Path) -> tuple[int | None, bool]:
    """Return a descriptor, and True where this call created the file; None where it vanished."""
    try:
        return create(path, os.O_RDWR), True
    except FileExistsError:
        with suppress(FileNotFoundError):
            return open_own(path, os.O_RDWR), False
    return None, False


def _lock(fd: int, target: Path) -> bool:
    """Lock an open file; return False where the file system has no locks."""
    for pause in _PAUSES:
        time.sleep(pause)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
        return True
    raise BusyError(
        f"another dump to {target} is running; wait for it, choose another output, or let several "
        f"processes share the work with {switch('shard_size')}"
    )


def _can_lock_twice(path: Path) -> bool:
    """Return True where a second lock of a locked file is granted: such locks protect nothing."""
    second = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(second)
    return True


def is_at(fd: int, path: Path) -> bool:
    """Return True where a name leads to an open file."""
    try:
        opened, named = os.fstat(fd), path.lstat()
    except FileNotFoundError:
        return False
    if os.path.samestat(opened, named):
        return True
    # Some network mounts renew inode numbers while a file is open. A file that was replaced has no
    # name left, and one that was renamed is not as old and as long as the file at its old name.
    return opened.st_nlink > 0 and _look(opened) == _look(named)


def _content(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def _look(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _open_direct(fd: int) -> int | None:
    """Open the same file past the page cache, where the file system supports that.

    A dump is written once and not read back, so the cache would only cost a copy and memory, and
    leave a flush for the end. Opened by number, because the name may lead to another file. Closing
    this descriptor keeps the lock, which belongs to the first one.
    """
    if not _rust.supports_direct(fd):
        return None
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return None
