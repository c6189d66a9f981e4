"""How much of a dump's copies to the host runs beside its forward pass, from a profiler trace."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from measure import Figure
from torch.profiler import ProfilerActivity, profile

Interval = tuple[float, float]


def profile_overlap(run: Callable[[], object], trace: Path) -> list[Figure]:
    """Profile a run; its trace, in Chrome's format, is left in a file."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    kernels = _busy(event for event in events if event.get("cat") == "kernel")
    copies = _busy(
        event
        for event in events
        if event.get("cat") == "gpu_memcpy" and "DtoH" in event.get("name", "")
    )
    both = _length(_intersection(kernels, copies))
    return [
        Figure.of("profile: kernels running", [_length(kernels)], "s"),
        Figure.of("profile: copies to the host running", [_length(copies)], "s"),
        Figure.of("profile: both at once", [both], "s"),
        Figure.of(
            "profile: of the shorter, beside the other", [_share(both, kernels, copies)], "x"
        ),
    ]


def _busy(events: Iterable[dict[str, Any]]) -> list[Interval]:
    """Merge events' times, which the trace gives in microseconds, to disjoint seconds in order."""
    merged: list[Interval] = []
    for start, stop in sorted(
        (event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6) for event in events
    ):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def _intersection(left: list[Interval], right: list[Interval]) -> list[Interval]:
    both = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, stop = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < stop:
            both.append((start, stop))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return both


def _length(intervals: list[Interval]) -> float:
    return sum(stop - start for start, stop in intervals)


def _share(both: float, *stages: list[Interval]) -> float:
    shorter = min(map(_length, stages))
    return both / shorter if shorter else 0.0
