"""How far a phase is, in words and figures."""

from collections import deque

from dump_activations.phases import BYTES, Phase
from dump_activations.units import duration_text, size_text

# The rate is that of so many last seconds, so that it follows what happens.
_WINDOW = 30.0


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
        while len(self._samples) > 2 and now - self._samples[1][0] > _WINDOW:
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
