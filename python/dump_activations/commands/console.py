"""Everything that is drawn on the terminal: the progress bar, tables, warnings and errors.

Progress, warnings and errors go to stderr, results to stdout. rich is imported
when a table or a bar is drawn.
"""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from dump_activations.errors import DumpActivationsWarning, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.table import Table

    from dump_activations.options import Progress
    from dump_activations.pipeline.summary import Summary


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
    line = click.style(f"{label}: ", fg=colour, bold=True) + printable(" ".join(text.splitlines()))
    with suppress(OSError):  # Nobody is left to be told.
        click.echo(line, err=True)


def printable(text: str) -> str:
    """Escape what a terminal would obey or could not show: names may come from any file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Print this package's warnings as one line each, and no one else's, inside the context."""

    def show(message: Warning | str, *_more: Any, **_others: Any) -> None:
        if isinstance(message, DumpActivationsWarning):
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
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda _unit: None
        return
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
        yield progress_of


def print_summary(summary: Summary, *, as_json: bool) -> None:
    """Print what a run did on stdout: a table, or JSON for scripts.

    Raises:
        OutputError: stdout cannot take it.
    """
    try:
        if as_json:
            click.echo(json.dumps(summary.as_dict()))
        elif sys.stdout is not None:
            from rich.console import Console

            Console().print(_speed_table(summary))
    except (OSError, UnicodeError) as error:
        done = f"{summary.output} is complete" if summary.output else "the run is done"
        raise OutputError(f"{done}, but its summary cannot be printed: {error}") from error


def _speed_table(summary: Summary) -> Table:
    from rich.table import Table
    from rich.text import Text

    where = str(summary.output) if summary.output else "nothing written"
    resumed = f" (and {summary.resumed_boards:,} resumed)" if summary.resumed_boards else ""
    title = Text(printable(f"{summary.boards:,} boards{resumed}: {where}"))
    table = Table(title=title, title_justify="left")
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
        f"{_size(summary.bytes_written)} written; {summary.setup_seconds:.2f} s to start, "
        f"{summary.commit_seconds:.2f} s to commit"
    )
    return table


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
