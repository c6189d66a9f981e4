"""The process of a command: its exit code, its signals, its memory and its last output."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from dump_activations.pipeline.interrupts import (
    UNREAD,
    HeldInterrupts,
    die_of,
    ignore_interrupts,
    signal_of,
    terminated_like_interrupted,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import NoReturn

    import click

_FAILED, _WRONG_CALL = 1, 2

# From glibc's malloc.h. 32 MiB is the highest threshold that it accepts.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
_NEVER = (1 << 31) - 1


def run_command(command: click.Command, arguments: Sequence[str] | None) -> int:
    """Run a command and return its exit code: 0, 2 for a wrong call, 1 for every other error.

    An interrupted command returns the signal's number, negative. So does a command whose reader
    closed stdout, as `head` does. An error is one line on stderr.

    Args:
        command: the command.
        arguments: the arguments after its name; None takes the process's own.
    """
    import click

    from dump_activations.commands.console import UnreadError, shown_warnings, written_stdout
    from dump_activations.errors import DumpActivationsError

    arguments = sys.argv[1:] if arguments is None else arguments
    code = 0
    try:
        # `click.main` would lose the notes of an interruption.
        with shown_warnings(), terminated_like_interrupted():
            with written_stdout():  # --help and --version print while arguments are parsed.
                context = command.make_context(command.name, [*arguments], obj=[*arguments])
            with context:
                command.invoke(context)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        return _failed(_WRONG_CALL, error.format_message())
    except UnreadError:
        code = UNREAD
    except DumpActivationsError as error:
        return _failed(error.exit_code, error.flags_text, error)
    except KeyboardInterrupt as error:
        return interrupted(error)
    except Exception as error:
        if sys.flags.dev_mode:  # Developers want the traceback (python -X dev).
            raise
        return _failed(_FAILED, f"{type(error).__name__}: {error}", error)
    return code


def interrupted(interrupt: KeyboardInterrupt) -> int:
    """Print that a command was interrupted, and return the signal's number, negative."""
    return _failed(-signal_of(interrupt), "interrupted", interrupt)


def _failed(code: int, text: str, error: BaseException | None = None) -> int:
    """Print why a command failed, and return its exit code."""
    from dump_activations.commands.console import print_error

    notes = getattr(error, "__notes__", [])
    line = "; ".join([text, *(getattr(note, "flags_text", note) for note in notes)])
    print_error(line)
    return code


def leave(code: int) -> NoReturn:
    """End the process with an exit code, or by a signal where it is negative.

    A shell's loop stops only if the signal ended the command, and a scheduler reads it too. The
    functions registered with `atexit` run. Nothing is freed: the system does it at once, and
    freeing torch's objects one by one takes a tenth of a second.
    """
    ignore_interrupts()
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    try:
        sys.stdout.flush()
    except OSError as error:
        if code == 0:
            code = UNREAD if isinstance(error, BrokenPipeError) else _FAILED
            if code == _FAILED:
                _failed(code, f"cannot write to stdout: {error.strerror}")
    except (ValueError, AttributeError):  # stdout is closed, or there is none.
        pass
    if code < 0:
        die_of(-code)
    os._exit(abs(code))


@contextmanager
def uncollected_imports() -> Iterator[None]:
    """Exempt modules imported inside the context from garbage collection, and from interruption.

    torch makes a million objects that live until the end. Visiting them takes a quarter of its
    import. A signal waits until the context ends: modules catch KeyboardInterrupt as they load.
    """
    with HeldInterrupts():
        gc.disable()
        try:
            yield
        finally:
            gc.freeze()
            gc.enable()


def keep_freed_memory() -> None:
    """Let malloc reuse the memory that a forward pass frees, where the C library is glibc.

    By default malloc maps and zeroes the temporaries of each operation again, which takes as long
    as computing them.
    """
    import ctypes  # --help does not need it.

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
