"""One way to spread work on threads."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def chunks_of(name: T, length: int, size: int) -> Iterator[tuple[T, int, int]]:
    """Cut `length` bytes or elements of something into (its name, start, stop)."""
    return ((name, start, min(start + size, length)) for start in range(0, length, size))


def in_parallel(
    work: Callable[[T, int, int], R],
    chunks: Iterable[tuple[T, int, int]],
    threads: int,
    take: Callable[[T, R], None],
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Call `work(name, start, stop)` on threads, and `take(name, result)` in this thread, in order.

    `progress` is called in this thread with what is done and with all, and may raise. The first
    error ends all: calls that have not begun are cancelled.
    """
    chunks = list(chunks)
    done, in_all = 0, sum(stop - start for _, start, stop in chunks)
    with ThreadPoolExecutor(threads) as executor:
        try:
            results = executor.map(lambda chunk: work(*chunk), chunks)
            for (name, start, stop), result in zip(chunks, results, strict=True):
                take(name, result)
                done += stop - start
                if progress is not None:
                    progress(done, in_all)
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
