"""The unfinished form of an output file: `NAME.partial` beside the target, locked."""

import errno
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from dump_activations import _rust
from dump_activations.errors import OutputError
from dump_activations.storage.digests import Digest
from dump_activations.storage.writing.journal import remove_journals
from dump_activations.storage.writing.private_files import create, is_at, lock, open_ours
from dump_activations.storage.writing.targets import all_journals, partial_path


class _Descriptor:
    """An open file, closed when the last to use it lets go of it.

    A write that is still under way when the run is given up must not find another file under the
    number of its own.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class Partial:
    """A locked file of this user's alone, until it is published under the target's name.

    Attributes:
        path: where it is.
        is_new: whether there was none before.
    """

    def __init__(self, target: Path, fd: int, *, is_new: bool) -> None:
        """Private: `Partial.open` makes one."""
        self.path = partial_path(target)
        self.is_new = is_new
        self._target = target
        self._locked: _Descriptor | None = _Descriptor(fd)
        self._file: _Descriptor | None = self._locked
        direct_fd = _open_direct(fd)
        self._direct = None if direct_fd is None else _Descriptor(direct_fd)

    @classmethod
    def open(cls, target: Path, *, anew: bool) -> Self:
        """Open the partial file of a target, which is made if it is not there.

        Args:
            target: the output, past all links.
            anew: replace what is there instead of opening it.

        Raises:
            OutputError: another process is writing it, or it is not this user's alone.
        """
        path = partial_path(target)
        with OutputError.when(f"cannot write {path}"):
            while True:
                if anew:
                    _remove_idle(path, target)
                with suppress(_GoneError):
                    fd, is_new = _create_or_open(path)
                    try:
                        _lock(fd, target)
                        # Whoever held the lock may have published or removed the file meanwhile.
                        if is_at(fd, path) and (is_new or not anew):
                            return cls(target, fd, is_new=is_new)
                    except BaseException:
                        os.close(fd)
                        raise
                    os.close(fd)

    @classmethod
    def join(cls, target: Path) -> Self:
        """Open the partial file of a target, without a lock, while another process has it.

        Raises:
            OutputError: it is not this user's alone.
            OSError: there is none, or the system refuses.
        """
        return cls(target, open_ours(partial_path(target), os.O_RDWR), is_new=False)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.fstat(self.fd).st_size

    @property
    def fd(self) -> int:
        """The descriptor, while the file is open."""
        assert self._file is not None
        return self._file.number

    def reserve(self, size: int) -> None:
        """Take `size` bytes of disk; OSError if they are not to be had."""
        if _rust.reserve(self.fd, size):
            return
        # A file system that cannot reserve space can at least be asked for it.
        disk = os.fstatvfs(self.fd)
        taken = os.fstat(self.fd).st_blocks * 512
        if disk.f_bavail * disk.f_frsize + taken < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

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
            del file, direct  # Which a traceback would keep open.
        return Digest(data.nbytes, *digest)

    def write_bytes(self, offset: int, data: bytes) -> None:
        """Write bytes that are no elements at an offset."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self.fd, view, offset)
            view, offset = view[written:], offset + written

    def reopen(self) -> None:
        """Open the file anew, which is when a network file system shows what others wrote.

        Raises:
            OutputError: the file is no longer there.
        """
        self._file = _Descriptor(open_ours(self.path, os.O_RDWR))
        self.check_place()

    def drop_cache(self) -> None:
        """Let reads come from the disk.

        Pages that could not be written back may still be in the cache, and look right there.
        """
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Return once all that has been written is on disk.

        Raises:
            OutputError: the file is no longer there.
        """
        os.fdatasync(self.fd)
        self.check_place()

    def check_place(self) -> None:
        """Raise OutputError where the file's name leads elsewhere, so that it cannot be kept."""
        if not self.is_in_place():
            raise OutputError(
                f"{self.path} was removed or replaced while it was being written; nothing is kept"
            )

    def is_in_place(self) -> bool:
        """Whether the file's name still leads to it."""
        assert self._locked is not None
        return is_at(self._locked.number, self.path)

    def publish(self) -> None:
        """Bring the file to disk and give it the target's name and mode."""
        os.fsync(self.fd)
        self._set_mode(_mode_of(self._target))
        try:
            self.check_place()
            self.path.replace(self._target)
        except BaseException:
            self._set_mode(0o600)
            raise

    def remove(self) -> None:
        """Remove the file, if its name still leads to it."""
        if self.is_in_place():
            self.path.unlink()

    def close(self) -> None:
        """Let go of the file and its lock."""
        self._file = self._locked = self._direct = None

    def _set_mode(self, mode: int) -> None:
        # The file is ours: only a file system without modes refuses.
        with suppress(PermissionError):
            os.fchmod(self.fd, mode)


def tidy(target: Path) -> None:
    """Remove the journals of a file that was published, and not its journals removed."""
    left = [path for path in all_journals(target) if os.path.lexists(path)]
    if not left or os.path.lexists(partial_path(target)):
        return
    partial = Partial.open(target, anew=False)
    if partial.is_new:
        remove_journals(left)
        partial.remove()
    partial.close()


class _GoneError(Exception):
    """What was there a moment ago is not."""


def _create_or_open(path: Path) -> tuple[int, bool]:
    """Return a descriptor, and whether the file was made by this call."""
    try:
        return create(path, os.O_RDWR), True
    except FileExistsError:
        try:
            return open_ours(path, os.O_RDWR), False
        except FileNotFoundError:
            raise _GoneError from None


def _remove_idle(path: Path, target: Path) -> None:
    """Remove what is at a path, whatever it is, unless another dump is at work on it."""
    fd = None
    with suppress(OSError):  # It is somebody else's, or there is nothing.
        if stat.S_ISREG(path.lstat().st_mode):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if fd is not None:
            _lock(fd, target)
        path.unlink(missing_ok=True)
    finally:
        if fd is not None:
            os.close(fd)


def _lock(fd: int, target: Path) -> None:
    if not lock(fd):
        raise OutputError(
            f"another dump to {target} is running; wait for it or choose another output"
        )


def _open_direct(fd: int) -> int | None:
    """Open the same file past the page cache, where the file system has that.

    A dump is written once and not read back, so the cache would only cost a copy and memory, and
    leave a flush for the end. By its number: the name may lead to another file.
    """
    if not _rust.supports_direct(fd):
        return None
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return None


def _mode_of(target: Path) -> int:
    """Return the permissions of the file that is replaced, or those of any new file."""
    try:
        return target.stat().st_mode & 0o777
    except FileNotFoundError:
        return 0o666 & ~_umask()


def _umask() -> int:
    # Asking the system means changing it for a moment, under the feet of other threads.
    with suppress(OSError):
        found = re.search(r"^Umask:\s*([0-7]+)", Path("/proc/self/status").read_text(), re.M)
        if found:
            return int(found[1], 8)
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
