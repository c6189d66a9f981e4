"""Runs a command: errors become one line on stderr and an exit code."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from dump_activations.commands.console import UnreadError, print_error, shown_warnings
from dump_activations.commands.process import leave
from dump_activations.errors import DumpActivationsError
from dump_activations.pipeline.interrupts import UNREAD, signal_of, terminated_like_interrupted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

_WRONG_CALL = 2
_FAILED = 1


def be_process(command: click.Command) -> NoReturn:
    """Be a command's process: its arguments, its exit code, and its signal where one ended it."""
    leave(run_command(command, None))


def run_command(command: click.Command, arguments: Sequence[str] | None) -> int:
    """Run a command and return its exit code: 0, 2 for a wrong call, 1 for everything else.

    Of an interrupted command it is the signal's number, negative; so it is of one whose reader
    left, as `head` does.

    Args:
        command: what to run.
        arguments: those after the command's name; None takes the process's own.
    """
    code = 0
    try:
        with shown_warnings(), terminated_like_interrupted():
            _invoke(command, sys.argv[1:] if arguments is None else arguments)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        return _failed(_WRONG_CALL, error.format_message())
    except UnreadError:
        code = UNREAD
    except DumpActivationsError as error:
        return _failed(error.exit_code, error.flags_text, error)
    except KeyboardInterrupt as error:
        return _failed(-signal_of(error), "interrupted", error)
    except Exception as error:
        # In development mode (python -X dev) the traceback is wanted.
        if sys.flags.dev_mode:
            raise
        return _failed(_FAILED, f"{type(error).__name__}: {error}", error)
    return code


def _invoke(command: click.Command, arguments: Sequence[str]) -> None:
    """Run a command without `click.main`, which loses the notes of an interruption."""
    with command.make_context(command.name, [*arguments], obj=[*arguments]) as context:
        command.invoke(context)


def _failed(code: int, text: str, error: BaseException | None = None) -> int:
    """Say why a command failed, or leave it to who says it; return the exit code."""
    notes = getattr(error, "__notes__", [])
    line = "; ".join([text, *(getattr(note, "flags_text", note) for note in notes)])
    print_error(line)
    return code
