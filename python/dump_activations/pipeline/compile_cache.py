"""Where torch keeps what it compiles, and runs again: a directory of the user's own."""

import os
import stat
import tempfile
from pathlib import Path

from dump_activations.errors import DeviceError, option

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def use_own_cache() -> None:
    """Have torch keep what it compiles where nobody else can write, unless the user says where.

    By default that is in the shared temporary directory, under a name that anyone can foresee: what
    another user puts there would be run.

    Raises:
        DeviceError: the directory cannot be made, or is not this user's alone.
    """
    chosen = os.environ.get(_VARIABLE)
    # torch sets it as well, to its default.
    if chosen and not chosen.startswith(f"{tempfile.gettempdir()}/torchinductor_"):
        return
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        directory = caches / "dump-activations" / "torch"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except (OSError, RuntimeError) as error:  # The latter where there is no home.
        raise DeviceError(
            f"{option('compile')}: torch can cache nothing ({error}); set {_VARIABLE}"
        ) from error
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not is_own or found.st_mode & 0o077:
        raise DeviceError(
            f"{option('compile')}: {directory} is not a directory of this user's alone (mode 0700)"
            f"; remove it, or set {_VARIABLE}"
        )
    os.environ[_VARIABLE] = str(directory)
