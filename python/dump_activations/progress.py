"""Progress of a run: phases that code reports, and their display on stderr.

Code calls `begin` and `counted`. `shown_progress` displays the phases: a bar on a terminal or in a
notebook, else a line at intervals. Importing this module costs nothing; rich is imported for a bar.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from dump_activations.text import duration_text, size_text

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from typing import TextIO

    from rich.console import Console
    from rich.text import Text

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


# The rate is that of so many last seconds, so that it follows what happens.
_RATE_SECONDS = 30.0


class Status:
    """A phase, what is done of it, and how fast.

    Args:
        phase: what is being done.
        now: when it began, in seconds of any clock.
    """

    def __init__(self, phase: Phase, now: float) -> None:
        self._phase = phase
        self._began = now
        self._done, self._of = phase.start, phase.of
        self._samples = deque([(now, phase.start)])

    def advance(self, done: int, of: int, now: float) -> None:
        """Note how much is done."""
        self._done, self._of = done, of
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] > _RATE_SECONDS:
            self._samples.popleft()

    @property
    def fraction(self) -> float | None:
        """How much of the phase is done; None where it is not counted."""
        return self._done / self._of if self._of else None

    def text(self) -> str:
        """Say what is being done, and how much of it is."""
        name = self._phase.name
        if not self._phase.unit:
            return name
        of = f"/{self._amount(self._of)}" if self._of else ""
        return f"{name}{': ' if name else ''}{self._amount(self._done)}{of}{self._unit}"

    def figures(self, now: float) -> list[str]:
        """List how long it takes and how fast it goes, the most wanted first."""
        figures = [duration_text(now - self._began)]
        rate = self._rate(now)
        if not rate:
            return figures
        if self._of:
            figures.append(f"{duration_text((self._of - self._done) / rate)} left")
        figures.append(f"{self._amount(rate)}{self._unit}/s")
        if self._phase.nbytes and self._of:
            throughput = size_text(int(rate * self._phase.nbytes / self._of))
            figures.append(f"{throughput}/s of {size_text(self._phase.nbytes)}")
        return figures

    def _rate(self, now: float) -> float:
        """Units a second; 0.0 while that is not known."""
        began, before = self._samples[0]
        return (self._done - before) / (now - began) if now > began else 0.0

    @property
    def _unit(self) -> str:
        return "" if self._phase.unit == BYTES else f" {self._phase.unit}"

    def _amount(self, number: float) -> str:
        return size_text(int(number)) if self._phase.unit == BYTES else f"{number:,.0f}"


_NARROWEST_BAR = 5
_REFRESHES_A_SECOND = 5
# Seconds from the start to the first line; each next one comes after as long again, up to the last.
_FIRST_LINE = 10.0
_LONGEST_PAUSE = 600.0

# Where a bar is drawn, if one is: a line that went past its console would break it.
_live: Console | None = None


def live_console() -> Console | None:
    """Return the console on which a bar is drawn, which is to print all other lines meanwhile."""
    return _live


def shown_progress() -> AbstractContextManager[None]:
    """Show what this thread does in the context, unless that is shown already."""
    if reporter() is not None or sys.stderr is None:
        return nullcontext()
    if _is_notebook() or (sys.stderr.isatty() and os.environ.get("TERM") != "dumb"):
        return _bar()
    return _lines(sys.stderr)


class _Display:
    """Knows what is being done."""

    def __init__(self) -> None:
        self._status = Status(Phase("starting"), time.monotonic())

    def begin(self, phase: Phase) -> None:
        self._status = Status(phase, time.monotonic())

    def advance(self, done: int, of: int) -> None:
        self._status.advance(done, of, time.monotonic())


class _Bar(_Display):
    """A bar with figures, on one line."""

    def line(self, width: int) -> Text:
        """Return as much as fits: of the figures the first, and a bar in what is left."""
        from rich.text import Text

        status, now = self._status, time.monotonic()
        words = status.text()
        room = width - 1 - len(words)
        figures: list[str] = []
        for figure in status.figures(now):
            if len(", ".join([*figures, figure])) + 2 > room:
                break
            figures.append(figure)
        shown = ", ".join(figures)
        room -= len(shown) + 2
        if (fraction := status.fraction) is None or room < _NARROWEST_BAR:
            return Text(", ".join([words, *figures]), overflow="crop", no_wrap=True)
        done = round(min(fraction, 1.0) * room)
        bar = ("━" * done, "green"), ("─" * (room - done), "dim")
        return Text.assemble(words, " ", *bar, " ", shown, overflow="crop", no_wrap=True)


@contextmanager
def _bar() -> Iterator[None]:
    global _live  # noqa: PLW0603 -- there is one terminal
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    display = _Bar()
    live = Live(
        get_renderable=lambda: display.line(console.width),
        console=console,
        refresh_per_second=_REFRESHES_A_SECOND,
        transient=True,
    )
    with live, reported_to(display):
        _live = console
        try:
            yield
        finally:
            _live = None


class _Lines(_Display):
    """Lines of text, at growing intervals."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._ended = threading.Event()

    def run(self) -> None:
        """Write lines until the end."""
        pause = _FIRST_LINE
        while not self._ended.wait(pause):
            line = self._line()
            with suppress(OSError, ValueError):  # Nobody is left to be told.
                self._stream.write(f"{line}\n")
                self._stream.flush()
            pause = min(2 * pause, _LONGEST_PAUSE)

    def end(self) -> None:
        self._ended.set()

    def _line(self) -> str:
        status = self._status
        fraction = status.fraction
        share = [] if fraction is None else [f"{fraction:.0%}"]
        return "progress: " + ", ".join([status.text(), *share, *status.figures(time.monotonic())])


@contextmanager
def _lines(stream: TextIO) -> Iterator[None]:
    display = _Lines(stream)
    writer = threading.Thread(target=display.run, name="progress", daemon=True)
    writer.start()
    try:
        with reported_to(display):
            yield
    finally:
        display.end()
        writer.join()


def _is_notebook() -> bool:
    """Whether a notebook is there to draw a bar, and the widgets that rich draws it with."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell" and find_spec("ipywidgets") is not None
