"""Dumps of the 50M model on a GPU: against the plain script and against each stage's own limit.

Everything runs in this process, in turns. The set-up of the first dump is a figure by itself. Each
run page-locks its memory again before its loop, which only whole calls count.

`gpu.sh` runs all sections. With QUICK set they are small, and only show that they run.

Shape letters: B boards in a batch, H heads, S cells (16), D width of a head.
"""

import json
import math
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from dumps import stream_section
from limits import copy_speed, pinned_copy_speed, write_speed
from measure import Figure, Section, compare, timed
from setting import Setting
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from workload import KEYS_50M, KEYS_DEMO, WAITING, Workload, checkpoint_50m

from dump_activations import Batch, demo, stream, stream_cells
from dump_activations.pipeline.options import PRECISIONS
from dump_activations.pipeline.transfer import mapped

_BATCH = 16 if "QUICK" in os.environ else 1024
_BOARDS, _PROBED_BOARDS = 64 * _BATCH, 8 * _BATCH
# Bytes that KEYS_50M take for one board: three keys of 12 layers and one, each (16, 512).
_BOARD_NBYTES = {"fp32": 4 * 37 * 16 * 512, "bf16": 2 * 37 * 16 * 512}
_BASELINE_NBYTES = 4e6 * _BATCH
_NEEDED_SPACE = 12e6 * _BATCH
_COPIED_NBYTES = _BATCH << 20

# Forward passes as they can be run: kernel by kernel, and as a graph of CUDA's.
_LAUNCHES = {
    "kernel by kernel": {"cuda_graph": False},
    "graph": {},
    "compiled, kernel by kernel": {"compile": True, "cuda_graph": False},
    "compiled, graph": {"compile": True},
}
# A tile of the kernels has 64 or 128 positions, of which a board fills 16.
_ATTENTION = [
    *((torch.bfloat16, f"{name}_ATTENTION", 1) for name in ("FLASH", "EFFICIENT", "CUDNN")),
    (torch.bfloat16, "EFFICIENT_ATTENTION", 4),
    (torch.bfloat16, "EFFICIENT_ATTENTION", 8),
    (torch.float32, "EFFICIENT_ATTENTION", 1),
    *((dtype, "MATH", 1) for dtype in (torch.bfloat16, torch.float32)),
]


def measure_forward(setting: Setting) -> Section:
    """Compare `--no-write` with the plain loop."""
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
        str(work),
        [
            *rounds.figures("boards/s"),
            *(rounds.ratio(name, plain, at_least=0.97) for name in ways),
            Figure.of("first dump, less the second", [first - second], "s"),
        ],
    )


def measure_profile(setting: Setting) -> Section:
    """Look at a dump through the profiler: its kernels, and how much of its copies they hide."""
    title = "GPU, profile"
    if reason := _why_not(setting.memory):
        return Section(title, reason)
    work = _workload(setting, setting.memory, "bf16", _PROBED_BOARDS)
    work.dump()
    return Section(title, str(work), _overlap(work.dump, setting.scratch / "trace.json"))


