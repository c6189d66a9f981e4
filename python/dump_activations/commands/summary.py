"""What `dump-activations` shows when a run is done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dump_activations.commands.console import print_json, print_parts
from dump_activations.commands.tables import Table
from dump_activations.errors import OutputError
from dump_activations.text import size_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dump_activations.pipeline.summary import Summary


def print_summary(summary: Summary, *, as_json: bool) -> None:
    """Print what a run did on stdout: a table, or JSON for scripts.

    Raises:
        OutputError: stdout cannot take it.
    """
    try:
        if as_json:
            print_json(summary.as_dict())
        else:
            print_parts(*_parts(summary))
    except OutputError as error:
        done = f"{summary.output} is complete" if summary.output else "the run is done"
        raise OutputError(f"{done}, but its summary is lost: {error}") from error


def _parts(summary: Summary) -> Iterator[str | Table]:
    yield _title(summary)
    if summary.boards:
        yield _speed_table(summary)
        yield ""
        yield (
            f"{size_text(summary.bytes_written)} written; {summary.setup_seconds:.2f} s to start, "
            f"{summary.commit_seconds:.2f} s to commit"
        )


def _title(summary: Summary) -> str:
    where = str(summary.output) if summary.output else "nothing written"
    resumed = f" (and {summary.resumed_boards:,} resumed)" if summary.resumed_boards else ""
    return f"{summary.boards:,} boards{resumed}: {where}"


def _speed_table(summary: Summary) -> Table:
    def row(name: str, seconds: float) -> list[str]:
        share = f"{seconds / summary.seconds:.0%}" if summary.seconds else "-"
        # What takes no time that could be shown has no rate.
        rate = f"{summary.boards / seconds:,.0f}" if seconds >= 0.0005 else "-"
        return [name, f"{seconds:.3f}", share, rate]

    rows = [
        row(f"{stage} (slowest)" if stage == summary.slowest_stage else stage, seconds)
        for stage, seconds in summary.stage_seconds.items()
    ]
    rows += [
        row("waiting for boards", summary.waiting_seconds),
        row("whole loop", summary.seconds),
    ]
    numbers = ("seconds", "share of the run", "boards/s")
    return Table(("stage", *numbers), rows, numbers)
