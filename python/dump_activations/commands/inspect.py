"""The command `inspect-activations`: shows what a file holds, and verifies it.

It needs no torch to read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dump_activations.commands.console import print_json, print_titled, printable
from dump_activations.commands.runner import be_process, run_command
from dump_activations.errors import OutputError
from dump_activations.storage.digests import INTEGRITY_KEY

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from rich.table import Table

    from dump_activations.storage.reading.inspection import Inspection


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
@click.option("--verify", is_flag=True, help="Read the whole file and compare its digests.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.version_option(package_name="dump-activations")
def inspect_activations(file: Path, *, verify: bool, as_json: bool) -> None:
    """List the tensors and the metadata of a dump; FILE is a .safetensors, .pt or .npz file."""
    from dump_activations.storage.reading.inspection import find_damage, inspect

    inspection = inspect(file)
    threads = len(os.sched_getaffinity(0))
    damaged = find_damage(inspection, threads=threads) if verify else None
    if as_json:
        print_json(_as_dict(inspection, damaged))
    else:
        title = f"{inspection.path}: {inspection.size:,} bytes"
        print_titled(title, _tensor_table(inspection, damaged), _metadata_table(inspection))
    if damaged:
        raise OutputError(f"{file} is damaged: {', '.join(damaged)}")


def _as_dict(inspection: Inspection, damaged: list[str] | None) -> dict[str, object]:
    content: dict[str, object] = {
        "file": str(inspection.path),
        "format": inspection.format.name,
        "bytes": inspection.size,
        "tensors": [
            {
                "key": tensor.name,
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "bytes": tensor.nbytes,
            }
            for tensor in inspection.contents.tensors
        ],
        "metadata": inspection.contents.metadata,
    }
    return content if damaged is None else {**content, "damaged": damaged}


def _tensor_table(inspection: Inspection, damaged: list[str] | None) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    digests = inspection.digests
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("key", overflow="fold")
    table.add_column("dtype", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    if digests:
        table.add_column("nan", justify="right", no_wrap=True)
        table.add_column("inf", justify="right", no_wrap=True)
    if damaged is not None:
        table.add_column("verified", no_wrap=True)
    for tensor in inspection.contents.tensors:
        shape = "x".join(map(str, tensor.shape))
        cells = [tensor.name, tensor.dtype, shape, f"{tensor.nbytes:,}"]
        if digests:
            digest = digests.get(tensor.name)
            cells += [f"{digest.nan:,}", f"{digest.inf:,}"] if digest else ["", ""]
        if damaged is not None:
            cells.append("DAMAGED" if tensor.name in damaged else "ok")
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _metadata_table(inspection: Inspection) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("metadata", overflow="fold")
    table.add_column("value", overflow="fold")
    for key, value in inspection.contents.metadata.items():
        if key != INTEGRITY_KEY or not inspection.digests:
            table.add_row(Text(printable(key)), Text(printable(value)))
    return table
