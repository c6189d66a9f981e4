"""Cost of several processes: against one of as many threads, with a slow one, and at the start.

`processes.py OUTPUT BOARDS BATCH CHECKPOINT DATASET KEYS RANK` is one of two processes, of which
the second is half as fast. It prints its times.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from measure import Figure, Section, compare, run_process
from setting import Setting, command
from workload import KEYS_DEMO, Workload, workload_50m_cpu

from dump_activations import demo
from dump_activations.api.dump import dump_to_file
from dump_activations.pipeline.options import DumpOptions
from dump_activations.storage.writing.shards import Place

_SLOW_BOARDS, _SLOW_BATCH = 65_536, 256


def measure(setting: Setting) -> Section:
    """Measure all of it on two cores."""
    small = Workload(setting=setting, boards=65_536)
    with _two_cores():
        figures = [
            *_rates("demo", small),
            *_rates("50M", workload_50m_cpu(setting)),
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


def _rates(title: str, work: Workload) -> list[Figure]:
    def rate(*arguments: str) -> float:
        run = command(
            *["--init", work.checkpoint, "--dataset", work.steps, "--n-samples", work.boards],
            *["--outputs", work.keys, "--batch-size", work.batch, "--allow-cpu", "--json"],
            *["-o", work.target, *arguments],
        )
        environment = {**work.setting.environment, "OMP_NUM_THREADS": "1" if arguments else "2"}
        # The first process returns when the dump is whole, so its time is the time of all.
        seconds = run_process(run, environment).summary["seconds"]
        _remove(work.target)
        return work.boards / seconds

    two, one = f"{title}: two processes of one thread", f"{title}: one process of two threads"
    contenders = {two: partial(rate, "--nproc-per-node", "2"), one: rate}
    rounds = compare(contenders, rounds=work.setting.rounds)
    return [*rounds.figures("boards/s"), rounds.ratio(two, one, at_least=0.95)]


def _slow_rank(setting: Setting) -> float:
    """Return the time of a dump, relative to processes that all work until the end."""
    target = setting.scratch / "slow.safetensors"
    numbers, inputs = (_SLOW_BOARDS, _SLOW_BATCH), (demo.CHECKPOINT, setting.dataset(_SLOW_BOARDS))
    arguments = [sys.executable, __file__, target, *numbers, *inputs, KEYS_DEMO]
    processes = [
        subprocess.Popen(
            [*map(str, arguments), rank],
            stdout=subprocess.PIPE,
            env={**setting.environment, "OMP_NUM_THREADS": "1"},
        )
        for rank in "01"
    ]
    ranks = [json.loads(process.communicate()[0]) for process in processes]
    _remove(target)
    speed = sum(rank["boards"] / (rank["last"] - rank["first"]) for rank in ranks)
    seconds = max(rank["last"] for rank in ranks) - min(rank["first"] for rank in ranks)
    return seconds * speed / _SLOW_BOARDS


def _dump_as_rank(arguments: list[str]) -> None:
    output, boards, batch, checkpoint, dataset, keys, rank = arguments
    times: list[float] = []

    def note_time(_done: int, _of: int) -> None:
        if times and rank == "1":
            time.sleep(time.perf_counter() - times[-1])
        times.append(time.perf_counter())

    options = DumpOptions(
        outputs=keys,
        n_samples=int(boards),
        batch_size=int(batch),
        device="cpu",
        allow_cpu=True,
        progress=note_time,
    )
    summary = dump_to_file(checkpoint, dataset, Path(output), options, place=Place(int(rank), 2))
    # The clock is the machine's: the same in every process.
    first, last = times[0], times[-1]
    print(json.dumps({"first": first, "last": last, "boards": summary.boards - int(batch)}))


def _starts(setting: Setting) -> list[Figure]:
    target = setting.scratch / "processes.safetensors"

    def seconds(*arguments: str) -> float:
        run = command("--demo", "--n-samples", 8, "-o", target, *arguments)
        process = run_process(run, setting.environment)
        _remove(target)
        return process.seconds

    contenders = {
        "8 boards, one process": seconds,
        "8 boards, two processes": partial(seconds, "--nproc-per-node", "2"),
    }
    return compare(contenders, rounds=setting.rounds).figures("s")


def _remove(target: Path) -> None:
    """Remove a dump, which is one file or shards."""
    for path in target.parent.glob(f"{target.stem}*{target.suffix}"):
        path.unlink()


if __name__ == "__main__":
    _dump_as_rank(sys.argv[1:])
