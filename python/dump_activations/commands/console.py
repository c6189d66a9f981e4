"""Output of the commands: errors, warnings and notes on stderr, tables and JSON on stdout."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import sys
import textwrap
import warnings
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import click

from dump_activations.errors import DumpActivationsNote, DumpActivationsWarning, OutputError
from dump_activations.progress import is_terminal, live_console, silent_progress
from dump_activations.text import printable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from rich.console import Console

_LONGEST_LINE = 500
_LONGEST_END = 150

# A last column of text may wrap to so few characters. A table that needs more room is stacked.
_NARROWEST_TEXT = 20

_is_quiet = ContextVar("_is_quiet", default=False)
_speaker = ""


class UnreadError(OutputError):
    """The reader of stdout has closed it, as `head` does."""


@contextmanager
def quietly() -> Iterator[None]:
    """Print neither notes nor tables nor progress inside the context."""
    token = _is_quiet.set(True)
    try:
        with silent_progress():
            yield
    finally:
        _is_quiet.reset(token)


def speak_as(name: str) -> None:
    """Name this process in each of its lines on stderr: several processes may share a terminal."""
    global _speaker  # noqa: PLW0603 -- there is one process
    _speaker = f"{name}: "


def print_error(text: str) -> None:
    """Print one red line on stderr."""
    _print_line("error", "red", text)


def print_warning(text: str) -> None:
    """Print one yellow line on stderr."""
    _print_line("warning", "yellow", text)


def print_note(text: str) -> None:
    """Print one blue line on stderr, unless the command is quiet."""
    if not _is_quiet.get():
        _print_line("note", "blue", text)


def _print_line(label: str, colour: str, text: str) -> None:
    """Print a line of at most 500 characters. A longer text loses its middle."""
    label += ": "
    text = printable(_speaker + " ".join(text.splitlines()), sys.stderr)
    if len(label) + len(text) > _LONGEST_LINE:
        start = _LONGEST_LINE - _LONGEST_END - len(f"{label} ... ")
        text = f"{text[:start]} ... {text[-_LONGEST_END:]}"
    if (live := live_console()) is not None:
        from rich.text import Text

        live.print(Text.assemble((label, f"bold {colour}"), text), soft_wrap=True)
        return
    if not os.environ.get("NO_COLOR"):
        label = click.style(label, fg=colour, bold=True)
    with suppress(AttributeError, OSError, ValueError):  # No stderr ends a run.
        click.echo(label + text, err=True)


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Print each warning and note of this package in a line. Other packages' are hidden."""

    def show(message: Warning | str, *_more: Any, **_others: Any) -> None:
        if isinstance(message, DumpActivationsNote):
            print_note(message.flags_text)
        elif isinstance(message, DumpActivationsWarning):
            print_warning(message.flags_text)

    with warnings.catch_warnings():
        warnings.simplefilter("always", DumpActivationsWarning)
        warnings.showwarning = show
        yield


@contextmanager
def written_stdout() -> Iterator[None]:
    """Write to stdout inside the context, up to its last byte.

    Raises:
        OutputError: stdout cannot be written.
        UnreadError: the reader has closed stdout.
    """
    with OutputError.when("cannot write to stdout"):
        try:
            yield
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError as error:
            raise UnreadError.of_system("cannot write to stdout", error) from error


def print_json(value: object) -> None:
    """Print JSON on one line of stdout. Numbers that are not finite become null."""
    with written_stdout():
        click.echo(json.dumps(_finite(value), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        headings: one per column.
        rows: cells of each row; a single cell is the title of the rows below it.
        numbers: headings of the columns that are aligned to the right.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Collection[str] = ()


def print_parts(*parts: str | Table) -> None:
    """Print lines and tables on stdout, unless the command is quiet.

    A pipe gets each line and each row of a table on one line, whole and without styles.
    """
    if sys.stdout is None or _is_quiet.get():
        return
    from rich.console import Console
    from rich.text import Text

    on_terminal = is_terminal(sys.stdout)
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    shown = io.StringIO()
    console = Console(
        file=shown,
        width=shutil.get_terminal_size().columns if on_terminal else 1 << 20,
        height=24,  # Without it rich takes every dumb terminal for 80 columns.
        color_system="standard" if on_terminal and not plain else None,
        force_terminal=on_terminal,
        force_jupyter=False,
    )
    for part in parts:
        if isinstance(part, Table):
            _print_table(console, part)
        else:
            # A word longer than the terminal stays whole: a path is for copying.
            text = printable(part, sys.stdout)
            text = textwrap.fill(
                text, console.width, break_long_words=False, break_on_hyphens=False
            )
            console.print(Text(text), overflow="ignore", crop=False)
    with written_stdout():
        click.echo("\n".join(line.rstrip() for line in shown.getvalue().splitlines()))


def _print_table(console: Console, table: Table) -> None:
    """Print a table whose last column of text may wrap. Names and numbers stay whole.

    On a terminal that is too narrow, each row is printed as lines below its first cell.
    """
    from rich.cells import cell_len
    from rich.padding import Padding
    from rich.table import Table as Grid
    from rich.text import Text

    rows = [[printable(cell, sys.stdout) for cell in row] for row in table.rows]
    whole = [table.headings, *(row for row in rows if len(row) > 1)]
    needed = [max(map(cell_len, column)) for column in zip(*whole, strict=True)]
    has_text = table.headings[-1] not in table.numbers
    if has_text:
        needed[-1] = min(needed[-1], _NARROWEST_TEXT)
    console.print()
    if sum(needed) + 2 * len(needed) - 2 > console.width:
        for first, *others in rows:
            console.print(Text(first), overflow="ignore", crop=False)
            for heading, cell in zip(table.headings[1:], others, strict=False):
                if cell:
                    text = Text(f"{heading} {cell}", overflow="fold")
                    console.print(Padding(text, (0, 0, 0, 2)))
        return
    grid = Grid(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for heading in table.headings:
        is_number = heading in table.numbers
        wraps = has_text and heading == table.headings[-1]
        justify: Literal["right", "left"] = "right" if is_number else "left"
        grid.add_column(Text(heading), justify=justify, no_wrap=not wraps, overflow="fold")
    for row in rows:
        is_title = len(row) == 1
        if is_title:
            grid.add_row()
        grid.add_row(*[Text(cell, style="bold" if is_title else "") for cell in row])
    console.print(grid)
