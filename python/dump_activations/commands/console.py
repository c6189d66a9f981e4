"""Everything that is drawn on the terminal: the progress bar, tables, warnings and errors.

Progress, warnings and errors go to stderr, results to stdout. rich is imported
when a table or a bar is drawn.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from dump_activations.errors import DumpActivationsNote, DumpActivationsWarning, OutputError
from dump_activations.place import Place
from dump_activations.units import size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console
    from rich.table import Table

    from dump_activations.options import Progress
    from dump_activations.pipeline.summary import Summary


# Where a bar is drawn, if one is: a line that went past its console would break it.
_live: Console | None = None

# More than any line is long.
_UNLIMITED_WIDTH = 1 << 30


def print_error(text: str) -> None:
    """Print one red line on stderr."""
    _print_line("error", "red", text)


def print_warning(text: str) -> None:
    """Print one yellow line on stderr."""
    if not _is_silent():
        _print_line("warning", "yellow", text)


def print_note(text: str) -> None:
    """Print one blue line on stderr."""
    if not _is_silent():
        _print_line("note", "blue", text)


def _is_silent() -> bool:
    """Whether another process of the same run prints all but errors."""
    return Place.here().rank > 0


def _print_line(label: str, colour: str, text: str) -> None:
    text = printable(" ".join(text.splitlines()))
    if _live is not None:
        from rich.text import Text

        _live.print(Text.assemble((f"{label}: ", f"bold {colour}"), text), soft_wrap=True)
        return
    label += ": "
    if not os.environ.get("NO_COLOR"):
        label = click.style(label, fg=colour, bold=True)
    with suppress(OSError):  # Nobody is left to be told.
        click.echo(label + text, err=True)


def printable(text: str) -> str:
    """Escape what a terminal would obey or could not show: names may come from any file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


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


@contextmanager
def progress_bar() -> Iterator[Callable[[str], Progress | None]]:
    """Draw a bar for each unit that makes progress, with units a second and the time left.

    Yields what makes a callback of a unit's name; None where stderr is no terminal.
    """
    if sys.stderr is None or not sys.stderr.isatty() or _is_silent():
        yield lambda _unit: None
        return
    global _live  # noqa: PLW0603 -- there is one terminal
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}  {task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(stderr=True),
        transient=True,
    )

    def progress_of(unit: str) -> Progress:
        task = bar.add_task(unit, total=None, rate="", visible=False)

        def update(done: int, of: int) -> None:
            speed = bar.tasks[task].speed
            rate = f"{speed:,.0f} {unit}/s" if speed else ""
            bar.update(task, completed=done, total=of, rate=rate, visible=done < of)

        return update

    with bar:
        _live = bar.console
        try:
            yield progress_of
        finally:
            _live = None


def print_summary(summary: Summary, *, as_json: bool) -> None:
    """Print what a run did on stdout: a table, or JSON for scripts.

    Raises:
        OutputError: stdout cannot take it.
    """
    try:
        if as_json:
            print_json(summary.as_dict())
        else:
            print_titled(_title(summary), *([_speed_table(summary)] if summary.boards else []))
    except OutputError as error:
        done = f"{summary.output} is complete" if summary.output else "the run is done"
        raise OutputError(f"{done}, but its summary is lost: {error}") from error


def print_json(value: object) -> None:
    """Print JSON, in a line, on stdout.

    Raises:
        OutputError: stdout cannot take it.
    """
    if _is_silent():
        return
    with _named_stdout():
        click.echo(json.dumps(value))


def print_titled(title: str, *tables: Table) -> None:
    """Print a line and tables on stdout; what is no terminal gets no line in pieces.

    Raises:
        OutputError: stdout cannot take it.
    """
    if sys.stdout is None or _is_silent():
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else _UNLIMITED_WIDTH)
    with _named_stdout():
        console.print(Text(printable(title)), soft_wrap=True)
        for table in tables:
            console.print(table)


@contextmanager
def _named_stdout() -> Iterator[None]:
    """Raise an error that names stdout where it takes no text, or not this."""
    with OutputError.when("cannot write to stdout"):
        try:
            yield
            if sys.stdout is not None:
                sys.stdout.flush()
        except UnicodeError as error:
            raise OutputError(f"cannot write to stdout: {error}") from error


def _title(summary: Summary) -> str:
    where = str(summary.output) if summary.output else "nothing written"
    resumed = f" (and {summary.resumed_boards:,} resumed)" if summary.resumed_boards else ""
    return f"{summary.boards:,} boards{resumed}: {where}"


def _speed_table(summary: Summary) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column("stage")
    for heading in ("seconds", "share of the run", "boards/s"):
        table.add_column(heading, justify="right")

    def add(name: str, seconds: float, style: str = "") -> None:
        share = f"{seconds / summary.seconds:.0%}" if summary.seconds else "-"
        rate = f"{summary.boards / seconds:,.0f}" if seconds else "-"
        table.add_row(name, f"{seconds:.3f}", share, rate, style=style)

    for stage, seconds in summary.stage_seconds.items():
        slowest = stage == summary.slowest_stage
        add(f"{stage} (slowest)" if slowest else stage, seconds, "bold" if slowest else "")
    table.add_section()
    add("waiting for boards", summary.waiting_seconds)
    add("whole loop", summary.seconds, "bold")
    table.caption = (
        f"{size_text(summary.bytes_written)} written; {summary.setup_seconds:.2f} s to start, "
        f"{summary.commit_seconds:.2f} s to commit"
    )
    if summary.processes > 1:
        fewest = summary.boards_by_rank[summary.slowest_rank]
        table.caption += (
            f"; of {summary.processes} processes rank {summary.slowest_rank} did the fewest "
            f"boards: {fewest:,}"
        )
    return table
