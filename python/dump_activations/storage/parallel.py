"""One way to spread work on threads."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K")


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
