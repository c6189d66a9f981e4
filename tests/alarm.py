"""Ctrl-C, shortly after it is asked for."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def interrupted_soon() -> Iterator[None]:
    """Expect that the block is interrupted by SIGINT."""
    main = threading.main_thread().ident
    timer = threading.Timer(0.01, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    try:
        yield
    except KeyboardInterrupt:
        return
    finally:
        timer.join()
    pytest.fail("the block was not interrupted")
