"""Whether there is room for an output file, found out without beginning it."""

import errno
import os
import shutil

from dump_activations.errors import OutputError
from dump_activations.storage.writing.targets import nearest_directory, partial_path, target_of


def free_space(path: str | os.PathLike[str]) -> int:
    """Count the bytes that an output may take: what is free, and what its partial file has."""
    with OutputError.when(f"cannot write {os.fspath(path)}"):
        target = target_of(path)
        partial = partial_path(target)
        taken = partial.stat().st_blocks * 512 if partial.is_file() else 0
        return shutil.disk_usage(nearest_directory(target)).free + taken


def check_room(path: str | os.PathLike[str], nbytes: int) -> None:
    """Find whether a file of so many bytes could be begun, where `check_output` found nothing.

    Raises:
        OutputError: there is too little space.
    """
    if free_space(path) < nbytes:
        shortage = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise OutputError.of_system(f"cannot reserve {nbytes:,} bytes for {path}", shortage)
