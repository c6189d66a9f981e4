"""The command `inspect-activations`: shows what a file holds, verifies or compares it.

It needs no torch to read.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dump_activations.commands.console import print_json, print_note, print_parts
from dump_activations.commands.runner import be_process, run_command
from dump_activations.errors import (
    DumpActivationsError,
    InvalidArgumentError,
    OutputError,
    option,
)
from dump_activations.progress import BYTES, Phase, counted, shown_progress

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import NoReturn

    from dump_activations.storage.reading.inspection import Inspection
    from dump_activations.storage.statistics import TensorStatistics
    from dump_activations.storage.writing.existing import Unfinished


def run() -> NoReturn:
    """Be the command's process."""
    be_process(inspect_activations)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        arguments: those after the command's name; None takes the process's own.
    """
    return run_command(inspect_activations, arguments)


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.argument("file", type=click.Path(path_type=Path, readable=False))
@click.argument("other", type=click.Path(path_type=Path, readable=False), required=False)
@click.option("--verify", is_flag=True, help="Read the whole file and compare its digests.")
@click.option("--stats", is_flag=True, help="Show statistics; a file without is read for them.")
@click.option(
    "--report",
    type=click.Path(path_type=Path, readable=False),
    metavar="FILE",
    help="Write a page that shows the dump, for a browser; it loads nothing from the network.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.version_option(package_name="dump-activations")
@click.pass_context
def inspect_activations(
    context: click.Context,
    /,
    *,
    file: Path,
    other: Path | None,
    verify: bool,
    stats: bool,
    report: Path | None,
    as_json: bool,
) -> None:
    """List the tensors and the metadata of a dump; FILE is a .safetensors, .pt or .npz file.

    With OTHER, which may be of another format, say what differs: tensors, their values, metadata.
    The exit code is then 0 if all tensors are equal, 1 if some differ, and 2 if the files cannot
    be compared.
    """
    if report is not None:
        if other is not None or verify or stats or as_json:
            raise InvalidArgumentError(f"{option('report')}: takes one file, and no other option")
        _write_report(file, report)
        return
    if other is None:
        _show(file, verify=verify, stats=stats, as_json=as_json)
        return
    try:
        for name, is_given in (("verify", verify), ("stats", stats)):
            if is_given:
                raise InvalidArgumentError(f"{option(name)}: takes one file at a time")
        context.exit(0 if _show_differences(file, other, as_json=as_json) else 1)
    except DumpActivationsError as error:
        error.exit_code = 2  # 1 says that they differ, as it does of diff and cmp
        raise


def _show(file: Path, *, verify: bool, stats: bool, as_json: bool) -> None:
    from dump_activations.commands import statistics
    from dump_activations.commands.contents import FileContents
    from dump_activations.storage.reading.inspection import inspect
    from dump_activations.storage.writing.existing import find_unfinished
    from dump_activations.storage.writing.paths import partial_path, target_of

    unfinished = find_unfinished(file)
    if unfinished is not None and stats:
        raise OutputError(f"{unfinished.path} is not finished: it has no statistics yet")
    if unfinished is not None:
        _show_unfinished(unfinished, verify=verify, as_json=as_json)
        return
    inspection = inspect(file)
    with shown_progress() if verify or stats else nullcontext():
        damaged = _damage(inspection) if verify else None
        found = _statistics(inspection, compute=stats)
    contents = FileContents.of(inspection, damaged)
    if as_json:
        of_tensors = {"stats": statistics.as_dict(found)} if stats else {}
        print_json({**contents.as_dict(), **of_tensors})
    else:
        table = statistics.table(found, contents.layers or []) if found else None
        print_parts(*contents.parts(table))
    if (left := partial_path(target_of(file))).exists():
        print_note(f"{left} is beside it: another dump to its name, not finished")
    if damaged:
        raise OutputError(f"{file} is damaged: {', '.join(damaged)}")


def _damage(inspection: Inspection) -> list[str]:
    from dump_activations.storage.reading.inspection import find_damage

    count = counted(Phase("verifying", BYTES))
    return find_damage(inspection, threads=_threads(), progress=count)


def _statistics(inspection: Inspection, *, compute: bool) -> Mapping[str, TensorStatistics]:
    """Return the statistics of a file: its own, or else, if it is to be read for them, these."""
    from dump_activations.storage.statistics import compute_statistics, stored_statistics

    found = stored_statistics(inspection)
    if found or not compute:
        return found
    count = counted(Phase("computing statistics", BYTES))
    return compute_statistics(inspection, threads=_threads(), progress=count)


def _write_report(file: Path, report: Path) -> None:
    from dump_activations.report.render import write_report
    from dump_activations.storage.writing.existing import find_unfinished

    if (found := find_unfinished(file)) is not None:
        raise OutputError(f"{found.path} is not finished: there is nothing to show yet")
    write_report(file, report, progress=True)
    print_note(f"{report} shows {file}; open it in a browser")


def _show_unfinished(found: Unfinished, *, verify: bool, as_json: bool) -> None:
    from dump_activations.commands import unfinished

    if verify:
        raise OutputError(f"{found.path} is not finished: there is nothing to verify it by")
    if as_json:
        print_json(unfinished.as_dict(found))
    else:
        print_parts(*unfinished.parts(found))


def _show_differences(file: Path, other: Path, *, as_json: bool) -> bool:
    """Show what differs in two files, and return whether their tensors are equal."""
    from dump_activations.commands import differences
    from dump_activations.storage.reading.comparison import compare
    from dump_activations.storage.reading.inspection import inspect
    from dump_activations.storage.writing.existing import find_unfinished

    for path in (file, other):
        if (found := find_unfinished(path)) is not None:
            raise OutputError(f"{found.path} is not finished: there is nothing to compare yet")
    inspections = inspect(file), inspect(other)
    with shown_progress():
        count = counted(Phase("comparing", "values"))
        comparison = compare(*inspections, threads=_threads(), progress=count)
    if as_json:
        print_json(differences.as_dict(file, other, comparison))
    else:
        print_parts(*differences.parts(file, other, comparison))
    return comparison.is_equal


def _threads() -> int:
    return len(os.sched_getaffinity(0))
