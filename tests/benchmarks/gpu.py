"""Dumps of the 50M model on a GPU: against the plain script and against each stage's own limit.

Everything runs in this process, in turns. The set-up of the first dump is a figure by itself. Each
run page-locks its memory again before its loop, which only whole calls count.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from dumps import stream_section
from limits import pinned_copy_speed, write_speed
from measure import Figure, Section, compare, timed
from setting import Setting
from torch.profiler import ProfilerActivity, profile
from workload import KEYS_50M, WAITING, Workload, checkpoint_50m

from dump_activations.pipeline.options import PRECISIONS

_BOARDS, _BATCH = 65_536, 1024
_PROBED_BOARDS = 8 * _BATCH
# Bytes that KEYS_50M take for one board: three keys of 12 layers and one, each (16, 512).
_BOARD_NBYTES = {"fp32": 4 * 37 * 16 * 512, "bf16": 2 * 37 * 16 * 512}
_BASELINE_NBYTES = 4e9
_NEEDED_SPACE = 12e9


def measure_forward(setting: Setting) -> Section:
    """Compare `--no-write` with the plain loop, and look at a dump through the profiler."""
    title = "GPU, forward pass"
    if reason := _why_not(setting.memory):
        return Section(title, reason)
    work = _workload(setting, setting.memory, "bf16", _BOARDS)
    probe = _workload(setting, setting.memory, "bf16", _PROBED_BOARDS)
    first, second = timed(probe.dump), timed(probe.dump)
    plain = "plain forward loop"
    ways = {f"--no-write --dtype {dtype}": dtype for dtype in _BOARD_NBYTES}
    rounds = compare(
        {
            plain: work.forward_speed,
            **{
                name: partial(work.dump_speed, dtype=dtype, write=False)
                for name, dtype in ways.items()
            },
        },
        rounds=setting.rounds,
    )
    return Section(
        title,
        f"{work}; profile of {_PROBED_BOARDS:,}",
        [
            *rounds.figures("boards/s"),
            *(rounds.ratio(name, plain, at_least=0.97) for name in ways),
            Figure.of("first dump, less the second", [first - second], "s"),
            *_overlap(probe.dump, setting.scratch / "trace.json"),
        ],
    )


def measure_precisions(setting: Setting) -> Section:
    """Run the model in each precision, and compiled in a fast one."""
    title = "GPU, precisions"
    if reason := _why_not(setting.memory):
        return Section(title, reason)
    work = _workload(setting, setting.memory, "bf16", _BOARDS)
    run = partial(work.dump_speed, write=False)
    rounds = compare(
        {
            **{name: partial(run, precision=name) for name in PRECISIONS},
            "bf16, compiled": partial(run, precision="bf16", compile=True),
        },
        rounds=setting.rounds,
    )
    ratios = [rounds.ratio(name, "fp32") for name in rounds if name != "fp32"]
    return Section(title, f"{work}, --no-write", [*rounds.figures("boards/s"), *ratios])


def measure_stream(setting: Setting) -> Section:
    """Stream the 50M model, computed and stored in bf16 so that copies count."""
    title = "GPU, stream"
    if reason := _why_not(setting.memory):
        return Section(title, reason)
    work = _workload(setting, setting.memory, "bf16", _BOARDS)
    return stream_section(title, work, precision="bf16")


def measure_memory(setting: Setting) -> Section:
    """Dump to a memory-backed file system."""
    return _measure_dumps(setting, setting.memory, "GPU, to memory")


def measure_disk(setting: Setting) -> Section:
    """Dump to an ordinary disk."""
    return _measure_dumps(setting, setting.scratch, "GPU, to disk")


def _why_not(directory: Path) -> str:
    if not torch.cuda.is_available():
        return "skipped: no CUDA device"
    if shutil.disk_usage(directory).free < _NEEDED_SPACE:
        return f"skipped: {directory} has less than {_NEEDED_SPACE / 1e9:g} GB; name another"
    return ""


def _workload(setting: Setting, directory: Path, dtype: str, boards: int) -> Workload:
    return Workload(
        setting=setting,
        checkpoint=checkpoint_50m(setting),
        keys=KEYS_50M,
        boards=boards,
        batch=_BATCH,
        device="cuda",
        dtype=dtype,
        directory=directory,
    )


def _measure_dumps(setting: Setting, directory: Path, title: str) -> Section:
    if reason := _why_not(directory):
        return Section(title, reason)
    figures, conditions = [], []
    for dtype, nbytes in _BOARD_NBYTES.items():
        speed = _workload(setting, directory, dtype, _PROBED_BOARDS).dump_speed()
        space = 0.85 * shutil.disk_usage(directory).free / nbytes
        boards = int(min(_BOARDS, space, speed * setting.seconds)) // _BATCH * _BATCH
        work = _workload(setting, directory, dtype, max(boards, _PROBED_BOARDS))
        figures += _against_limits(work, f"{dtype}: ")
        conditions.append(str(work))
    return Section(title, "; ".join(conditions), figures)


def _against_limits(work: Workload, prefix: str) -> list[Figure]:
    nbytes = _BOARD_NBYTES[work.dtype]
    fewer = min(work.boards, int(_BASELINE_NBYTES / nbytes) // _BATCH * _BATCH)
    limits: dict[str, Callable[[], float]] = {
        "plain forward loop": work.forward_speed,
        "copy alone": lambda: pinned_copy_speed() / nbytes,
        "write alone": lambda: write_speed(work.target.parent, int(_BASELINE_NBYTES)) / nbytes,
    }
    contenders = {
        "dump": work.dump_figures,
        "baseline": partial(work.script_speed, fewer),
        **limits,
    }
    rounds = compare(contenders, rounds=work.setting.rounds)
    shares = rounds.pop(WAITING)
    slowest = zip(*(rounds[name] for name in limits), strict=True)
    rounds["slowest limit"] = [min(speeds) for speeds in slowest]
    figures = [
        *rounds.figures("boards/s"),
        rounds.ratio("dump, whole call", "baseline", at_least=4),
        rounds.ratio("dump", "slowest limit", at_least=0.8),
        Figure.of(WAITING, shares, "x"),
    ]
    return [replace(figure, name=f"{prefix}{figure.name}") for figure in figures]


def _overlap(run: Callable[[], object], trace: Path) -> list[Figure]:
    """Profile a run: how much of its copies to the host runs while kernels run."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
    profiler.export_chrome_trace(str(trace))
    edges = []
    for event in json.loads(trace.read_text())["traceEvents"]:
        is_copy = event.get("cat") == "gpu_memcpy" and "DtoH" in event.get("name", "")
        if is_copy or event.get("cat") == "kernel":
            edges += [(event["ts"], is_copy, 1), (event["ts"] + event["dur"], is_copy, -1)]
    edges.sort()
    running, busy = {False: 0, True: 0}, {"kernels": 0.0, "copies": 0.0, "both": 0.0}
    for (start, is_copy, change), (stop, *_) in pairwise(edges):
        running[is_copy] += change
        microseconds = stop - start
        busy["kernels"] += microseconds * (running[False] > 0)
        busy["copies"] += microseconds * (running[True] > 0)
        busy["both"] += microseconds * (running[False] > 0 and running[True] > 0)
    shorter = min(busy["kernels"], busy["copies"])
    return [
        *(Figure.of(f"profile: {name}", [spent / 1e6], "s") for name, spent in busy.items()),
        Figure.of("profile: both to the shorter", [busy["both"] / shorter], "x"),
    ]
