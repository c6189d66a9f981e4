"""What is checked of any path before it is read or written."""

from contextlib import suppress
from pathlib import Path

from dump_activations.errors import DumpActivationsError


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

    The pipe or the device could be read, or waited for, without end.
    """
    check_reachable(path, error)
    if path.exists() and not path.is_file():
        raise error(f"{path}: not an ordinary file")
