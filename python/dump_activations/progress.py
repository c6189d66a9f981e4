"""Progress of a run: code reports phases, and `shown_progress` displays them on stderr.

Code calls `begin` and `counted`. A terminal or a notebook shows a bar, a log gets a line at
intervals. This module imports rich only for a bar. Chunks and stopwatches at its end tell how far a
batch is, and how long each stage was busy.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dump_activations.errors import duration_text, printable, size_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Count = Callable[[int, int], None]
"""Called with the units done of a phase and all its units, or 0 where their number is unknown."""

BYTES = "B"
"""The unit of a phase that counts bytes."""

# The rate is a mean over the last seconds, so that it follows changes.
_RATE_SECONDS = 30.0
_NARROWEST_BAR = 5
_REFRESHES_PER_SECOND = 5
# Seconds until a log gets a line for a phase, and seconds until the next line.
_FIRST_LINE = 10.0
_LONGEST_PAUSE = 60.0


class Phase:
    """A phase of a run, which lasts until the next begins: how much is done, and how fast.

    Any thread may advance it. The name is empty where the unit, in the plural, names the work.
    `start` units were done before the phase, `of` is the number of all and `nbytes` their bytes,
    each 0 where unknown.
    """

    def __init__(
        self, name: str, unit: str = "", *, start: int = 0, of: int = 0, nbytes: int = 0
    ) -> None:
        self.name, self.unit, self.began = name, unit, time.monotonic()
        self._done, self._of, self._nbytes = start, of, nbytes
        self._samples = deque([(self.began, start)])

    def advance(self, done: int, of: int) -> None:
        """Note how much is done."""
        now = time.monotonic()
        self._done, self._of = done, of
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[1][0] > _RATE_SECONDS:
            self._samples.popleft()

    @property
    def fraction(self) -> float | None:
        """How much of the phase is done, 0 to 1; None where that is unknown."""
        return self._done / self._of if self._of else None

    def text(self) -> str:
        """Name the phase and how much of it is done."""
        if not self.unit:
            return self.name
        of = f"/{self._amount(self._of)}" if self._of else ""
        counted = f"{self._amount(self._done)}{of}{self._unit_text}"
        return f"{self.name}: {counted}" if self.name else counted

    def figures(self) -> list[str]:
        """List the duration, the time left and the rates, the most useful first."""
        now = time.monotonic()
        figures = [duration_text(now - self.began)]
        first, before = self._samples[0]
        rate = (self._done - before) / (now - first) if now > first else 0.0
        if not rate:
            return figures
        if self._of:
            figures.append(f"{duration_text((self._of - self._done) / rate)} left")
        figures.append(f"{self._amount(rate)}{self._unit_text}/s")
        if self._nbytes and self._of:
            throughput = size_text(int(rate * self._nbytes / self._of))
            figures.append(f"{throughput}/s of {size_text(self._nbytes)}")
        return figures

    @property
    def _unit_text(self) -> str:
        return "" if self.unit == BYTES else f" {self.unit}"

    def _amount(self, number: float) -> str:
        return size_text(int(number)) if self.unit == BYTES else f"{number:,.0f}"


class Reporter:
    """Keeps the phase of a run that reports to it."""

    def __init__(self) -> None:
        self.phase = Phase("starting")


_reporter: ContextVar[Reporter | None] = ContextVar("_reporter", default=None)

# The console of the bar, if there is one. A line that bypassed it would break the bar.
_live: Console | None = None


def reporter() -> Reporter | None:
    """Return the reporter of this thread; None if there is none."""
    return _reporter.get()


@contextmanager
def reported_to(listener: Reporter) -> Iterator[None]:
    """Report the progress of this thread to a reporter inside the context."""
    token = _reporter.set(listener)
    try:
        yield
    finally:
        _reporter.reset(token)


def begin(name: str) -> None:
    """Begin a phase that is not counted."""
    counted(Phase(name))


def counted(phase: Phase, also: Count | None = None) -> Count:
    """Begin a phase, and return the function to call as it advances, which calls `also` too."""
    listener = _reporter.get()
    if listener is not None:
        listener.phase = phase

    def count(done: int, of: int) -> None:
        phase.advance(done, of)
        if also is not None:
            also(done, of)

    return count


def live_console() -> Console | None:
    """Return the console that shows a bar. It must print all other lines meanwhile."""
    return _live


def shown_progress(*, as_json: bool = False) -> AbstractContextManager[None]:
    """Show the progress of this thread inside the context, unless it has a reporter already.

    With `as_json`, each line of a log is JSON.
    """
    if reporter() is not None or sys.stderr is None:
        return nullcontext()
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    # Without these widgets rich shows no bar in a notebook.
    is_notebook = type(shell).__name__ == "ZMQInteractiveShell" and find_spec("ipywidgets")
    if is_notebook or (is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"):
        return _bar()
    return _lines(as_json=as_json)


def is_terminal(stream: Any) -> bool:
    """Return True where a stream is a terminal. A closed stream, or one without isatty, is not."""
    try:
        return bool(stream.isatty())
    except (AttributeError, OSError, ValueError):
        return False


class _Stderr:
    """A stream like stderr. Where stderr is full or closed, a line is lost and no run ends."""

    def __init__(self) -> None:
        self._stream = sys.stderr

    def write(self, text: str) -> None:
        with suppress(AttributeError, OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(AttributeError, OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _bar_line(phase: Phase, width: int, stream: object = None) -> Text:
    """Return a line of fewer columns than `width`: phase, as many figures as fit, and a bar."""
    from rich.cells import cell_len
    from rich.text import Text

    words = printable(phase.text(), stream)
    room = width - 1 - cell_len(words)
    figures: list[str] = []
    for figure in phase.figures():
        if len(", ".join([*figures, figure])) + 2 > room:
            break
        figures.append(figure)
    shown = ", ".join(figures)
    room -= len(shown) + 2
    if (fraction := phase.fraction) is None or room < _NARROWEST_BAR:
        return Text(", ".join([words, *figures]), overflow="crop", no_wrap=True)
    done = round(min(fraction, 1.0) * room)
    full, empty = "━─" if printable("━─", stream) == "━─" else "=-"
    bar = (full * done, "green"), (empty * (room - done), "dim")
    return Text.assemble(words, " ", *bar, " ", shown, overflow="crop", no_wrap=True)


@contextmanager
def _bar() -> Iterator[None]:
    global _live  # noqa: PLW0603 -- there is one terminal
    from rich.console import Console
    from rich.live import Live

    console = Console(file=_Stderr())  # type: ignore[arg-type]
    display = Reporter()
    live = Live(
        get_renderable=lambda: _bar_line(display.phase, console.width, console),
        console=console,
        refresh_per_second=_REFRESHES_PER_SECOND,
        transient=True,
        # Otherwise rich would print to stderr what a program writes to a piped stdout.
        redirect_stdout=is_terminal(sys.stdout),
    )
    with live, reported_to(display):
        _live = console
        try:
            yield
        finally:
            _live = None


@contextmanager
def _lines(*, as_json: bool) -> Iterator[None]:
    """Write lines to a log: for each phase of some seconds, and then at intervals."""
    display, stream, ended = Reporter(), _Stderr(), threading.Event()

    def write() -> None:
        for line in _due_lines(display, ended):
            stamp = datetime.now().astimezone().isoformat(timespec="seconds")
            fields = json.dumps({"time": stamp, "progress": line})
            text = fields if as_json else printable(f"{stamp} progress: {line}", stream)
            stream.write(f"{text}\n")
            stream.flush()

    writer = threading.Thread(target=write, name="progress", daemon=True)
    writer.start()
    try:
        with reported_to(display):
            yield
    finally:
        ended.set()
        writer.join()


def _due_lines(display: Reporter, ended: threading.Event) -> Iterator[str]:
    """Yield a line whenever one is due: for a new phase, or after a long pause."""
    named, last = None, display.phase.began + _FIRST_LINE - _LONGEST_PAUSE
    while not ended.wait(min(1.0, _FIRST_LINE)):
        phase, now = display.phase, time.monotonic()
        is_new = phase is not named and now - phase.began >= _FIRST_LINE
        if is_new or now - last >= _LONGEST_PAUSE:
            named, last = phase, now
            share = [] if phase.fraction is None else [f"{phase.fraction:.0%}"]
            yield ", ".join([phase.text(), *share, *phase.figures()])


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a batch, `start` to `stop`: all of it, or the rows one core computes.

    `wait` returns once they are in their buffer, or raises the error that kept them out. Any thread
    may call it, any number of times.
    """

    start: int
    stop: int
    wait: Callable[[], object] = lambda: None


class Stopwatch:
    """Adds up the seconds spent inside its `with` blocks, on any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._local = threading.local()
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._local.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self._local.start
        with self._lock:
            self.seconds += seconds


class SharedStopwatch:
    """Counts the seconds during which at least one thread is inside its `with` block."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._since = 0.0
        self.seconds = 0.0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._since = time.perf_counter()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self.seconds += time.perf_counter() - self._since
