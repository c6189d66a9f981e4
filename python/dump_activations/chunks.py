"""Rows of a batch that become ready together."""

from collections.abc import Callable
from dataclasses import dataclass


def _ready() -> None:
    pass


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a batch, `start` to `stop`: what one core computes, or all of the batch.

    `wait` returns once they are in their buffer, or raises what kept them from it. Any thread may
    call it, any number of times.
    """

    start: int
    stop: int
    wait: Callable[[], object] = _ready
