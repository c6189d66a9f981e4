"""Runs a command: errors become one line on stderr and an exit code."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from dump_activations.commands.console import print_error, shown_warnings
from dump_activations.commands.process import leave
from dump_activations.errors import DumpActivationsError
from dump_activations.pipeline.interrupts import signal_of, terminated_like_interrupted

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

    Of an interrupted command it is the signal's number, negative.

    Args:
        command: what to run.
        arguments: those after the command's name; None takes the process's own.
    """
    try:
        with shown_warnings(), terminated_like_interrupted():
            _invoke(command, sys.argv[1:] if arguments is None else arguments)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        print_error(error.format_message())
        return _WRONG_CALL
    except DumpActivationsError as error:
        print_error(_with_notes(error.flags_text, error))
        return error.exit_code
    except KeyboardInterrupt as error:
        print_error(_with_notes("interrupted", error))
        return -signal_of(error)
    except Exception as error:
        # In development mode (python -X dev) the traceback is wanted.
        if sys.flags.dev_mode:
            raise
        print_error(_with_notes(f"{type(error).__name__}: {error}", error))
        return _FAILED
    return 0


def _invoke(command: click.Command, arguments: Sequence[str]) -> None:
    """Run a command without `click.main`, which loses the notes of an interruption."""
    with command.make_context(command.name, [*arguments]) as context:
        command.invoke(context)


def _with_notes(text: str, error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    return "; ".join([text, *(getattr(note, "flags_text", note) for note in notes)])
