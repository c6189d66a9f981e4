"""Counts the busy time of CUDA streams."""

from collections import deque

import torch


class CudaStopwatch:
    """Adds up the seconds a CUDA stream spends on the work queued inside its `with` blocks.

    Nothing blocks: an interval is counted once the device has passed its end.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._seconds = 0.0

    def __enter__(self) -> None:
        start = torch.cuda.Event(enable_timing=True)
        start.record(self._stream)
        self._pending.append((start, torch.cuda.Event(enable_timing=True)))

    def __exit__(self, *_: object) -> None:
        self._pending[-1][1].record(self._stream)
        self._count_finished()

    @property
    def seconds(self) -> float:
        """Seconds of the intervals that have ended on the device."""
        self._count_finished()
        return self._seconds

    def _count_finished(self) -> None:
        while self._pending and self._pending[0][1].query():
            start, stop = self._pending.popleft()
            self._seconds += start.elapsed_time(stop) / 1000
