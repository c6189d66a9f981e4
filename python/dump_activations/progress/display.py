"""Shows what a run is doing: a bar on a terminal or in a notebook, else a line now and then.

It goes to stderr. rich is imported where a bar is drawn.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING

from dump_activations.phases import Phase, reported_to, reporter
from dump_activations.place import Place
from dump_activations.progress.status import Status

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from typing import TextIO

    from rich.console import Console
    from rich.text import Text

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
    """Show what this thread does in the context, unless that is shown already.

    Of the processes of a group, one shows what all of them do.
    """
    if reporter() is not None or sys.stderr is None or Place.here().rank:
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
