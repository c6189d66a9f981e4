"""Whether an output file could be begun, found out without beginning it."""

import errno
import os
import shutil
from pathlib import Path

from dump_activations.errors import OutputError, switch
from dump_activations.storage.writing.partial import partial_path


def check_room(path: str | os.PathLike[str], nbytes: int, *, may_exist: bool) -> None:
    """Find what keeps a file from being begun, where `check_output` found nothing.

    Args:
        path: the target.
        nbytes: bytes of its tensors.
        may_exist: whether a partial file may be there; its space counts as free.

    Raises:
        OutputError: there is a partial file, or too little space.
    """
    target = Path(os.path.realpath(path))
    partial = partial_path(target)
    free = shutil.disk_usage(target.parent).free
    if partial.exists():
        if not may_exist:
            raise OutputError(
                f"{partial} is left over from an unfinished dump; go on with it by "
                f"{switch('resume')}, or drop it by {switch('overwrite')}"
            )
        free += partial.stat().st_blocks * 512
    if free < nbytes:
        shortage = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise OutputError.of_system(f"cannot reserve {nbytes:,} bytes for {target}", shortage)
