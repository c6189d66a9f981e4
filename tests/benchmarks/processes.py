"""What several processes cost: against one of as many threads, a ticket, a slow one, the start."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import Figure, Section, alternate, ratios, run_process
from setting import Setting, command
from torch.distributed import TCPStore
from workload import BATCH_50M_CPU, KEYS_50M, KEYS_DEMO

from dump_activations import demo
from dump_activations.pipeline.group import Group
from dump_activations.place import Place

_TICKETS = 2000
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
            Figure.of("a ticket", _ticket_milliseconds(setting.rounds), "ms", at_most=1),
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
        summary = run_process(run, environment).summary
        target.unlink()
        return summary["boards"] / summary["seconds"]

    contenders = {
        f"{title}: two processes of one thread": lambda: rate("--nproc-per-node", "2"),
        f"{title}: one process of two threads": rate,
    }
    rounds = alternate(contenders, rounds=setting.rounds)
    return [
        *(Figure.of(name, values, "boards/s") for name, values in rounds.items()),
        Figure.of(f"{title}: two processes to one", ratios(rounds, *rounds), "x", at_least=0.95),
    ]


def _ticket_milliseconds(rounds: int) -> list[float]:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    tickets = [range(i, i + 1) for i in range(_TICKETS)]
    values = []
    for _ in range(rounds):
        group = Group(Place(), TCPStore("127.0.0.1", server.port, is_master=False))
        started = time.perf_counter()
        for _ticket in group.take(tickets):
            pass
        values.append((time.perf_counter() - started) / _TICKETS * 1e3)
    return values


def _slow_rank(setting: Setting) -> float:
    """Return the time of a run over that of processes which all work until the end."""
    script = Path(__file__).parent / "slow_rank.py"
    run = [
        *[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        *[script, demo.CHECKPOINT, setting.dataset(_SLOW_BOARDS), KEYS_DEMO],
        *[_SLOW_BOARDS, _SLOW_BATCH],
    ]
    output = run_process([*map(str, run)], setting.environment).output
    ranks = [json.loads(line) for line in output.splitlines() if line.startswith('{"first"')]
    speed = sum(rank["boards"] / (rank["last"] - rank["first"]) for rank in ranks)
    seconds = max(rank["last"] for rank in ranks) - min(rank["first"] for rank in ranks)
    return seconds * speed / _SLOW_BOARDS


def _starts(setting: Setting) -> list[Figure]:
    target = setting.scratch / "processes.safetensors"

    def seconds(*arguments: str) -> float:
        run = command("--demo", "--n-samples", 8, "-o", target, *arguments)
        process = run_process(run, setting.environment)
        target.unlink()
        return process.seconds

    contenders = {
        "8 boards, one process": seconds,
        "8 boards, two processes": lambda: seconds("--nproc-per-node", "2"),
    }
    rounds = alternate(contenders, rounds=setting.rounds)
    return [Figure.of(name, values, "s") for name, values in rounds.items()]
