"""What the command changes about its own process. A library would leave it to the program."""

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from dump_activations.pipeline.interrupts import die_of, ignore_interrupts

# From glibc's malloc.h. 32 MiB is the highest threshold that it accepts.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_NEVER = (1 << 31) - 1


@contextmanager
def uncollected_imports() -> Iterator[None]:
    """Keep the garbage collector from what is imported inside the context, now and at exit.

    torch makes a million objects that live until the end: looking through them again and again
    takes a quarter of its import, and once more as the process ends.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def keep_freed_memory() -> None:
    """Have malloc reuse the memory that a forward pass frees instead of returning it.

    By default the temporaries of each operation are mapped and their pages zeroed afresh, which
    takes as long as computing them. Does nothing where the C library is not glibc.
    """
    import ctypes  # Only a run needs it, --help does not.

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


def leave(code: int) -> NoReturn:
    """End the process with an exit code, as `sys.exit` does but for taking the interpreter apart.

    A negative code is a signal to die of: a shell's loop stops only where a command did, and a
    scheduler reads it off too. What is registered to run at exit runs. What torch made is left to
    the system, which frees it at once; freed one by one it takes a tenth of a second.
    """
    ignore_interrupts()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # The interpreter's own end reports it.
        if code >= 0:
            sys.exit(code)
    if code < 0:
        die_of(-code)
    os._exit(abs(code))
