"""Dumps of the 50M model on a GPU: against the plain script and against each stage's own limit.

Everything runs in this process, in turns; what the first dump takes to set up is a figure of its
own. Each run page-locks its memory again, before its loop: only whole calls count that.

Shape letters: N boards in all, S cells (16).
"""

import shutil
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import baseline
import torch
from limits import pinned_copy_speed, plain_loop, write_speed
from measure import Figure, Section, alternate, ratios, timed
from overlap import profile_overlap
from setting import Setting
from workload import KEYS_50M, STORED_NBYTES, board_nbytes

from dump_activations import dump, load_encoder
from dump_activations.options import PRECISIONS
from dump_activations.pipeline.run import Summary

BOARDS, BATCH = 65_536, 1024
DEVICE = "cuda"
_BASELINE_NBYTES = 4e9
_PROBED_BOARDS = 8 * BATCH
_LEAST_SPACE = 12e9


def measure_forward(setting: Setting) -> Section:
    """Compare `--no-write` with the plain loop, and look at a dump through the profiler."""
    title = "GPU, forward pass"
    if reason := _why_not(setting.memory):
        return Section(title, f"skipped: {reason}", [])
    model = load_encoder(setting.checkpoint_50m(), device=DEVICE)
    tokens_NS = setting.boards(BOARDS).to(DEVICE)
    first, second = (
        timed(lambda: _dump(setting, setting.memory, "bf16", boards=_PROBED_BOARDS))
        for _ in range(2)
    )
    plain = "plain forward loop"
    speeds = alternate(
        {
            plain: lambda: BOARDS / timed(partial(plain_loop, model, tokens_NS, BATCH)),
            **{
                f"--no-write --dtype {dtype}": lambda dtype=dtype: _loop_speed(
                    _dump(setting, setting.memory, dtype, boards=BOARDS, write=False)
                )
                for dtype in STORED_NBYTES
            },
        },
        rounds=setting.rounds,
    )
    overlapped = profile_overlap(
        lambda: _dump(setting, setting.memory, "bf16", boards=_PROBED_BOARDS),
        setting.trace or setting.scratch / "trace.json",
    )
    return Section(
        title,
        f"50M model, {BOARDS:,} boards, {KEYS_50M}, batch {BATCH}; profile of {_PROBED_BOARDS:,}",
        [
            *(Figure.of(name, values, "boards/s") for name, values in speeds.items()),
            *(
                Figure.of(f"{name} to {plain}", ratios(speeds, name, plain), "x", at_least=0.97)
                for name in speeds
                if name != plain
            ),
            Figure.of("what the first dump took longer than the second", [first - second], "s"),
            *overlapped,
        ],
    )


def measure_precisions(setting: Setting) -> Section:
    """Run the model in each precision, and compiled in the one that is meant to be quick."""
    title = "GPU, precisions"
    if reason := _why_not(setting.memory):
        return Section(title, f"skipped: {reason}", [])
    ways = {name: {"precision": name} for name in PRECISIONS}
    ways |= {"bf16, compiled": {"precision": "bf16", "compile": True}}
    speeds = alternate(
        {
            name: lambda options=options: _loop_speed(
                _dump(setting, setting.memory, "bf16", boards=BOARDS, write=False, **options)
            )
            for name, options in ways.items()
        },
        rounds=setting.rounds,
    )
    return Section(
        title,
        f"50M model, {BOARDS:,} boards, {KEYS_50M}, batch {BATCH}, --no-write --dtype bf16",
        [
            *(Figure.of(name, values, "boards/s") for name, values in speeds.items()),
            *(
                Figure.of(f"{name} to fp32", ratios(speeds, name, "fp32"), "x")
                for name in ways
                if name != "fp32"
            ),
        ],
    )


def measure_memory(setting: Setting) -> Section:
    """Dump to a memory-backed file system."""
    return _measure_dumps(setting, setting.memory, "GPU, to memory")


def measure_disk(setting: Setting) -> Section:
    """Dump to an ordinary disk."""
    return _measure_dumps(setting, setting.scratch, "GPU, to disk")


