"""Sparse local copies of remote files, which fill block by block as they are read.

A mirror is a file in the cache, as long as the remote file and with holes where nothing was read.
Next to it lie `NAME.json`, which names the remote file, and `NAME.blocks`, with one bit per block
that is there. It belongs to one version of the remote file. A view is a directory of links to the
mirrors of one remote directory, so that everything that reads local files reads it as one.

Shape letters: K ranges of bytes, M blocks.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dump_activations.errors import RemoteError

if TYPE_CHECKING:
    # The clients of stores take longer to import than the package. A local file needs none.
    from dump_activations.remote.stores import Location, RemoteFile

BLOCK_NBYTES = 4096
# One request reads over gaps of this many blocks: 32 KiB cost less than another round trip.
_GAP_BLOCKS = 8
_REQUEST_BLOCKS = (8 << 20) // BLOCK_NBYTES
# A link of 100 MB/s and 20 ms holds 2 MB. More would only make slow links time out.
_NBYTES_UNDER_WAY = 32 << 20

CACHE_VARIABLE = "DUMP_ACTIVATIONS_CACHE"
SIZE_VARIABLE = "DUMP_ACTIVATIONS_CACHE_GB"
_DEFAULT_GB = 100
_CANNOT_WRITE = f"cannot write the cache {{}}, which {CACHE_VARIABLE} can move"

Ranges = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Where ranges of bytes begin and end, int64 (K,) each."""


def view_of(location: Location, files: Sequence[RemoteFile]) -> Path:
    """Make a directory of links to the mirrors of some files of a remote directory.

    Raises:
        RemoteError: the cache cannot be written, or belongs to another user.
    """
    versions = json.dumps([location.url, location.commit, *files])
    view = cache_directory("views", location.url, _key(versions))
    _make_room(_cache())
    for file in files:
        become_mirror(view / file.name, location, file)
    return view


def cache_directory(kind: str, url: str, name: str = "") -> Path:
    """Make a directory of the cache that stands for a remote one.

    Raises:
        RemoteError: the cache cannot be written, or belongs to another user.
    """
    root = _cache()
    scheme, _, rest = url.partition("://")
    directory = Path(os.path.realpath(root / kind / scheme / rest / name))
    with RemoteError.when(_CANNOT_WRITE.format(root)):
        directory.mkdir(parents=True, exist_ok=True)
    return directory


def become_mirror(path: Path, location: Location, file: RemoteFile) -> None:
    """Replace a path by a link to the mirror of a remote file, unless it is that link.

    Raises:
        RemoteError: the cache cannot be written.
    """
    target = Path(os.path.relpath(_mirror_of(location, file), path.parent))
    if path.is_symlink() and path.readlink() == target:
        return
    # Hidden, so that a listing of the dump's files leaves it alone.
    link = path.with_name(f".{path.name}.{os.getpid()}")
    with RemoteError.when(_CANNOT_WRITE.format(path)):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        link.replace(path)
    _mirror_at.cache_clear()


