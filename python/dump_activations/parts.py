"""Rows of a batch that become ready together."""

from collections.abc import Callable
from dataclasses import dataclass


def _ready() -> None:
    pass


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a batch, `start` to `stop`, on their way into a buffer.

    `wait` returns once they are there, or raises what kept them from it. Any thread may call it,
    any number of times.
    """

    start: int
    stop: int
    wait: Callable[[], object] = _ready
