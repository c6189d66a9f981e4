"""Chunks of a batch that become ready together, and the busy time of the pipeline's stages."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a batch, `start` to `stop`: all of it, or the rows one core computes.

    `wait` returns once they are in their buffer, or raises the error that kept them out. Any thread
    may call it, any number of times.
    """

    start: int
    stop: int
    wait: Callable[[], object] = lambda: None


class Stopwatch:
    """Adds up the seconds spent inside its `with` blocks, on any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._local = threading.local()
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._local.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self._local.start
        with self._lock:
            self.seconds += seconds


class SharedStopwatch:
    """Counts the seconds during which at least one thread is inside its `with` block."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._since = 0.0
        self.seconds = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._since = time.perf_counter()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self.seconds += time.perf_counter() - self._since
