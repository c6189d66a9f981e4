"""What is printed: warnings, notes and errors on stderr, results on stdout."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

import click

from dump_activations.commands.tables import Table
from dump_activations.errors import DumpActivationsNote, DumpActivationsWarning, OutputError
from dump_activations.progress import live_console
from dump_activations.text import filled, printable

if TYPE_CHECKING:
    from collections.abc import Iterator


class UnreadError(OutputError):
    """Whoever reads stdout has seen enough, as `head` has."""


def print_error(text: str) -> None:
    """Print one red line on stderr."""
    _print_line("error", "red", text)


def print_warning(text: str) -> None:
    """Print one yellow line on stderr."""
    _print_line("warning", "yellow", text)


def print_note(text: str) -> None:
    """Print one blue line on stderr."""
    _print_line("note", "blue", text)


def _print_line(label: str, colour: str, text: str) -> None:
    text = printable(" ".join(text.splitlines()))
    if (rank := os.environ.get("RANK", "0")) != "0":  # one of several processes on one terminal
        text = printable(f"rank {rank}: {text}")
    if (live := live_console()) is not None:
        from rich.text import Text

        live.print(Text.assemble((f"{label}: ", f"bold {colour}"), text), soft_wrap=True)
        return
    label += ": "
    if not os.environ.get("NO_COLOR"):
        label = click.style(label, fg=colour, bold=True)
    with suppress(OSError):  # Nobody is left to be told.
        click.echo(label + text, err=True)


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Print this package's warnings and notes, a line each, and no one else's, in the context."""

    def show(message: Warning | str, *_more: Any, **_others: Any) -> None:
        if isinstance(message, DumpActivationsNote):
            print_note(message.flags_text)
        elif isinstance(message, DumpActivationsWarning):
            print_warning(message.flags_text)

    with warnings.catch_warnings():
        warnings.simplefilter("always", DumpActivationsWarning)
        warnings.showwarning = show
        yield


def print_json(value: object) -> None:
    """Print JSON, in a line, on stdout.

    Raises:
        OutputError: stdout cannot take it.
        UnreadError: nobody reads it any more.
    """
    with _named_stdout():
        click.echo(json.dumps(value))


def print_parts(*parts: str | Table) -> None:
    """Print lines and tables on stdout, with nothing wider than the terminal where it is one.

    Raises:
        OutputError: stdout cannot take it.
        UnreadError: nobody reads it any more.
    """
    if sys.stdout is None:
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    with _named_stdout():
        for part in parts:
            if isinstance(part, str):
                text = printable(part)
                click.echo(text if width is None else "\n".join(filled(text, width)))
            else:
                click.echo("\n".join(["", *part.lines(width, styled=_is_styled(sys.stdout))]))


def _is_styled(stream: TextIO) -> bool:
    """Whether a stream's lines may have colours and weights."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@contextmanager
def _named_stdout() -> Iterator[None]:
    """Raise an error that names stdout where it takes no text, or not this."""
    with OutputError.when("cannot write to stdout"):
        try:
            yield
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError as error:
            raise UnreadError.of_system("cannot write to stdout", error) from error
        except UnicodeError as error:
            raise OutputError(f"cannot write to stdout: {error}") from error
