"""One way to spread work on threads, and to end the threads of a loop with the program."""

import atexit
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K")
G = TypeVar("G", bound=Generator[Any, None, None])


def in_parallel(
    work: Callable[[T], R], items: Iterable[T], threads: int, take: Callable[[T, R], None]
) -> None:
    """Call `work(item)` on threads, and `take(item, result)` in this thread, in order.

    The first error of either ends all: calls that have not begun are cancelled.
    """
    items = list(items)
    with ThreadPoolExecutor(threads) as executor:
        try:
            for item, result in zip(items, executor.map(work, items), strict=True):
                take(item, result)
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise


def sum_in_parallel(
    work: Callable[[K, int, int], R],
    lengths: Mapping[K, tuple[int, int]],
    threads: int,
    progress: Callable[[int, int], object] | None = None,
) -> dict[K, R]:
    """Call `work(name, start, stop)` on threads for each chunk, and add results of a name in order.

    `lengths` maps a name to its length and the length of a chunk. An empty one has no result.
    `progress` is called in this thread with the length done and in all, and may raise.
    """
    found: dict[K, Any] = {}
    chunks = [
        (name, start, min(start + size, length))
        for name, (length, size) in lengths.items()
        for start in range(0, length, size)
    ]
    done, in_all = 0, sum(length for length, _ in lengths.values())

    def take(chunk: tuple[K, int, int], result: R) -> None:
        nonlocal done
        name, start, stop = chunk
        found[name] = found[name] + result if name in found else result
        done += stop - start
        if progress is not None:
            progress(done, in_all)

    in_parallel(lambda chunk: work(*chunk), chunks, threads, take)
    return found


_LONGEST_EXIT = 1.0  # seconds
_loops: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


def closed_at_exit(loop: G) -> G:
    """Return a generator that is closed when the program ends, if something holds it until then.

    Python would close it while it takes modules apart, when no thread pool can be shut down.
    """
    _loops.add(loop)
    return loop


@atexit.register
def _close_loops() -> None:
    for loop in list(_loops):
        # A daemon thread may run it. Python would end that thread inside of a call, which aborts.
        ends = time.monotonic() + _LONGEST_EXIT
        while getattr(loop, "gi_running", False) and time.monotonic() < ends:
            time.sleep(0.001)
        with suppress(ValueError):  # It runs still.
            loop.close()
