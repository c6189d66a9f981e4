"""How to measure: contenders in turns, medians over rounds, and processes weighed from outside."""

import json
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Self


@dataclass(frozen=True)
class Figure:
    """One measured quantity over all rounds. The unit "x" marks a ratio."""

    name: str
    median: float
    low: float
    high: float
    unit: str
    target: str = ""
    met: bool | None = None

    @classmethod
    def of(
        cls,
        name: str,
        values: Sequence[float],
        unit: str,
        *,
        at_most: float = math.inf,
        at_least: float = -math.inf,
    ) -> Self:
        """Summarise the values of the rounds, and hold their median to a bound, if there is one."""
        median = statistics.median(values)
        bounds = {"<=": at_most, ">=": at_least}
        target = " ".join(f"{sign} {bound:g}" for sign, bound in bounds.items() if isfinite(bound))
        met = at_least <= median <= at_most if target else None
        return cls(name, median, min(values), max(values), unit, target, met)


@dataclass(frozen=True)
class Section:
    """The figures of one measurement, and its conditions."""

    title: str
    conditions: str
    figures: Sequence[Figure] = ()


class Rounds(dict[str, list[float]]):
    """Values by name, one per round."""

    def figures(self, unit: str, *names: str) -> list[Figure]:
        """Summarise the named values, or all."""
        return [Figure.of(name, self[name], unit) for name in names or self]

    def ratio(self, name: str, *others: str, title: str = "", **target: float) -> Figure:
        """Divide a value by the largest of others, round by round."""
        best = [max(values) for values in zip(*(self[other] for other in others), strict=True)]
        ratios = [value / most for value, most in zip(self[name], best, strict=True)]
        return Figure.of(title or f"{name} to {' or '.join(others)}", ratios, "x", **target)


def compare(
    contenders: Mapping[str, Callable[[], float | Mapping[str, float]]],
    *,
    rounds: int,
    warm_up: bool = True,
) -> Rounds:
    """Run the contenders in turns, in both directions, so that drift cancels.

    A contender returns its value, or several values by name. Values of the warm-up are dropped.
    """
    measured = Rounds()
    for i in range(-warm_up, rounds):
        for name in list(contenders) if i % 2 else reversed(contenders):
            value = contenders[name]()
            values = value if isinstance(value, Mapping) else {name: value}
            for each, found in values.items():
                measured.setdefault(each, []).append(found)
    return Rounds({name: values[-rounds:] for name, values in measured.items()})


def timed(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Process:
    """A process that has ended: wall seconds, peak resident MiB, and its output."""

    seconds: float
    peak_mib: float
    output: str

    @property
    def summary(self) -> dict[str, Any]:
        """The output of `dump-activations --json`. Notes may precede it."""
        summary: dict[str, Any] = json.loads(self.output.splitlines()[-1])
        return summary


def run_process(arguments: Sequence[str], environment: Mapping[str, str]) -> Process:
    """Run a command to its end.

    Raises:
        RuntimeError: The command failed. The text is its output.
    """
    started = time.perf_counter()
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _pid, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit {process.returncode}\n{output}")
    return Process(seconds, usage.ru_maxrss / 1024, output)
