"""A terminal that a test can put in the place of stdout or stderr."""

import sys

import pytest

from terminals import open_terminal


@pytest.fixture
def terminal(monkeypatch):
    """Return a function that makes a stream a terminal, and returns a function that reads it.

    pytest replaces the streams before each phase of a test.
    """
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with open_terminal() as (file, close):

        def replace(stream="stderr"):
            monkeypatch.setattr(sys, stream, file)
            return close

        yield replace
