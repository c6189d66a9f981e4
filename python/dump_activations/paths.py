"""Checks of every path that a user gives."""

import os
import re
from contextlib import suppress
from pathlib import Path

from dump_activations.errors import DumpActivationsError, InvalidArgumentError, option

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def is_url(path: object) -> bool:
    """Return True for text of the form `scheme://...`."""
    return isinstance(path, str) and _URL.match(path) is not None


def locate(path: str | os.PathLike[str], name: str = "") -> Path:
    """Turn a path argument into an absolute path, with `~` expanded and links kept.

    A program may change its directory later, so a relative path is resolved when it is given.

    Args:
        path: what the user gave.
        name: the option it was given for; errors name it.

    Raises:
        InvalidArgumentError: the path is empty, a URL, or names a home that does not exist.
    """
    text = os.fsdecode(path)
    if not text:
        raise InvalidArgumentError(f"{option(name) if name else 'a path'}: must not be empty")
    if _URL.match(text):
        raise InvalidArgumentError(
            f"{text}: must be a path, got a URL; copy it to a disk, or mount it, and give its path"
        )
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise InvalidArgumentError(
            f"{text}: this user has no home directory; write the path without ~"
        ) from None


def check_reachable(path: Path, error: type[DumpActivationsError]) -> None:
    """Raise `error` where the system refuses to look for the path: it is too long, or locked up."""
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, ValueError) as refusal:
        reason = getattr(refusal, "strerror", None) or refusal
        raise error(f"{path}: {reason}; choose another path") from refusal


def check_ordinary(path: Path, error: type[DumpActivationsError]) -> None:
    """Raise `error` where the path leads to a directory, a named pipe or a device.

    Reading a pipe or a device could block or never end.
    """
    check_reachable(path, error)
    if path.exists() and not path.is_file():
        raise error(f"{path}: not an ordinary file")
