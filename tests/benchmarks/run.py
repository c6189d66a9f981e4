"""Measures dump-activations against the plain way, and against the machine's own limits.

    uv run --locked python tests/benchmarks/run.py [--only NAME ...] [--runs 5] [--json FILE]

Everything printed is a median over the rounds with the smallest and largest value beside it;
ratios are taken within a round. The sections:

    memory         peak memory of many boards against few
    whole_process  the command against the plain script, demo checkpoint, CPU
    loops_demo     dumps against the plain script and each stage's limit, demo checkpoint, CPU
    loops_50m      the same with a 50M model, which must run as fast as the plain forward loop
    keys           attn_pattern beside layer_outputs, one layer, a tensor a layer; 50M model, CPU
    streams        stream with tensors of one's own and with borrowed ones, demo checkpoint, CPU
    digests        dumps with the digests and counts against dumps without, CPU
    processes      two processes against one of two threads, a ticket, a slow rank, the start; CPU
    reading        shuffled cells and rows of a finished file against NumPy and the disk
    stats_demo     dumps with --stats against dumps without, demo checkpoint, CPU
    stats_50m      the same with a 50M model
    start          --help against an empty app; the demo's time outside its loop
    gpu_forward    --no-write against the plain forward loop; forward and copies in a profile
    gpu_precisions --no-write in each precision, and which of them runs how much faster
    gpu_streams    stream with tensors of one's own, borrowed ones, and on the device
    gpu_memory     dumps against the plain script and each stage's limit, to a memory-backed file
    gpu_disk       the same to an ordinary disk

The GPU's sections, of a 50M model again, need CUDA and say so where there is none. On a machine
without uv, and with the extension built in place, PYTHONPATH=python does.

Files are written under --directory, in one section also under --memory; nothing is left there.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import digests
import gpu
import keys
import loops
import memory
import processes
import reading
import start
import stats
import streams
import whole_process
from machine import describe_machine
from measure import Section
from rich.console import Console
from rich.table import Table
from setting import Setting

SECTIONS = {
    "memory": memory.measure,
    "whole_process": whole_process.measure,
    "loops_demo": loops.measure_demo,
    "loops_50m": loops.measure_50m,
    "keys": keys.measure,
    "streams": streams.measure_cpu,
    "digests": digests.measure,
    "processes": processes.measure,
    "reading": reading.measure,
    "stats_demo": stats.measure_demo,
    "stats_50m": stats.measure_50m,
    "start": start.measure,
    "gpu_forward": gpu.measure_forward,
    "gpu_precisions": gpu.measure_precisions,
    "gpu_streams": streams.measure_gpu,
    "gpu_memory": gpu.measure_memory,
    "gpu_disk": gpu.measure_disk,
}

_WIDTH = 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--runs", type=int, default=5, help="rounds of each measurement")
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="of one run of the 50M model, about"
    )
    parser.add_argument(
        "--json",
        type=Path,
        help="write figures and machine to this file; other sections that it has are kept",
    )
    parser.add_argument(
        "--directory", type=Path, default=tempfile.gettempdir(), help="on an ordinary disk"
    )
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="memory-backed")
    parser.add_argument("--trace", type=Path, help="keep the GPU section's profiler trace here")
    options = parser.parse_args()
    console = Console(width=_WIDTH)
    results: dict[str, object] = {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())
    results |= {"machine": describe_machine()}
    console.print(results["machine"])
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.directory) as scratch,
        tempfile.TemporaryDirectory(prefix="benchmark-", dir=options.memory) as in_memory,
    ):
        setting = Setting(
            scratch=Path(scratch),
            memory=Path(in_memory),
            rounds=options.runs,
            seconds=options.seconds,
            trace=options.trace,
        )
        for name in options.only:
            section = SECTIONS[name](setting)
            console.print(f"\n[bold]{section.title}[/bold]: {section.conditions}")
            if section.figures:
                console.print(table(section))
            results[name] = {"rounds": options.runs, **asdict(section)}
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")


def table(section: Section) -> Table:
    """Draw the figures of one section."""
    drawn = Table("")
    for heading in ("median", "lowest", "highest", "unit", "target", ""):
        drawn.add_column(heading, justify="right")
    for figure in section.figures:
        met = "" if figure.met is None else ("yes" if figure.met else "[bold red]no")
        values = (
            f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
            for value in (figure.median, figure.low, figure.high)
        )
        drawn.add_row(figure.name, *values, figure.unit, figure.target, met)
    return drawn


if __name__ == "__main__":
    main()