def measure_launches(setting: Setting) -> Section:
    """Stream to the device eagerly, compiled and as CUDA graphs: a batch's time, there and here."""
    title = "GPU, launches"
    if reason := _why_not(setting.scratch):
        return Section(title, reason)
    large = _workload(setting, setting.scratch, "bf16", _BOARDS)
    works = {
        f"50M, batch {_BATCH}": large,
        f"50M, batch {_BATCH // 8}": replace(large, boards=_BOARDS // 2, batch=_BATCH // 8),
        f"demo, batch {_BATCH}": replace(large, checkpoint=demo.CHECKPOINT, keys=KEYS_DEMO),
    }
    figures = []
    for name, work in works.items():
        rounds = compare(
            {way: partial(_batch_times, work, way) for way in _LAUNCHES}, rounds=setting.rounds
        )
        figures += [replace(each, name=f"{name}: {each.name}") for each in rounds.figures("ms")]
    return Section(title, "bf16; all of a batch, and of it the processor time of the loop", figures)


def _batch_times(work: Workload, way: str) -> dict[str, float]:
    """Milliseconds per batch, and of the thread that queues it."""
    batches = _stream(work, **_LAUNCHES[way])
    next(batches)
    torch.cuda.synchronize()
    started, queueing = time.perf_counter(), time.thread_time()
    count = sum(1 for _ in batches)
    queueing = time.thread_time() - queueing
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {way: 1e3 * seconds / count, f"{way}, queueing": 1e3 * queueing / count}


def measure_parts(setting: Setting) -> Section:
    """Time the copy to page-locked memory, its page-locking, and each kernel of the attention."""
    title = "GPU, parts"
    if reason := _why_not(setting.scratch):
        return Section(title, reason)
    figures = [
        *_registered("registered", mmap.MADV_NORMAL),
        *_registered("registered, huge pages", mmap.MADV_HUGEPAGE),
        Figure.of("copy, torch's pinned memory", [pinned_copy_speed(_COPIED_NBYTES) / 1e9], "GB/s"),
    ]
    lacking = []
    for dtype, backend, boards in _ATTENTION:
        name = f"attention, {str(dtype)[6:]}, {backend}, {boards} boards in a sequence"
        try:
            figures.append(Figure.of(name, [_attention(dtype, backend, boards)], "ms"))
        except RuntimeError as error:
            lacking.append(f"{name}: {str(error).splitlines()[0]}")
    return Section(title, "; ".join(["50M model's attention", *lacking]), figures)


def _registered(name: str, advice: int) -> list[Figure]:
    """Page-lock memory as a run does, and copy to it."""
    host, cudart = mapped(_COPIED_NBYTES, advice), torch.cuda.cudart()
    codes: list[int] = []
    seconds = timed(
        lambda: codes.append(int(cudart.cudaHostRegister(host.data_ptr(), len(host), 1)))
    )
    speed = copy_speed(host) / 1e9
    if codes == [0]:
        cudart.cudaHostUnregister(host.data_ptr())
    return [
        Figure.of(f"page-locking, {name}, code {codes[0]}", [seconds / len(host) * 2**30], "s/GiB"),
        Figure.of(f"copy, {name}", [speed], "GB/s"),
    ]


def _attention(dtype: torch.dtype, backend: str, boards: int) -> float:
    """Milliseconds of one layer's attention, with some boards in a sequence and masked apart."""
    shape_BSHD = (_BATCH // boards, boards * 16, 8, 64)
    q, k, v = (torch.randn(shape_BSHD, device="cuda", dtype=dtype).transpose(1, 2) for _ in "qkv")
    board_S = torch.arange(boards * 16, device="cuda") // 16
    mask = board_S[:, None] == board_S if boards > 1 else None
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.inference_mode(), sdpa_kernel(getattr(SDPBackend, backend)):
        F.scaled_dot_product_attention(q, k, v, mask)
        start.record()
        for _ in range(20):
            F.scaled_dot_product_attention(q, k, v, mask)
        stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 20


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


def measure_cells(setting: Setting) -> Section:
    """Stream shuffled cells of one layer, against the batches that they are taken from."""
    title = "GPU, cells"
    if reason := _why_not(setting.scratch):
        return Section(title, reason)
    work = replace(_workload(setting, setting.scratch, "bf16", _BOARDS), keys="layer_outputs")

    def cells() -> float:
        batches = stream_cells(
            work.model,
            work.steps,
            work.keys,
            layer=5,
            n_samples=work.boards,
            boards_per_pass=work.batch,
            dtype="bf16",
            precision="bf16",
        )
        return work.boards / timed(lambda: _used(batches))

    rounds = compare(
        {
            "stream_cells": cells,
            "stream": lambda: work.boards / timed(lambda: _used(_stream(work, layers=[5]))),
        },
        rounds=setting.rounds,
    )
    ratio = rounds.ratio("stream_cells", "stream")
    return Section(title, f"{work}, layer 5", [*rounds.figures("boards/s"), ratio])


def _stream(work: Workload, **options: Any) -> Iterator[Batch]:
    """Stream a workload's batches to the device, computed and stored in bf16."""
    chosen = {"outputs": work.keys, "n_samples": work.boards, "batch_size": work.batch, **options}
    return stream(
        work.model, work.steps, dtype="bf16", precision="bf16", tensors="device", **chosen
    )


def _used(batches: Iterable[object]) -> None:
    for _ in batches:
        pass
    torch.cuda.synchronize()


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
        "copy alone": lambda: pinned_copy_speed(_COPIED_NBYTES) / nbytes,
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
    print(profiler.key_averages().table("self_device_time_total", 16, max_name_column_width=70))
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
        Figure.of("profile: both to the shorter", [busy["both"] / (shorter or math.inf)], "x"),
    ]
