"""Output of the commands: errors, warnings and notes on stderr, tables and JSON on stdout."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import textwrap
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import click

from dump_activations import _rust
from dump_activations.commands import STARTED
from dump_activations.errors import (
    DumpActivationsNote,
    DumpActivationsWarning,
    OutputError,
    printable,
)
from dump_activations.progress import Reporter, is_terminal, live_console, reported_to

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from rich.console import Console

CONTEXT_SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "show_default": True,
    "max_content_width": 100,
}

_COLOURS = {"error": "red", "warning": "yellow", "note": "blue"}
_LONGEST_LINE = 500
_LONGEST_END = 150

# A last column of text may wrap to so few characters. A table that needs more room is stacked.
_NARROWEST_TEXT = 20


class UnreadError(OutputError):
    """The reader of stdout has closed it, as `head` does."""


@dataclass
class Mode:
    """How the command prints, which its options decide."""

    as_json: bool = False  # on stderr too
    quiet: bool = False  # neither notes nor tables
    speaker: str = ""  # name of this process in its lines, where several share a terminal
    started: float = STARTED


mode = Mode()


@contextmanager
def fresh_mode() -> Iterator[None]:
    """Print in the default mode inside the context until an option changes it.

    Warnings and notes of this package are lines on stderr. Other packages' are hidden.
    """

    def print_warning(message: Warning | str, *_more: Any, **_others: Any) -> None:
        if isinstance(message, DumpActivationsWarning):
            is_note = isinstance(message, DumpActivationsNote)
            print_line("note" if is_note else "warning", message.flags_text)

    vars(mode).update(vars(Mode()))
    with warnings.catch_warnings():
        warnings.simplefilter("always", DumpActivationsWarning)
        warnings.showwarning = print_warning
        yield


def print_line(kind: Literal["error", "warning", "note"], text: str) -> None:
    """Print a line of at most 500 characters on stderr. A longer text loses its middle."""
    if kind == "note" and mode.quiet:
        return
    text = " ".join(text.splitlines())
    text = f"{mode.speaker}: {text}" if mode.speaker else text
    label, text = f"{kind}: ", printable(text, sys.stderr)
    if len(label) + len(text) > _LONGEST_LINE:
        start = _LONGEST_LINE - _LONGEST_END - len(f"{label} ... ")
        text = f"{text[:start]} ... {text[-_LONGEST_END:]}"
    if mode.as_json:
        label, text = "", json.dumps({kind: text})
    if (live := live_console()) is not None:
        from rich.text import Text

        live.print(Text.assemble((label, f"bold {_COLOURS[kind]}"), text), soft_wrap=True)
        return
    if label and not os.environ.get("NO_COLOR"):
        label = click.style(label, fg=_COLOURS[kind], bold=True)
    with suppress(AttributeError, OSError, ValueError):  # No stderr ends a run.
        click.echo(label + text, err=True)


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command --cache-dir, --json, --quiet and --version."""

    def use_cache(_context: click.Context, _option: click.Parameter, value: Any) -> None:
        if value is not None:
            os.environ["DUMP_ACTIVATIONS_CACHE"] = value

    def be_json(_context: click.Context, _option: click.Parameter, value: Any) -> None:
        mode.as_json = value

    def be_quiet(context: click.Context, _option: click.Parameter, value: Any) -> None:
        if value:
            mode.quiet = True
            context.with_resource(reported_to(Reporter()))

    flag = partial(click.option, is_flag=True, expose_value=False)
    as_json = flag("--json", callback=be_json, help="Print JSON instead of tables.")
    quiet = flag(
        "-q",
        "--quiet",
        callback=be_quiet,
        help="Print errors and warnings only, and JSON if asked for.",
    )
    version = click.version_option(
        _rust.__version__, "-V", "--version", message="%(prog)s, version %(version)s"
    )
    cache = click.option(
        "--cache-dir",
        type=click.Path(file_okay=False),
        expose_value=False,
        callback=use_cache,
        help="Keep local copies of remote files there. [default: $DUMP_ACTIVATIONS_CACHE]",
    )
    return cache(as_json(quiet(version(command))))


@contextmanager
def written_stdout() -> Iterator[None]:
    """Write to stdout inside the context, up to its last byte; OutputError where that fails."""
    with OutputError.when("cannot write to stdout"):
        try:
            yield
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError as error:
            raise UnreadError.of_system("cannot write to stdout", error) from error


@dataclass(frozen=True)
class Table:
    """A table. A row of a single cell is the title of the rows below it.

    Columns with the headings in `numbers` are aligned to the right.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Collection[str] = ()


def show(value: object, parts: Iterable[str | Table]) -> None:
    """Print a value as one line of JSON, or else its lines and tables, unless the mode is quiet.

    In JSON, numbers that are not finite are null. A pipe gets each line and each row of a table on
    one line, whole and without styles.
    """
    if mode.as_json:
        finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
        text = json.dumps(finite)
    elif sys.stdout is None or mode.quiet:
        return
    else:
        text = _rendered(parts)
    with written_stdout():
        click.echo(text)


def _rendered(parts: Iterable[str | Table]) -> str:
    """Render lines and tables for stdout."""
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
            text = textwrap.fill(
                printable(part, sys.stdout),
                console.width,
                break_long_words=False,
                break_on_hyphens=False,
            )
            console.print(Text(text), overflow="ignore", crop=False)
    return "\n".join(line.rstrip() for line in shown.getvalue().splitlines())


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
    wrapped = "" if table.headings[-1] in table.numbers else table.headings[-1]
    if wrapped:
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
        justify: Literal["right", "left"] = "right" if heading in table.numbers else "left"
        is_whole = heading != wrapped
        grid.add_column(Text(heading), justify=justify, no_wrap=is_whole, overflow="fold")
    for row in rows:
        is_title = len(row) == 1
        if is_title:
            grid.add_row()
        grid.add_row(*[Text(cell, style="bold" if is_title else "") for cell in row])
    console.print(grid)
