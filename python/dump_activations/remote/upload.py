"""Outputs behind a URL: shards are written in the cache, and uploaded once they are whole.

The directory in the cache stands for the remote one. A shard that is uploaded becomes a link to its
mirror there, as in a view, and so do the shards that others uploaded. Code that looks for finished
shards in a directory then finds all of them, and their bytes take no local space.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING

from dump_activations.errors import InvalidArgumentError, RemoteError, is_url, locate, option

if TYPE_CHECKING:
    # A local output needs neither the clients of stores nor NumPy.
    from dump_activations.remote.stores import Location

_WRITABLE = ("s3://", "gs://", "az://", "hf://")
MOST_LOCAL = 2
"""Shards that take local space: one is written while another is uploaded."""

_POLL_SECONDS = 0.2


def output_path(output: str | os.PathLike[str]) -> Path:
    """Return the absolute path of an output: of a file in the cache, where a URL is given.

    Raises:
        InvalidArgumentError: the path is empty, or nothing can be written at the URL.
        RemoteError: the server refuses or does not answer, or the cache cannot be written.
    """
    if not is_url(output):
        return locate(output, "output")
    from dump_activations.remote.mirror import cache_directory

    location, name = place_of(os.fspath(output), "output", make=True)
    directory = cache_directory("outputs", location.url)
    uploads = _uploads.setdefault(directory, Uploads(location.url, directory))
    uploads.begin(Path(name).stem)
    return directory / name


def place_of(url: str, name: str, *, make: bool) -> tuple[Location, str]:
    """Connect to the directory of a file to be written, whose URL option `name` gave.

    Raises:
        InvalidArgumentError: nothing can be written there.
        RemoteNotFoundError: a repository is missing, and `make` does not ask to make it.
        RemoteError: the server refuses or does not answer.
    """
    from dump_activations.remote.stores import Location, without_secrets

    scheme, _, path = url.partition("://")
    if f"{scheme.lower()}://" not in _WRITABLE or re.search(r"[?#]", url) or "/" not in path:
        raise InvalidArgumentError(
            f"{without_secrets(url)}: {option(name)} must be a path, or a URL of a file that "
            f"begins with {', '.join(_WRITABLE)} and has no query"
        )
    parent, _, file = url.rstrip("/").rpartition("/")
    return Location.of(parent, make=make), file


def uploads_of(directory: Path) -> Uploads | None:
    """Return the uploads of an output's directory; None for a directory that is local only."""
    return _uploads.get(directory)


class Uploads:
    """The uploads from a directory of the cache to a remote one."""

    def __init__(self, url: str, directory: Path) -> None:
        self._url = url
        self._directory = directory
        self._under_way: dict[Path, Future[None]] = {}
        self._earlier: set[Path] = set()  # under way since a call that was interrupted

    def url_of(self, path: Path) -> str:
        """Return the URL of a file of the directory."""
        return f"{self._url}/{path.name}"

    def begin(self, stem: str) -> None:
        """Begin a call: refresh, and ignore errors of uploads that an earlier call began."""
        self._earlier = set(self._under_way)
        self.refresh(stem)

    def refresh(self, stem: str) -> None:
        """Link the files that begin with a stem and are there by now; drop links of those gone.

        Raises:
            RemoteError: the server refuses or does not answer, or the cache cannot be written.
        """
        from dump_activations.remote.mirror import become_mirror
        from dump_activations.remote.requests import RemoteNotFoundError
        from dump_activations.remote.stores import Location

        location = Location.of(self._url, make=True)
        try:
            files = location.list(lambda name: name.startswith(stem))
        except RemoteNotFoundError:
            files = []
        there = {self._directory / file.name: file for file in files}
        for path in self._directory.glob(f"{stem}*"):
            if path.is_symlink() and path not in there:
                path.unlink(missing_ok=True)
        for path, file in there.items():
            if path.is_symlink() or not path.exists():  # A file is still to be uploaded.
                become_mirror(path, location, file)

    def start(self, path: Path, card: str) -> None:
        """Upload a finished file in the background, if it is not there yet.

        The hub gets `card` as README.md too, unless it has one.
        """
        from dump_activations.remote.requests import in_background

        before = self._under_way.get(path)
        if path.is_symlink() or (before is not None and path not in self._earlier):
            return
        self._earlier.discard(path)

        def upload() -> None:
            if before is not None:
                before.exception()  # Wait for it.
            if not path.is_symlink():
                self._upload(path, card)

        self._under_way[path] = in_background(upload)

    def wait(self, check: Callable[[], object], most: int) -> None:
        """Wait until at most some uploads are under way.

        Raises:
            RemoteError: an upload failed. Its file is kept.
        """
        while len(self._under_way) > most:
            for path, done in list(self._under_way.items()):
                check()
                if not wait([done], _POLL_SECONDS).done:
                    continue
                del self._under_way[path]
                if (error := done.exception()) is not None and path not in self._earlier:
                    raise error

    def _upload(self, path: Path, card: str) -> None:
        from dump_activations.remote.mirror import become_mirror
        from dump_activations.remote.stores import Location

        sent = path.stat()
        try:
            location = Location.of(self._url, make=True)
            location.write(path.name, path)
            if location.commit is not None and location.head("README.md") is None:
                location.write("README.md", card.encode())
            location = Location.of(self._url)
            found = location.head(path.name)
            if found is None or found.size != sent.st_size:
                raise RemoteError(f"{self.url_of(path)} is not whole there")
        except RemoteError as error:
            raise RemoteError(f"{error}; {path} is kept, and the same call uploads it") from error
        if path.stat().st_ino == sent.st_ino:  # Else a later call made another file of this name.
            become_mirror(path, location, found)


_uploads: dict[Path, Uploads] = {}
