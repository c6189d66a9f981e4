"""How to measure: contenders in turns, medians, and processes weighed from outside."""

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

Rounds = dict[str, list[float]]
"""Contender -> its value in each round."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured quantity over all rounds.

    Attributes:
        name: what was measured.
        median, low, high: over the rounds.
        unit: of the three; "x" marks a ratio.
        target: what it should be, as text; empty if nothing is asked.
        met: whether the median is; None without a target.
    """

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
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> Self:
        """Summarise the values of the rounds."""
        median = statistics.median(values)
        target, met = "", None
        if at_most is not None:
            target, met = f"<= {at_most:g}", median <= at_most
        if at_least is not None:
            target, met = f">= {at_least:g}", median >= at_least
        return cls(
            name=name,
            median=median,
            low=min(values),
            high=max(values),
            unit=unit,
            target=target,
            met=met,
        )


@dataclass(frozen=True)
class Section:
    """The figures of one script, and the conditions of the measurement."""

    title: str
    conditions: str
    figures: list[Figure]


@dataclass(frozen=True)
class Process:
    """A process that has ended: wall seconds, peak resident MiB, and what it printed."""

    seconds: float
    peak_mib: float
    output: str

    @property
    def summary(self) -> dict[str, Any]:
        """The output of `dump-activations --json`; notes may precede it."""
        summary: dict[str, Any] = json.loads(self.output.splitlines()[-1])
        return summary


def run_process(arguments: Sequence[str], environment: Mapping[str, str]) -> Process:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed; the text is what it wrote to stderr.
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


def alternate(contenders: Mapping[str, Callable[[], float]], *, rounds: int) -> Rounds:
    """Run the contenders in turns, to and fro, so that drift cancels; the first time warms up."""
    for run in contenders.values():
        run()
    values: Rounds = {name: [] for name in contenders}
    for i in range(rounds):
        turn = list(contenders) if i % 2 == 0 else list(reversed(contenders))
        for name in turn:
            values[name].append(contenders[name]())
    return values


def ratios(rounds: Rounds, numerator: str, *denominators: str) -> list[float]:
    """One contender's value over the best (largest) of others, round by round."""
    return [
        rounds[numerator][i] / max(rounds[name][i] for name in denominators)
        for i in range(len(rounds[numerator]))
    ]


def timed(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
