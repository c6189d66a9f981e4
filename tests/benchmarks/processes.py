"""Cost of several processes: against one of as many threads, with a slow one, and at the start."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import Figure, Section, alternate, ratios, run_process
from setting import Setting, command
from workload import BATCH_50M_CPU, KEYS_50M, KEYS_DEMO

from dump_activations import demo

_SLOW_BOARDS, _SLOW_BATCH = 65_536, 256


def measure(setting: Setting) -> Section:
    """Measure all of it on two cores."""
    with _two_cores():
        figures = [
            *_rates(setting, "demo", demo.CHECKPOINT, KEYS_DEMO, boards=65_536, batch=1024),
            *_rates(
                setting,
                "50M",
                setting.checkpoint_50m(),
                KEYS_50M,
                boards=BATCH_50M_CPU * max(round(setting.seconds), 8),
                batch=BATCH_50M_CPU,
            ),
            Figure.of(
                "demo: one of two at half speed, to the ideal",
                [_slow_rank(setting) for _ in range(setting.rounds)],
                "x",
                at_most=1.05,
            ),
            *_starts(setting),
        ]
    return Section("Several processes", "two cores, CPU, files to an ordinary disk", figures)


@contextmanager
def _two_cores() -> Iterator[None]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:2])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _rates(
    setting: Setting, title: str, checkpoint: Path, keys: str, *, boards: int, batch: int
) -> list[Figure]:
    def rate(*arguments: str) -> float:
        target = setting.scratch / "processes.safetensors"
        run = command(
            *["--init", checkpoint, "--dataset", setting.dataset(boards), "--outputs", keys],
            *["--n-samples", boards, "--batch-size", batch, "--allow-cpu", "--json", "-o", target],
            *arguments,
        )
        environment = {**setting.environment, "OMP_NUM_THREADS": "1" if arguments else "2"}
        # The first process returns when the dump is whole, so its time is the time of all.
        seconds = run_process(run, environment).summary["seconds"]
        _remove(target)
        return boards / seconds

    contenders = {
        f"{title}: two processes of one thread": lambda: rate("--nproc-per-node", "2"),
        f"{title}: one process of two threads": rate,
    }
    rounds = alternate(contenders, rounds=setting.rounds)
    return [
        *(Figure.of(name, values, "boards/s") for name, values in rounds.items()),
        Figure.of(f"{title}: two processes to one", ratios(rounds, *rounds), "x", at_least=0.95),
    ]


def _slow_rank(setting: Setting) -> float:
    """Return the time of a dump, relative to processes that all work until the end."""
    script = Path(__file__).parent / "slow_rank.py"
    target = setting.scratch / "slow.safetensors"
    run = [sys.executable, script, demo.CHECKPOINT, setting.dataset(_SLOW_BOARDS), target]
    run += [KEYS_DEMO, _SLOW_BOARDS, _SLOW_BATCH]
    environment = setting.environment | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*map(str, run), rank], stdout=subprocess.PIPE, env=environment)
        for rank in "01"
    ]
    ranks = [json.loads(process.communicate()[0]) for process in processes]
    _remove(target)
    speed = sum(rank["boards"] / (rank["last"] - rank["first"]) for rank in ranks)
    seconds = max(rank["last"] for rank in ranks) - min(rank["first"] for rank in ranks)
    return seconds * speed / _SLOW_BOARDS


def _starts(setting: Setting) -> list[Figure]:
    target = setting.scratch / "processes.safetensors"

    def seconds(*arguments: str) -> float:
        run = command("--demo", "--n-samples", 8, "-o", target, *arguments)
        process = run_process(run, setting.environment)
        _remove(target)
        return process.seconds

    contenders = {
        "8 boards, one process": seconds,
        "8 boards, two processes": lambda: seconds("--nproc-per-node", "2"),
    }
    rounds = alternate(contenders, rounds=setting.rounds)
    return [Figure.of(name, values, "s") for name, values in rounds.items()]


def _remove(target: Path) -> None:
    """Remove a dump, which is one file or shards."""
    for path in target.parent.glob(f"{target.stem}*{target.suffix}"):
        path.unlink()
