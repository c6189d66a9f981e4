"""A signal whose handler raises, shortly after it is set."""

import contextlib
import signal
from collections.abc import Iterator

import pytest


class AlarmError(Exception):
    """Raised by the handler."""


@contextlib.contextmanager
def interrupted_soon() -> Iterator[None]:
    """Expect that the block is interrupted by the alarm."""

    def stop(*_: object) -> None:
        raise AlarmError

    previous = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        yield
    except AlarmError:
        return
    else:
        pytest.fail("the block was not interrupted")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
