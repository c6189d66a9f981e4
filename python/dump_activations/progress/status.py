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
        named = f"{self._phase.name}: " if self._phase.name else ""
        if not self._phase.unit:
            return self._phase.name
        of = f"/{self._amount(self._of)}" if self._of else ""
        unit = "" if self._phase.unit == BYTES else f" {self._phase.unit}"
        return f"{named}{self._amount(self._done)}{of}{unit}"

    def figures(self, now: float) -> list[str]:
        """List how fast it goes and how long it takes, the most wanted first."""
        elapsed = duration_text(now - self._began)
        rate = self._rate(now)
        if not rate:
            return [elapsed]
        left = (self._of - self._done) / rate
        figures = [f"{duration_text(left)} left"] if self._of else []
        per_second = self._amount(rate)
        unit = "" if self._phase.unit == BYTES else f" {self._phase.unit}"
        figures += [f"{per_second}{unit}/s", elapsed]
        if self._phase.nbytes and self._of:
            throughput = rate * self._phase.nbytes / self._of
            figures.append(f"{throughput / 1e9:.2f} GB/s of {size_text(self._phase.nbytes)}")
        return figures

    def _rate(self, now: float) -> float:
        """Units a second; 0.0 while that is not known."""
        began, before = self._samples[0]
        return (self._done - before) / (now - began) if now > began else 0.0

    def _amount(self, number: float) -> str:
        return size_text(int(number)) if self._phase.unit == BYTES else f"{number:,.0f}"
