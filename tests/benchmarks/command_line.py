"""The command as a process: its memory, its time against a plain script, and its start."""

import sys
from functools import partial

import baseline
from measure import Figure, Process, Section, compare, run_process
from setting import Setting, command
from workload import KEYS_DEMO, WAITING

from dump_activations import demo
from dump_activations.storage.formats.registry import FORMATS

_FEW, _MANY = 16_384, 131_072
_EMPTY_APP = """
import click

@click.command()
def app():
    pass

app()
"""


def _flags(setting: Setting, rows: int, boards: int, keys: str) -> list[object]:
    """Flags that the command and the plain script share, without the output."""
    inputs = ["--init", demo.CHECKPOINT, "--dataset", setting.dataset(rows)]
    return [*inputs, "--n-samples", boards, "--outputs", keys, "--device", "cpu"]


def measure_memory(setting: Setting) -> Section:
    """Weigh dumps of many boards and of few: peak memory must not grow."""
    keys = "layer_outputs,attn_norm,mlp_input"
    figures = []

    def peak_mib(suffix: str, boards: int) -> float:
        target = setting.scratch / f"memory{suffix}"
        flags = _flags(setting, _MANY, boards, keys)
        process = run_process(command(*flags, "--allow-cpu", "-o", target), setting.environment)
        target.unlink()
        return process.peak_mib

    for suffix in FORMATS:
        few, many = f"{suffix}: {_FEW:,} boards", f"{suffix}: {_MANY:,} boards"
        rounds = compare(
            {few: partial(peak_mib, suffix, _FEW), many: partial(peak_mib, suffix, _MANY)},
            rounds=setting.rounds,
            warm_up=False,
        )
        growth = [after - before for before, after in zip(rounds[few], rounds[many], strict=True)]
        figures += [
            *rounds.figures("MiB"),
            Figure.of(f"{suffix}: growth", growth, "MiB", at_most=64),
        ]
    return Section("Peak memory", f"demo checkpoint, CPU, {keys}, fp32", figures)


def measure_whole_process(setting: Setting) -> Section:
    """Time the command from start to exit against the plain script."""
    target = setting.scratch / "whole.safetensors"
    flags = [*_flags(setting, _FEW, _FEW, KEYS_DEMO), "-o", target]
    script = [sys.executable, baseline.__file__, *map(str, flags)]

    def run(name: str, arguments: list[str]) -> tuple[Process, dict[str, float]]:
        process = run_process(arguments, setting.environment)
        target.unlink()
        return process, {name: process.seconds, f"{name}, peak memory": process.peak_mib}

    def dump() -> dict[str, float]:
        process, values = run("dump", command(*flags, "--allow-cpu", "--json"))
        summary = process.summary
        return {**values, WAITING: summary["waiting_seconds"] / summary["seconds"]}

    rounds = compare(
        {"dump": dump, "baseline": lambda: run("baseline", script)[1]}, rounds=setting.rounds
    )
    return Section(
        "Whole process",
        f"demo checkpoint, CPU, {_FEW:,} boards, {KEYS_DEMO}, fp32",
        [
            *rounds.figures("s", "dump", "baseline"),
            rounds.ratio("dump", "baseline", at_most=0.5),
            *rounds.figures("MiB", "dump, peak memory", "baseline, peak memory"),
            Figure.of(WAITING, rounds[WAITING], "x", at_most=0.05),
        ],
    )


def measure_start(setting: Setting) -> Section:
    """Time `--help` against an empty app, and take apart the demo's time outside its loop."""
    empty = setting.scratch / "empty.py"
    empty.write_text(_EMPTY_APP)
    target = setting.scratch / "demo.safetensors"

    def seconds(*arguments: str) -> float:
        return run_process(arguments, setting.environment).seconds

    def run_demo() -> dict[str, float]:
        process = run_process(command("--demo", "--json", "-o", target), setting.environment)
        target.unlink()
        stages = {"set-up": "setup_seconds", "loop": "seconds", "commit": "commit_seconds"}
        parts = {f"demo, {name}": process.summary[key] for name, key in stages.items()}
        outside = process.seconds - sum(parts.values())
        return {"demo": process.seconds, **parts, "demo, start, imports and exit": outside}

    helps = compare(
        {
            "--help": lambda: seconds(*command("--help")),
            "empty app's --help": lambda: seconds(sys.executable, str(empty), "--help"),
        },
        rounds=4 * setting.rounds,
    )
    demos = compare(
        {"demo": run_demo, "import torch": lambda: seconds(sys.executable, "-c", "import torch")},
        rounds=setting.rounds,
    )
    ratio = helps.ratio("--help", "empty app's --help", at_most=1.5)
    return Section(
        "Start",
        "--help, then the demo with the default flags, each as a process",
        [*helps.figures("s"), ratio, *demos.figures("s")],
    )
