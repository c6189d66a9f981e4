"""One way to spread work on threads."""

from collections.abc import Callable, Iterable
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
