"""The command `inspect-activations`: shows, verifies or compares files.

It imports NumPy to read a file, and never torch.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dump_activations.commands.cli import CONTEXT_SETTINGS, common_options
from dump_activations.commands.console import print_note
from dump_activations.commands.process import run_command
from dump_activations.errors import (
    DumpActivationsError,
    InvalidArgumentError,
    OutputError,
    option,
)
from dump_activations.progress import BYTES, Phase, counted, shown_progress

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dump_activations.storage.reading.dump_files import DumpFiles
    from dump_activations.storage.statistics import TensorStatistics


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; None takes the process's own arguments."""
    return run_command(inspect_activations, arguments)


_Path = click.Path(path_type=Path, readable=False)
_Tolerance = click.FloatRange(min=0)


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("file", type=_Path)
@click.argument("other", type=_Path, required=False)
@click.option("--verify", is_flag=True, help="Read the whole file and compare its digests.")
@click.option("--stats", is_flag=True, help="Show statistics; compute them where there are none.")
@click.option("--report", type=_Path, metavar="FILE", help="Write a page about the dump.")
@click.option(
    "--rtol",
    type=_Tolerance,
    default=0.0,
    help="With OTHER: accept differences up to rtol times the larger value.",
)
@click.option(
    "--atol", type=_Tolerance, default=0.0, help="With OTHER: accept differences up to atol."
)
@common_options
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
    rtol: float,
    atol: float,
    as_json: bool,
) -> None:
    """List the tensors and the metadata of a dump; FILE is a .safetensors, .pt or .npz file.

    With OTHER, which may have another format, show what differs: tensors, values, metadata. The
    exit code is then 0 if all tensors are equal, 1 if some differ, and 2 if the files cannot be
    compared. A tolerance applies to floating tensors, whose dtypes may then differ too.
    """
    if report is not None:
        if other is not None or verify or stats or as_json:
            raise InvalidArgumentError(f"{option('report')}: takes one file, and no other option")
        _write_report(file, report)
    elif other is None:
        for name, value in {"rtol": rtol, "atol": atol}.items():
            if value:
                raise InvalidArgumentError(f"{option(name)}: takes two files to compare")
        _show_file(file, verify=verify, stats=stats, as_json=as_json)
    else:
        try:
            for name, is_given in {"verify": verify, "stats": stats}.items():
                if is_given:
                    raise InvalidArgumentError(f"{option(name)}: takes one file at a time")
            is_equal = _show_differences(file, other, rtol=rtol, atol=atol, as_json=as_json)
        except DumpActivationsError as error:
            error.exit_code = 2  # As with diff and cmp, 1 means that they differ.
            raise
        context.exit(0 if is_equal else 1)


def _show_file(file: Path, *, verify: bool, stats: bool, as_json: bool) -> None:
    from dump_activations.commands.show import print_file, print_shards, print_unfinished
    from dump_activations.storage.reading.dump_files import find_shards, inspect_dump
    from dump_activations.storage.writing.existing import find_unfinished
    from dump_activations.storage.writing.paths import partial_path, target_of

    shards = None if os.path.lexists(file) else find_shards(file)
    unfinished = find_unfinished(file) if shards is None else None
    if shards is not None and shards.missing:
        if verify or stats:
            raise OutputError(f"{shards.missing[0].path} is not finished: write all shards first")
        print_shards(shards, as_json=as_json)
        return
    if unfinished is not None:
        if verify or stats:
            missing = "there is nothing to verify it by" if verify else "it has no statistics yet"
            raise OutputError(f"{unfinished.path} is not finished: {missing}")
        print_unfinished(unfinished, as_json=as_json)
        return
    dump = inspect_dump(file)
    with shown_progress() if verify or stats else nullcontext():
        damage = _damage(dump) if verify else {}
        statistics = _statistics(dump, compute=stats)
    damaged = sorted({name for names in damage.values() for name in names}) if verify else None
    print_file(dump, damaged=damaged, statistics=statistics, stats=stats, as_json=as_json)
    if (left := partial_path(target_of(file))).exists():
        print_note(f"{left} is next to it: another dump to its name, not finished")
    texts = [f"{path} is damaged: {', '.join(names)}" for path, names in damage.items() if names]
    if texts:
        raise OutputError("; ".join(texts))


def _damage(dump: DumpFiles) -> dict[Path, list[str]]:
    """Return the damaged tensors of each file of a dump."""
    from dump_activations.storage.reading.damage import find_damage

    return find_damage(dump, threads=_threads(), progress=counted(Phase("verifying", BYTES)))


def _statistics(dump: DumpFiles, *, compute: bool) -> Mapping[str, TensorStatistics]:
    """Return the statistics that a dump stores, or computed ones if it stores none."""
    from dump_activations.storage.reading.stored_statistics import (
        compute_statistics,
        stored_statistics,
    )

    found = stored_statistics(dump)
    if found or not compute:
        return found
    count = counted(Phase("computing statistics", BYTES))
    return compute_statistics(dump, threads=_threads(), progress=count)


def _write_report(file: Path, report: Path) -> None:
    from dump_activations.report.render import write_report

    _refuse_unfinished(file, "there is nothing to show yet")
    write_report(file, report, progress=True)
    print_note(f"{report} shows {file}; open it in a browser")


def _show_differences(file: Path, other: Path, *, rtol: float, atol: float, as_json: bool) -> bool:
    """Show what differs in two files, and return True where their tensors are equal."""
    from dump_activations.commands.show import print_differences
    from dump_activations.storage.reading.comparison import compare
    from dump_activations.storage.reading.dump_files import inspect_dump

    for path in (file, other):
        _refuse_unfinished(path, "there is nothing to compare yet")
    dumps = inspect_dump(file), inspect_dump(other)
    with shown_progress():
        count = counted(Phase("comparing", "values"))
        comparison = compare(*dumps, threads=_threads(), rtol=rtol, atol=atol, progress=count)
    print_differences(file, other, comparison, as_json=as_json)
    return comparison.is_equal


def _refuse_unfinished(file: Path, reason: str) -> None:
    from dump_activations.storage.reading.dump_files import find_shards
    from dump_activations.storage.writing.existing import find_unfinished

    if find_shards(file) is None and (found := find_unfinished(file)) is not None:
        raise OutputError(f"{found.path} is not finished: {reason}")


def _threads() -> int:
    return len(os.sched_getaffinity(0))
