"""The unfinished form of an output file: `NAME.partial`, locked by the process that writes it.

The lock is a `flock`: it belongs to the open file, so the system releases it when the process ends,
however it ends. docs/architecture.md has the rules of the lock and what breaks without each.
"""

import errno
import fcntl
import os
import stat
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from dump_activations import _rust
from dump_activations.errors import OutputError, switch
from dump_activations.storage.digests import Digest
from dump_activations.storage.writing.paths import (
    Mount,
    create,
    owner_of_new_files,
    partial_path,
)

# Seconds before each attempt to lock: inspection holds a shared lock for a moment.
_PAUSES = (0.0, 0.01, 0.02)


class BusyError(OutputError):
    """Another process has locked the partial file."""


class Descriptor:
    """An open file, closed when its last user drops it, and in a forked child.

    A write that is still under way when the run is given up must not find another file under the
    same number. A child inherits the lock: without this, the lock outlives its process for as long
    as the child lives. The child must not unlock, which would take the lock from the parent.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        _open.add(self)

    def close(self) -> None:
        """Close the file, once."""
        if self.number >= 0:
            number, self.number = self.number, -1
            os.close(number)

    __del__ = close


_open: weakref.WeakSet[Descriptor] = weakref.WeakSet()


def _close_in_child() -> None:
    for descriptor in list(_open):
        descriptor.close()


os.register_at_fork(after_in_child=_close_in_child)


class Partial:
    """A locked partial file, until it is published under the target's name."""

    def __init__(self, target: Path, file: Descriptor, mount: Mount, *, is_new: bool) -> None:
        """Private: `Partial.open` makes one."""
        self.target = target  # the output, past all links
        self.path = partial_path(target)
        self.is_new = is_new  # created by this process
        self.mount = mount
        self._process = os.getpid()
        self._file: Descriptor | None = file
        self._direct = _open_direct(file.number) if mount.can_write_direct else None

    @classmethod
    def open(cls, target: Path, mount: Mount) -> Self:
        """Create or open the partial file of a target, and lock it where the mount has locks.

        Raises:
            BusyError: another process has it locked.
            OutputError: it is a link, not an ordinary file, or belongs to another user.
        """
        path = partial_path(target)
        with OutputError.when(f"cannot write {path}"):
            while True:
                try:
                    file, is_new = Descriptor(create(path, os.O_RDWR)), True
                except FileExistsError:
                    try:
                        file, is_new = Descriptor(open_own(path, os.O_RDWR)), False
                    except FileNotFoundError:
                        continue
                if mount.has_locks:
                    _lock(file.number, target)
                # The previous owner may have published or removed the file before this lock: then
                # the name leads elsewhere, and writing would damage a finished file.
                if is_at(file.number, path):
                    return cls(target, file, mount, is_new=is_new)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self.fd).st_size

    @property
    def is_held(self) -> bool:
        """False once the file is closed, and in a forked child: it must not remove the file."""
        return self._file is not None and os.getpid() == self._process

    @property
    def is_in_place(self) -> bool:
        """True while the file's name leads to the open file."""
        return is_at(self.fd, self.path)

    @property
    def fd(self) -> int:
        """The descriptor, while the file is open."""
        assert self._file is not None
        return self._file.number

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

    def sync(self) -> None:
        """Return once all written data is on disk.

        Raises:
            OutputError: the file's name leads elsewhere, so nothing of it can be kept.
        """
        os.fdatasync(self.fd)
        self._check_place()

    def _check_place(self) -> None:
        if not self.is_in_place:
            raise OutputError(
                f"{self.path} was removed or replaced while it was being written; nothing is kept"
            )

    def publish(self, replaced: tuple[int, int] | None) -> None:
        """Bring the file to disk, then rename it to the target.

        The order matters: a crash must never leave a torn file under the final name.

        Args:
            replaced: `content` of the file that may be replaced; None where there was none.

        Raises:
            OutputError: another file appeared at the target, or this one was removed.
        """
        os.fsync(self.fd)
        with suppress(FileNotFoundError):
            found = self.target.lstat()
            with suppress(FileNotFoundError):  # A remote file is a link to its mirror.
                found = self.target.stat()
            if content(found) != replaced:
                raise OutputError(
                    f"{self.target} appeared or changed while it was being written; move it away, "
                    f"and the same call finishes the dump from {self.path}"
                )
            # Mounts without permissions refuse, each with an errno of its own.
            with suppress(OSError):
                os.fchmod(self.fd, found.st_mode & 0o777)
        self._check_place()
        self.path.replace(self.target)

    def remove(self) -> None:
        """Remove the file if its name leads to it, and close it."""
        if self.is_in_place:
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
        file = Descriptor(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
    except FileNotFoundError:  # Its owner finished or removed it since it was listed.
        return False
    try:
        fcntl.flock(file.number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # This file system has no locks.
        pass
    return False


def open_own(path: Path, flags: int) -> int:
    """Open a file that this user created; never follow a link or wait for a pipe.

    Raises:
        OutputError: it is something else.
        OSError: nothing is there, or the system refuses.
    """

    def untrusted(reason: str) -> OutputError:
        return OutputError(f"{path} {reason}; remove it, or choose another output")

    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise untrusted("is a link") if error.errno == errno.ELOOP else error from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise untrusted("is not an ordinary file")
        if found.st_nlink > 1:
            raise untrusted("has a second name")
        if found.st_uid != os.geteuid() and found.st_uid != owner_of_new_files(path.parent):
            raise untrusted("belongs to another user")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(fd: int, target: Path) -> None:
    for pause in _PAUSES:
        time.sleep(pause)
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
    raise BusyError(
        f"another dump to {target} is running; wait for it, choose another output, or let several "
        f"processes share the work with {switch('shard_size')}"
    )


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
    looks = [(*content(found), found.st_ctime_ns) for found in (opened, named)]
    return opened.st_nlink > 0 and looks[0] == looks[1]


def content(found: os.stat_result) -> tuple[int, int]:
    """Return size and time of the last change, which identify content. Inodes may be renewed."""
    return found.st_size, found.st_mtime_ns


def _open_direct(fd: int) -> Descriptor | None:
    """Open the same file past the page cache, where the file system supports that.

    A dump is written once and not read back, so the cache would only cost a copy and memory, and
    leave a flush for the end. Opened by number, because the name may lead to another file. Closing
    this descriptor keeps the lock, which belongs to the first one.
    """
    if _rust.supports_direct(fd):
        with suppress(OSError):
            return Descriptor(os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT))
    return None
