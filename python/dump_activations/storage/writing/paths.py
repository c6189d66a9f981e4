"""Names next to an output, and the checks of an output and its disk before any work is done."""

import errno
import fcntl
import mmap
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dump_activations import _rust
from dump_activations.errors import InvalidArgumentError, OutputError, locate, option
from dump_activations.storage.formats.registry import format_of
from dump_activations.storage.shards import MAX_SHARDS, Shard

_FULL = (errno.ENOSPC, errno.EDQUOT)

PARTIAL = ".partial"
JOURNAL = ".partial.journal"


def target_of(path: str | os.PathLike[str]) -> Path:
    """Return the file that an output path leads to, past all links."""
    return Path(os.path.realpath(locate(path)))


def partial_path(target: Path) -> Path:
    """Return the name of a target while it is being written."""
    return target.with_name(target.name + PARTIAL)


def journal_path(target: Path) -> Path:
    """Return the name of the journal of an unfinished target."""
    return target.with_name(target.name + JOURNAL)


def replacement_path(target: Path) -> Path:
    """Return the name under which a journal is written before it replaces the current one."""
    return target.with_name(target.name + JOURNAL + ".new")


def check_output(
    path: str | os.PathLike[str], dtypes: Iterable[str], *, inputs: Iterable[Path] = ()
) -> None:
    """Raise where a dump to `path` is impossible. Nothing is created.

    Args:
        path: the output.
        dtypes: names of the dtypes that the file has to hold.
        inputs: files that the output must not replace or create.

    Raises:
        InvalidArgumentError: the suffix names no format, or one that cannot hold one of `dtypes`,
            or the output is one of `inputs`.
        OutputError: no file can be made or replaced there.
    """
    with OutputError.when(f"cannot write {os.fspath(path)}"):
        target = target_of(path)
        format_of(target, dtypes)
        directory = nearest_directory(target)
        longest = replacement_path(Shard(target, MAX_SHARDS, MAX_SHARDS).path).name
        # Some network mounts give no limit, or zero.
        max_nbytes = 0
        with suppress(OSError):
            max_nbytes = os.pathconf(directory, "PC_NAME_MAX")
        if len(os.fsencode(longest)) > (max_nbytes or 255):
            raise OutputError(f"{target} has too long a name for the files next to it; shorten it")
        if not os.access(directory, os.W_OK | os.X_OK):
            raise OutputError(f"{directory} is not writable; choose another output")
        with suppress(FileNotFoundError):
            _check_replaceable(target, target.lstat(), directory.stat())
        for each in inputs:
            # Where neither exists, two spellings of one name lead to the same place.
            is_same = target.name == each.name and target == target_of(each)
            with suppress(FileNotFoundError):
                is_same = is_same or target.samefile(each)
            if is_same:
                raise InvalidArgumentError(
                    f"{option('output')}: this run reads {target}, or would read it next time; "
                    "choose another output"
                )


def nearest_directory(target: Path) -> Path:
    """Return the target's directory, or the nearest existing directory above it."""
    for directory in target.parents:
        with suppress(FileNotFoundError):
            if not stat.S_ISDIR(directory.stat().st_mode):
                raise OutputError(f"{directory} is not a directory; choose another output")
            return directory
    raise AssertionError(target)


def free_space(targets: Sequence[Path]) -> int | None:
    """Count the bytes that unfinished targets of one directory may take.

    These are the free bytes of the disk, and the bytes that their partial files have already. None
    where the file system reports a size of zero or nothing, as some network mounts do.
    """
    with OutputError.when(f"cannot write {targets[0]}"):
        directory = nearest_directory(targets[0])
        try:
            disk = os.statvfs(directory)
        except OSError:
            return None
        free = disk.f_bavail * disk.f_frsize
        for target in targets:
            with suppress(FileNotFoundError):
                free += partial_path(target).stat().st_blocks * 512
    return free if disk.f_blocks else None


def check_space(targets: Sequence[Path], nbytes: int) -> None:
    """Raise OutputError where the disk has less than `nbytes` for unfinished targets."""
    free = free_space(targets) if targets else None
    if free is not None and free < nbytes:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise OutputError.of_system(f"cannot reserve {nbytes:,} bytes for {targets[0]}", full)


@dataclass(frozen=True)
class Mount:
    """Abilities of a file system, which `probe` tries on a file just made."""

    has_locks: bool  # False where `flock` fails, or grants a lock twice and so protects nothing
    can_reserve: bool  # space can be taken before it is written
    can_write_direct: bool  # writes may go past the page cache
    can_sync_directory: bool  # the names in a directory can be flushed
    clock_ahead: float  # seconds between its clock, which dates its files, and this machine's

    def sync_directory(self, directory: Path) -> None:
        """Return once the names in a directory are on disk, where they can be flushed."""
        if self.can_sync_directory:
            _sync_directory(directory)


