"""Terminals for tests: a stream that is one, and all that it was sent."""

import os
import pty
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import pytest


@contextmanager
def open_terminal() -> Iterator[tuple[TextIO, Callable[[], str]]]:
    """Yield a terminal, and a function that closes it and returns all that it was sent."""
    primary, secondary = pty.openpty()
    sent = bytearray()

    def read() -> None:  # A terminal that nobody reads blocks its writer.
        with suppress(OSError):  # Linux reports so that the other end is closed.
            while data := os.read(primary, 1 << 16):
                sent.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(secondary, "w", encoding="utf-8") as file:

        def close() -> str:
            file.close()
            reader.join()
            return sent.decode()

        yield file, close
    reader.join()
    os.close(primary)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Callable[[], str]]]:
    """Return a function that makes a stream a terminal of 80 columns, and returns its `close`.

    pytest replaces the streams before each phase of a test.
    """
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with open_terminal() as (file, close):

        def replace(stream: str = "stderr") -> Callable[[], str]:
            monkeypatch.setattr(sys, stream, file)
            return close

        yield replace
