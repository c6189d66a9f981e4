"""One way to spread work on threads."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


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


def chunks_of(name: T, length: int, size: int) -> Iterator[tuple[T, int, int]]:
    """Cut `length` bytes or elements of something into (its name, start, stop)."""
    return ((name, start, min(start + size, length)) for start in range(0, length, size))


def chunks_in_parallel(
    work: Callable[[T, int, int], R],
    chunks: Iterable[tuple[T, int, int]],
    threads: int,
    take: Callable[[T, R], None],
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """Call `work(name, start, stop)` on threads, and `take(name, result)` in this thread, in order.

    `progress` is called in this thread with what is done and with all, and may raise.
    """
    chunks = list(chunks)
    done, in_all = 0, sum(stop - start for _, start, stop in chunks)

    def take_chunk(chunk: tuple[T, int, int], result: R) -> None:
        nonlocal done
        name, start, stop = chunk
        take(name, result)
        done += stop - start
        if progress is not None:
            progress(done, in_all)

    in_parallel(lambda chunk: work(*chunk), chunks, threads, take_chunk)
