"""What a run is doing, told to whoever shows it: one phase after another, some of them counted.

Nobody needs to listen. Importing this module costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

Count = Callable[[int, int], None]
"""Called with what is done of a phase and what there is in all; 0 where nobody knows that."""

BYTES = "B"
"""The unit of what is counted in bytes."""


@dataclass(frozen=True)
class Phase:
    """A part of a run, which lasts until the next begins.

    Attributes:
        name: what is being done; empty where the unit says it.
        unit: what is counted, in the plural.
        start: how many of them were done before.
        of: how many there are in all; 0 where nobody knows that yet.
        nbytes: bytes that all of them come to, where that is known.
    """

    name: str
    unit: str = ""
    start: int = 0
    of: int = 0
    nbytes: int = 0


class Reporter(Protocol):
    """Is told what a run is doing; any thread may call it."""

    def begin(self, phase: Phase) -> None:
        """Go on to a phase."""

    def advance(self, done: int, of: int) -> None:
        """Note how much of the phase is done."""


_reporter: ContextVar[Reporter | None] = ContextVar("_reporter", default=None)


def reporter() -> Reporter | None:
    """Return who is told in this thread; None if nobody is."""
    return _reporter.get()


@contextmanager
def reported_to(listener: Reporter) -> Iterator[None]:
    """Tell a reporter of all that this thread does in the context."""
    token = _reporter.set(listener)
    try:
        yield
    finally:
        _reporter.reset(token)


def begin(name: str) -> None:
    """Go on to a phase that is not counted."""
    if (listener := _reporter.get()) is not None:
        listener.begin(Phase(name))


def counted(phase: Phase, also: Count | None = None) -> Count:
    """Go on to a phase, and return what is to be called as it advances.

    Args:
        phase: what is going to be done.
        also: called likewise.
    """
    listener = _reporter.get()
    if listener is not None:
        listener.begin(phase)

    def count(done: int, of: int) -> None:
        if listener is not None:
            listener.advance(done, of)
        if also is not None:
            also(done, of)

    return count
