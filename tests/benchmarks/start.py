"""The cost of a run outside its loop: `--help`, imports, set-up and commit."""

import sys
from collections.abc import Callable

from measure import Figure, Section, alternate, ratios, run_process
from setting import Setting, command

_EMPTY_APP = """
import click

@click.command()
def app():
    pass

app()
"""


def measure(setting: Setting) -> Section:
    """Time `--help` against an empty app, then take the demo's time apart."""
    empty = setting.scratch / "empty.py"
    empty.write_text(_EMPTY_APP)

    def seconds(*arguments: str) -> float:
        return run_process(arguments, setting.environment).seconds

    helps = alternate(
        {
            "--help": lambda: seconds(*command("--help")),
            "empty app's --help": lambda: seconds(sys.executable, str(empty), "--help"),
        },
        rounds=4 * setting.rounds,
    )
    return Section(
        "Start",
        "--help, then the demo with the default flags, each in a process of its own",
        [
            *(Figure.of(name, values, "s") for name, values in helps.items()),
            Figure.of("--help to empty app", ratios(helps, *helps), "x", at_most=1.5),
            *_demo_figures(setting, seconds),
        ],
    )


def _demo_figures(setting: Setting, seconds: Callable[..., float]) -> list[Figure]:
    target = setting.scratch / "demo.safetensors"
    inside: dict[str, list[float]] = {"set-up": [], "loop": [], "commit": []}

    def run_demo() -> float:
        process = run_process(command("--demo", "--json", "-o", target), setting.environment)
        target.unlink()
        inside["set-up"].append(process.summary["setup_seconds"])
        inside["loop"].append(process.summary["seconds"])
        inside["commit"].append(process.summary["commit_seconds"])
        return process.seconds

    whole, only_torch = "demo, whole process", "a process that imports torch and no more"
    rounds = alternate(
        {whole: run_demo, only_torch: lambda: seconds(sys.executable, "-c", "import torch")},
        rounds=setting.rounds,
    )
    inside = {name: values[1:] for name, values in inside.items()}  # the first warmed up
    outside = [
        total - sum(values[i] for values in inside.values())
        for i, total in enumerate(rounds[whole])
    ]
    return [
        *(Figure.of(name, values, "s") for name, values in rounds.items()),
        *(Figure.of(f"demo: {name}", values, "s") for name, values in inside.items()),
        Figure.of("demo: start, imports and exit", outside, "s"),
    ]
