"""What is checked of any path before it is read."""

from pathlib import Path

from dump_activations.errors import DumpActivationsError


def check_ordinary(path: Path, error: type[DumpActivationsError]) -> None:
    """Raise `error` where the path leads to a directory, a named pipe or a device.

    The last two could be read, or waited for, without end.
    """
    if path.exists() and not path.is_file():
        raise error(f"{path}: not an ordinary file")
