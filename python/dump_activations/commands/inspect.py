"""The command `inspect-activations`: shows, verifies or compares files.

It imports NumPy to read a file, and never torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dump_activations.commands.console import CONTEXT_SETTINGS, common_options, mode, print_line
from dump_activations.commands.process import run_command
from dump_activations.errors import DumpActivationsError, InvalidArgumentError, is_url, option

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; None takes the process's own arguments."""
    return run_command(inspect_activations, arguments)


def _dump_path(path: str) -> Path:
    """Return the path of a dump, or of the local copy of a URL's."""
    if not is_url(path):
        return Path(path)
    from dump_activations.remote import input_path

    return input_path(path)


_Tolerance = click.FloatRange(min=0)


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("file", type=_dump_path)
@click.argument("other", type=_dump_path, required=False)
@click.option("--verify", is_flag=True, help="Read the whole file and compare its digests.")
@click.option("--stats", is_flag=True, help="Show statistics; compute them where there are none.")
@click.option(
    "--report",
    type=click.Path(),
    metavar="FILE",
    help="Write a page about the dump, to a path or a URL.",
)
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
    report: str | None,
    rtol: float,
    atol: float,
) -> None:
    """List the tensors and the metadata of a dump; FILE is a .safetensors, .pt or .npz file.

    With OTHER, which may have another format, show what differs: tensors, values, metadata. The
    exit code is then 0 if all tensors are equal, 1 if some differ, and 2 if the files cannot be
    compared. A tolerance applies to floating tensors, whose dtypes may then differ too.
    """
    if report is not None and (other is not None or verify or stats or mode.as_json):
        raise InvalidArgumentError(f"{option('report')}: takes one file, and no other option")
    of_one, of_two = {"verify": verify, "stats": stats}, {"rtol": rtol, "atol": atol}
    takes = "two files to compare" if other is None else "one file at a time"
    for name, value in (of_two if other is None else of_one).items():
        if value:
            raise InvalidArgumentError(f"{option(name)}: takes {takes}")

    from dump_activations.commands.show import refuse_unfinished, show_differences, show_dump

    if report is not None:
        from dump_activations.report.render import write_report

        refuse_unfinished(file, "there is nothing to show yet")
        write_report(file, report, progress=True)
        print_line("note", f"{report} shows the dump; open it in a browser")
    elif other is None:
        show_dump(file, verify=verify, stats=stats)
    else:
        try:
            is_equal = show_differences(file, other, rtol=rtol, atol=atol)
        except DumpActivationsError as error:
            error.exit_code = 2  # As with diff and cmp, 1 means that they differ.
            raise
        context.exit(0 if is_equal else 1)