def probe(target: Path) -> Mount:
    """Try on a new file every operation that a dump needs.

    Raises:
        OutputError: the file system lacks what every dump needs, or no file can be made there.
    """
    directory = target.parent
    with OutputError.when(f"cannot write {target}"), _new_file(directory) as (fd, path):
        ahead = os.fstat(fd).st_mtime - time.time()
        if path is not None:
            with _needed(directory, "rename a file"):
                path.replace(path.with_suffix(".renamed"))
        with _needed(directory, "write at an offset"):
            _check_offsets(fd)
        with _needed(directory, "flush a file to disk"):
            os.fsync(fd)
            os.fdatasync(fd)
        return Mount(
            has_locks=_has_locks(fd),
            can_reserve=_succeeds(lambda: _rust.reserve(fd, 1)),
            can_write_direct=_succeeds(lambda: _write_direct(fd)),
            can_sync_directory=_succeeds(lambda: _sync_directory(directory)),
            clock_ahead=ahead,
        )


def owner_of_new_files(directory: Path) -> int:
    """Make a file to see its owner: some network mounts show one owner for all files."""
    with _new_file(directory) as (fd, _):
        return os.fstat(fd).st_uid


@contextmanager
def _new_file(directory: Path) -> Iterator[tuple[int, Path | None]]:
    """Make a file without a name, or with a name that is removed where all files have names."""
    path = None
    try:
        fd = os.open(directory, os.O_RDWR | os.O_TMPFILE, 0o666)
    except OSError:
        path = directory / f".{secrets.token_hex(8)}.probe"
        fd = create(path, os.O_RDWR)
    try:
        yield fd, path
    finally:
        os.close(fd)
        for name in () if path is None else (path, path.with_suffix(".renamed")):
            with suppress(OSError):
                name.unlink(missing_ok=True)


@contextmanager
def _needed(directory: Path, what: str) -> Iterator[None]:
    """Name a file system that refuses as unfit. A full disk shows when space is reserved."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EIO:
            raise
        if error.errno not in _FULL:
            raise OutputError(
                f"{directory} cannot hold a dump, because its file system cannot {what} "
                f"({error.strerror}); choose an output on another disk, and copy the finished file"
            ) from None


def _check_offsets(fd: int) -> None:
    end = 2 * mmap.PAGESIZE
    os.pwrite(fd, b"2", end)
    os.pwrite(fd, b"1", 0)
    if os.pread(fd, end + 2, 0) != b"1".ljust(end, b"\0") + b"2":
        raise OSError(errno.ESPIPE, "it appends")
    os.ftruncate(fd, mmap.PAGESIZE)


def _has_locks(fd: int) -> bool:
    second = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(second)
    return False


def _write_direct(fd: int) -> None:
    direct = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, mmap.PAGESIZE) as aligned:
            os.pwrite(direct, aligned, 0)
    finally:
        os.close(direct)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _succeeds(attempt: Callable[[], bool | None]) -> bool:
    """Return False where an attempt fails, but on a full disk: only its space is lacking."""
    try:
        return attempt() is not False
    except OSError as error:
        return error.errno in _FULL


def create(path: Path, flags: int) -> int:
    """Create a file, with the permissions that any new file gets there, and open it.

    Raises:
        FileExistsError: the name is taken; it may be a link that somebody planted.
    """
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def _check_replaceable(target: Path, found: os.stat_result, directory: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise OutputError(f"{target} is a directory; name a file in it")
    if not stat.S_ISREG(found.st_mode):
        raise OutputError(f"{target} is not an ordinary file; choose another output")
    if not _is_writable(target, found):
        with _new_file(target.parent) as (fd, _):
            is_writable = _is_writable(f"/proc/self/fd/{fd}", os.fstat(fd))
        if is_writable:  # Otherwise the mount shows one mode for all files.
            raise OutputError(
                f"{target} is write-protected; permit writing, or choose another output"
            )
    is_sticky = directory.st_mode & stat.S_ISVTX
    owners = (0, found.st_uid, directory.st_uid)
    if (
        is_sticky
        and os.geteuid() not in owners
        and found.st_uid != owner_of_new_files(target.parent)
    ):
        raise OutputError(
            f"{target} belongs to another user, in a directory where only its owner may replace "
            "it; choose another output"
        )


def _is_writable(path: str | Path, found: os.stat_result) -> bool:
    # Root may write any file, but a file without write permission is meant to stay.
    return bool(found.st_mode & 0o222) and os.access(path, os.W_OK)