def _measure_dumps(setting: Setting, directory: Path, title: str) -> Section:
    if reason := _why_not(directory):
        return Section(title, f"skipped: {reason}", [])
    figures, conditions = [], []
    for dtype in STORED_NBYTES:
        boards = _affordable_boards(setting, directory, dtype)
        plain_boards = min(boards, int(_BASELINE_NBYTES / board_nbytes(dtype)) // BATCH * BATCH)
        conditions.append(f"{dtype}: {boards:,} boards, baseline {plain_boards:,}")
        figures += _compare(setting, directory, dtype, boards, plain_boards)
    return Section(title, f"50M model, batch {BATCH}, {KEYS_50M}; {'; '.join(conditions)}", figures)


def _why_not(directory: Path) -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if shutil.disk_usage(directory).free < _LEAST_SPACE:
        return f"{directory} has less than {_LEAST_SPACE / 1e9:g} GB; name another directory"
    return ""


def _compare(
    setting: Setting, directory: Path, dtype: str, boards: int, plain_boards: int
) -> list[Figure]:
    model = load_encoder(setting.checkpoint_50m(), device=DEVICE)
    tokens_NS = setting.boards(16 * BATCH).to(DEVICE)
    nbytes = board_nbytes(dtype)
    whole, waiting = [], []

    def run_dump() -> float:
        started = time.perf_counter()
        summary = _dump(setting, directory, dtype, boards=boards)
        whole.append(boards / (time.perf_counter() - started))
        waiting.append(summary.waiting_seconds / summary.seconds)
        return _loop_speed(summary)

    limits = {
        "forward alone": lambda: (
            len(tokens_NS) / timed(partial(plain_loop, model, tokens_NS, BATCH))
        ),
        "copy alone": lambda: pinned_copy_speed() / nbytes,
        "write alone": lambda: write_speed(directory, int(_BASELINE_NBYTES)) / nbytes,
    }
    speeds = alternate(
        {
            "dump": run_dump,
            "baseline": lambda: (
                plain_boards / timed(lambda: _baseline(setting, directory, dtype, plain_boards))
            ),
            **limits,
        },
        rounds=setting.rounds,
    )
    speeds["dump, whole call"] = whole[1:]
    slowest = [min(speeds[name][i] for name in limits) for i in range(setting.rounds)]
    share = [speed / limit for speed, limit in zip(speeds["dump"], slowest, strict=True)]
    to_baseline = ratios(speeds, "dump, whole call", "baseline")
    return [
        *(Figure.of(f"{dtype}: {name}", values, "boards/s") for name, values in speeds.items()),
        Figure.of(f"{dtype}: dump to baseline", to_baseline, "x", at_least=4),
        Figure.of(f"{dtype}: share of the slowest limit", share, "x", at_least=0.8),
        Figure.of(f"{dtype}: share of the loop spent waiting for boards", waiting[1:], "x"),
    ]


def _affordable_boards(setting: Setting, directory: Path, dtype: str) -> int:
    """How many boards, up to BOARDS, fit the space there is and the time a run should take."""
    speed = _loop_speed(_dump(setting, directory, dtype, boards=_PROBED_BOARDS))
    space = 0.85 * shutil.disk_usage(directory).free / board_nbytes(dtype)
    boards = int(min(BOARDS, space, speed * setting.seconds)) // BATCH * BATCH
    return max(boards, _PROBED_BOARDS)


def _dump(
    setting: Setting,
    directory: Path,
    dtype: str,
    *,
    boards: int,
    write: bool = True,
    **options: Any,
) -> Summary:
    target = directory / "gpu.safetensors"
    try:
        return dump(
            setting.checkpoint_50m(),
            setting.dataset(BOARDS),
            target,
            outputs=KEYS_50M,
            n_samples=boards,
            batch_size=BATCH,
            dtype=dtype,
            device=DEVICE,
            write=write,
            **options,
        )
    finally:
        target.unlink(missing_ok=True)


def _baseline(setting: Setting, directory: Path, dtype: str, boards: int) -> None:
    target = directory / "gpu.safetensors"
    baseline.dump(
        Namespace(
            init=setting.checkpoint_50m(),
            dataset=setting.dataset(BOARDS),
            n_samples=boards,
            batch_size=BATCH,
            seed=0,
            outputs=KEYS_50M,
            output=target,
            dtype=dtype,
            device=DEVICE,
        )
    )
    target.unlink()


def _loop_speed(summary: Summary) -> float:
    """Boards a second from the first read until the file is durable under its name."""
    return summary.boards / (summary.seconds + summary.commit_seconds)
