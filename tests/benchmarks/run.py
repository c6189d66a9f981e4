"""Measures dump-activations against the plain way, and against the machine's own limits.

    uv run --locked python tests/benchmarks/run.py [--only NAME ...] [--runs 5] [--json FILE]

Prints medians over the rounds with the smallest and largest value. Ratios are taken within a round.
`--help` lists the sections. The GPU's sections, of the 50M model, are skipped without CUDA.

Files are written under --directory, in one section also under --memory, and removed again. The
dataset's sections need 20 GB there.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import command_line
import dumps
import gpu
import output
import processes
import reading
import steps_dataset
import torch
from measure import Section
from rich.console import Console
from rich.table import Table
from setting import BENCHMARKS, Setting

SECTIONS = {
    "memory": command_line.measure_memory,
    "whole_process": command_line.measure_whole_process,
    "start": command_line.measure_start,
    "stages_demo": dumps.measure_stages_demo,
    "stages_50m": dumps.measure_stages_50m,
    "keys": dumps.measure_keys,
    "stream": dumps.measure_stream,
    "digests": dumps.measure_digests,
    "stats_demo": dumps.measure_stats_demo,
    "stats_50m": dumps.measure_stats_50m,
    "processes": processes.measure,
    "reading": reading.measure,
    "output": output.measure,
    "dataset_open": steps_dataset.measure_open,
    "dataset_sample": steps_dataset.measure_sample,
    "dataset_memory": steps_dataset.measure_memory,
    "dataset_warm": steps_dataset.measure_warm,
    "dataset_cold": steps_dataset.measure_cold,
    "dataset_feed": steps_dataset.measure_feed,
    "dataset_scan": steps_dataset.measure_scan,
    "dataset_labels": steps_dataset.measure_labels,
    "gpu_forward": gpu.measure_forward,
    "gpu_profile": gpu.measure_profile,
    "gpu_launches": gpu.measure_launches,
    "gpu_parts": gpu.measure_parts,
    "gpu_precisions": gpu.measure_precisions,
    "gpu_stream": gpu.measure_stream,
    "gpu_cells": gpu.measure_cells,
    "gpu_memory": gpu.measure_memory,
    "gpu_disk": gpu.measure_disk,
}


def main() -> None:
    listed = "\n".join(f"  {name:15} {measure.__doc__}" for name, measure in SECTIONS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nsections:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME"
    )
    parser.add_argument("--runs", type=int, default=5, help="rounds of each measurement")
    parser.add_argument("--seconds", type=float, default=8.0, help="per run of the 50M model")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of datasets and files")
    parser.add_argument("--json", type=Path, help="add figures and machine to this file")
    parser.add_argument("--directory", type=Path, default=tempfile.gettempdir(), help="on a disk")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="memory-backed")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.directory) as scratch,
        tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.memory) as in_memory,
    ):
        setting = Setting(
            scratch=Path(scratch),
            memory=Path(in_memory),
            rounds=options.runs,
            seconds=options.seconds,
            gigabytes=options.gigabytes,
        )
        measure(setting, options.only, options.json)


def measure(setting: Setting, names: list[str], results_path: Path | None) -> None:
    """Measure sections and print them. Other sections of the results are kept."""
    console = Console(width=100)
    results: dict[str, object] = {}
    if results_path and results_path.exists():
        results = json.loads(results_path.read_text())
    machine = describe_machine()
    console.print(machine)
    for name in names:
        section = SECTIONS[name](setting)
        console.print(f"\n[bold]{section.title}[/bold]: {section.conditions}")
        if section.figures:
            console.print(table(section))
        results[name] = {"machine": machine, "rounds": setting.rounds, **asdict(section)}
        if results_path:
            results_path.write_text(json.dumps(results, indent=1) + "\n")


def table(section: Section) -> Table:
    """Lay out the figures of one section."""
    laid_out = Table("")
    for heading in ("median", "lowest", "highest", "unit", "target", ""):
        laid_out.add_column(heading, justify="right")
    for figure in section.figures:
        met = "" if figure.met is None else ("yes" if figure.met else "[bold red]no")
        values = (
            f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
            for value in (figure.median, figure.low, figure.high)
        )
        laid_out.add_row(figure.name, *values, figure.unit, figure.target, met)
    return laid_out


def describe_machine() -> dict[str, object]:
    """Name the hardware, the software and the day of the figures."""
    cpus = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0]
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    describe = ["git", "-C", str(BENCHMARKS), "describe", "--always", "--dirty", "--abbrev=12"]
    revision = ""
    with suppress(FileNotFoundError):  # The machine has no git.
        revision = subprocess.run(describe, capture_output=True, text=True, check=False).stdout
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpus.strip("\t :") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "revision": revision.strip() or "unknown",
    }


if __name__ == "__main__":
    main()