def _mirror_of(location: Location, file: RemoteFile) -> Path:
    """Return the mirror of a remote file, marked as used, or made without blocks."""
    _locations[location.url, location.commit] = location
    mirror = _cache() / "files" / _key(json.dumps([location.url, location.commit, *file]))
    described = _beside(mirror, ".json")
    with RemoteError.when(_CANNOT_WRITE.format(mirror)):
        if described.exists():
            os.utime(described)
            return mirror
        for path, size in ((mirror, file.size), (_beside(mirror, ".blocks"), 0)):
            with path.open("ab") as made:
                made.truncate(size)
        _set_time(mirror, file)
        # The description comes last: without it the other two are not a mirror yet.
        text = json.dumps({"url": location.url, "commit": location.commit, "file": file._asdict()})
        temporary = _beside(mirror, f".{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(described)
    return mirror


def requests_for(ranges: Mapping[Path, Ranges]) -> list[Request]:
    """List the requests that make ranges of bytes of mirrored files local; none for other files."""
    found = [(mirror, span) for path, span in ranges.items() if (mirror := _mirror_at(path))]
    return [Request(mirror, *each) for mirror, span in found for each in mirror.missing(*span)]


def fetch(requests: Sequence[Request], is_cancelled: Callable[[], bool] | None = None) -> None:
    """Make the blocks of requests local. Another thread ends it early by `is_cancelled`.

    Raises:
        RemoteError: the server refuses or does not answer, a file changed, or the cache is full.
    """
    if requests:
        from dump_activations.remote.requests import run_all

        at_once = max(1, _NBYTES_UNDER_WAY // max(each.nbytes for each in requests))
        run_all([each.make for each in requests], at_once, is_cancelled)


def fetch_span(path: Path, start: int, nbytes: int) -> None:
    """Make one range of bytes of a mirrored file local; any other file is left alone."""
    fetch(requests_for({path: (np.array([start]), np.array([start + nbytes]))}))


def fetch_whole(path: Path) -> None:
    """Make a mirrored file local; any other file is left alone."""
    if (mirror := _mirror_at(path)) is not None:
        fetch_span(path, 0, mirror.file.size)


def is_mirror(path: Path) -> bool:
    """Return True for a file of a view, which may have holes."""
    return _mirror_at(path) is not None


def url_of(path: Path) -> str | None:
    """Return the URL that a mirrored file is a copy of; None for any other file."""
    mirror = _mirror_at(path)
    return f"{mirror.location_url}/{mirror.file.name}" if mirror else None


def open_binary(path: Path) -> io.BufferedReader:
    """Open a file for reading; a mirror fetches what is read."""
    mirror = _mirror_at(path)
    return path.open("rb") if mirror is None else io.BufferedReader(_MirrorReader(path))


class _MirrorReader(io.FileIO):
    """A mirror opened for reading. Each read makes its bytes local first."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self._path = path

    def readinto(self, buffer: Any) -> int:
        fetch_span(self._path, self.tell(), memoryview(buffer).nbytes)
        return super().readinto(buffer)

    def readall(self) -> bytes:
        data = bytearray(os.fstat(self.fileno()).st_size - self.tell())
        return bytes(data[: self.readinto(data)])


class Request(NamedTuple):
    """Blocks of a mirror to request, from `first` to before `stop`."""

    mirror: _Mirror
    first: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes to transfer."""
        return (self.stop - self.first) * BLOCK_NBYTES

    def make(self) -> None:
        """Request the blocks, unless they came meanwhile, and write them."""
        if not self.mirror.has(self.first, self.stop):
            self.mirror.read(self.first, self.stop)


class _Mirror:
    """A mirror that this process reads."""

    def __init__(self, path: Path) -> None:
        from dump_activations.remote.stores import RemoteFile

        described = json.loads(_beside(path, ".json").read_bytes())
        self.location_url = str(described["url"])  # of the remote directory
        self.file = RemoteFile(**described["file"])
        self._commit: str | None = described["commit"]
        self._path = path
        self._lock = threading.Lock()
        # Locked while this process lives, so that no other one makes room by removing the file.
        self._in_use = os.open(_beside(path, ".json"), os.O_RDONLY)
        fcntl.flock(self._in_use, fcntl.LOCK_SH)
        blocks = -(-self.file.size // BLOCK_NBYTES)
        self._bits = np.zeros(-(-blocks // 8), np.uint8)
        there = np.fromfile(_beside(path, ".blocks"), np.uint8)[: len(self._bits)]
        self._bits[: len(there)] = there

    def missing(
        self, starts_K: NDArray[np.int64], stops_K: NDArray[np.int64]
    ) -> Iterator[tuple[int, int]]:
        """Yield ranges of blocks to request for ranges of bytes: first block, and one past it."""
        stops_K = np.minimum(stops_K, self.file.size)
        has_bytes = stops_K > starts_K
        first_K = starts_K[has_bytes] // BLOCK_NBYTES
        counts_K = (stops_K[has_bytes] - 1) // BLOCK_NBYTES + 1 - first_K
        if not len(first_K):
            return
        ends_K = np.cumsum(counts_K)
        blocks_M = np.repeat(first_K - (ends_K - counts_K), counts_K) + np.arange(ends_K[-1])
        # Not `np.unique`, which hashes: sorting is 8 times as fast.
        blocks_M.sort()
        blocks_M = blocks_M[np.diff(blocks_M, prepend=-1) > 0]
        blocks_M = blocks_M[self._lacks(blocks_M)]
        if not len(blocks_M):
            return
        cuts = np.flatnonzero(np.diff(blocks_M) > _GAP_BLOCKS) + 1
        firsts = blocks_M[np.concatenate([[0], cuts])]
        lasts = blocks_M[np.concatenate([cuts - 1, [len(blocks_M) - 1]])]
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            for start in range(first, last + 1, _REQUEST_BLOCKS):
                yield start, min(start + _REQUEST_BLOCKS, last + 1)

    def has(self, first: int, stop: int) -> bool:
        """Return True if blocks from `first` to before `stop` are there."""
        return not self._lacks(np.arange(first, stop)).any()

    def _lacks(self, blocks_M: NDArray[np.int64]) -> NDArray[np.bool_]:
        lacking_M: NDArray[np.bool_] = (self._bits[blocks_M >> 3] >> (7 - (blocks_M & 7))) & 1 == 0
        return lacking_M

    def read(self, first: int, stop: int) -> None:
        """Request blocks, write them, then their bits."""
        start = first * BLOCK_NBYTES
        end = min(stop * BLOCK_NBYTES, self.file.size)
        remote = self.location_url, self._commit
        if remote not in _locations:  # This worker was spawned: it makes its own connection.
            from dump_activations.remote.stores import Location

            _locations[remote] = Location.of(*remote)
        data = _locations[remote].read(self.file, start, end)
        with RemoteError.when(_CANNOT_WRITE.format(self._path)):
            fd = os.open(self._path, os.O_WRONLY)
            try:
                while data:
                    written = os.pwrite(fd, data, start)
                    data, start = data[written:], start + written
                _set_time(fd, self.file)
            finally:
                os.close(fd)
            self._mark(first, stop)

    def _mark(self, first: int, stop: int) -> None:
        """Set the bits of blocks that are written.

        The order matters: a bit that a kill leaves without its block would be read as zeros.
        """
        low, high = first >> 3, (stop + 7) >> 3
        bits = np.zeros((high - low) * 8, np.uint8)
        bits[first - 8 * low : stop - 8 * low] = 1
        fd = os.open(_beside(self._path, ".blocks"), os.O_RDWR)
        try:
            with self._lock:
                # Other processes mark blocks of their own. A bit that is lost is only read again.
                there = np.frombuffer(
                    os.pread(fd, high - low, low).ljust(high - low, b"\0"), np.uint8
                )
                self._bits[low:high] |= np.packbits(bits) | there
                os.pwrite(fd, self._bits[low:high].tobytes(), low)
        finally:
            os.close(fd)


# Connections by URL and commit. A user and password in a URL are here alone.
_locations: dict[tuple[str, str | None], Location] = {}

_mirror = cache(_Mirror)


@cache
def _mirror_at(path: Path) -> _Mirror | None:
    """Return the mirror that a path of a view links to; None for any other path."""
    if not path.is_symlink():
        return None
    target = path.parent / path.readlink()
    described = _beside(target, ".json")
    is_own = described.exists() and described.stat().st_uid == os.geteuid()
    return _mirror(target) if is_own else None


def _cache() -> Path:
    """Return the cache's directory, made for this user alone."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(os.environ.get(CACHE_VARIABLE) or Path(base, "dump-activations"))
    root = root.expanduser().absolute()
    with RemoteError.when(_CANNOT_WRITE.format(root)):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.stat().st_uid != os.geteuid():
            raise RemoteError(
                f"the cache {root} belongs to another user; set {CACHE_VARIABLE} to a directory of "
                "your own"
            )
        (root / "files").mkdir(exist_ok=True)
    return root


def _set_time(mirror: Path | int, file: RemoteFile) -> None:
    """Give a mirror the remote file's time, so that a read of more blocks is no change of it."""
    os.utime(mirror, (file.modified or 0,) * 2)


def _make_room(root: Path) -> None:
    """Remove the mirrors that were not used for longest until the cache is within its limit."""
    limit = float(os.environ.get(SIZE_VARIABLE) or _DEFAULT_GB) * 1e9
    described = sorted((root / "files").glob("*.json"), key=lambda each: each.stat().st_mtime)
    sizes = {each: each.with_suffix("").stat().st_blocks * 512 for each in described}
    total = sum(sizes.values())
    for each in described:
        if total <= limit:
            return
        with each.open("rb") as held:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # A process reads it.
                continue
            each.unlink()
            for path in (_beside(each.with_suffix(""), ".blocks"), each.with_suffix("")):
                path.unlink(missing_ok=True)
        total -= sizes[each]


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
