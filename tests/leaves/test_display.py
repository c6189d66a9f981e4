"""Where progress is shown and how: bars on terminals, lines elsewhere, nothing twice."""

import io
import os
import pty
import re
import sys
import threading
from contextlib import suppress

import pytest

from dump_activations import dump
from dump_activations import progress as display
from dump_activations.errors import InvalidArgumentError
from dump_activations.progress import Phase, begin, counted, reporter, shown_progress

CPU = {"device": "cpu", "allow_cpu": True}


class Log(io.StringIO):
    """A stream without a terminal that says when it got a line."""

    def __init__(self):
        super().__init__()
        self.got_one = threading.Event()

    def flush(self):
        self.got_one.set()


@pytest.fixture
def logged(monkeypatch):
    """Return what makes a log of stderr, in the test itself: pytest sets it anew before each."""

    def begin():
        log = Log()
        monkeypatch.setattr(sys, "stderr", log)
        return log

    return begin


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(display, "_FIRST_LINE", 0.001)


@pytest.fixture
def terminal(monkeypatch):
    """Return what makes a terminal of stderr, of 80 columns, and returns what it was sent."""
    primary, secondary = pty.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    shown = bytearray()

    def read():  # what nobody reads blocks who writes
        with suppress(OSError):  # how Linux reports that the other end is closed
            while data := os.read(primary, 1 << 16):
                shown.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(secondary, "w") as file:

        def begin():
            monkeypatch.setattr(sys, "stderr", file)
            return shown

        yield begin
    reader.join()
    os.close(primary)


def test_a_log_gets_a_line_of_what_is_being_done(logged, soon):
    log = logged()
    with shown_progress():
        begin("loading the checkpoint")
        log.got_one.wait(30)
        log.got_one.clear()
        counted(Phase("", "boards", of=4000))(1000, 4000)
        while "boards" not in log.getvalue():
            log.got_one.wait(30)
    lines = log.getvalue().splitlines()
    assert re.fullmatch(r"progress: (starting|loading the checkpoint), 0 s", lines[0])
    assert re.match(r"progress: (0|1,000)/4,000 boards, (0|25)%", lines[-1])
    assert threading.active_count() == 1


def test_lines_come_at_growing_intervals(logged, monkeypatch):
    log, pauses = logged(), []

    class Ended(threading.Event):
        def wait(self, pause):
            pauses.append(pause)
            return len(pauses) == 9

    monkeypatch.setattr(display, "_FIRST_LINE", 10.0)
    lines = display._Lines(log)
    lines._ended = Ended()
    lines.run()
    assert pauses == [10, 20, 40, 80, 160, 320, 600, 600, 600]
    assert len(log.getvalue().splitlines()) == 8


def test_a_short_run_says_nothing_in_a_log(logged, demo_checkpoint, demo_dataset, tmp_path):
    log = logged()
    options = {"n_samples": 5, "progress": True, **CPU}
    dump(demo_checkpoint, demo_dataset, tmp_path / "a.pt", **options)
    assert log.getvalue() == ""


def test_a_log_that_is_closed_ends_no_run(logged, soon):
    log = logged()
    with shown_progress():
        log.close()
        begin("going on")
    assert reporter() is None


def test_a_terminal_is_shown_each_phase(terminal, demo_checkpoint, demo_dataset, tmp_path):
    shown, begun = terminal(), []
    begin_of = display._Bar.begin

    class Bar(display._Bar):
        def begin(self, phase):
            begun.append(phase.name or phase.unit)
            begin_of(self, phase)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(display, "_Bar", Bar)
        options = {"n_samples": 50, "where": "max_rank >= 5", **CPU}
        dump(demo_checkpoint, demo_dataset, tmp_path / "a.pt", **options, progress=True)
        dump(demo_checkpoint, demo_dataset, tmp_path / "b.pt", **options)
    assert begun == [
        "opening the dataset",
        "loading the checkpoint",
        "choosing the steps",
        "scanning the dataset",
        "preparing the file",
        "boards",
        "completing the file",
    ]
    assert b"\x1b[2K" in shown


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200])
def test_a_bar_takes_one_line_of_any_width(width):
    bar = display._Bar()
    bar.begin(Phase("", "boards", of=4_000_000, nbytes=10**12))
    bar.advance(1_000_000, 4_000_000)
    line = bar.line(width).plain
    assert len(line) <= max(width - 1, len("1,000,000/4,000,000 boards"))
    assert line.startswith("1,000,000/4,000,000 boards")
    assert ("/s of 1.00 TB" in line) == (width >= 100)
    assert "━" in line or width < 100


def test_nobody_is_told_twice(logged):
    logged()
    with shown_progress():
        outer = reporter()
        with shown_progress():
            assert reporter() is outer
        assert reporter() is outer
    assert reporter() is None


def test_a_callback_is_called_beside_what_is_shown(logged, demo_checkpoint, demo_dataset):
    logged()
    calls = []
    with shown_progress():
        dump(
            demo_checkpoint,
            demo_dataset,
            write=False,
            n_samples=5,
            batch_size=2,
            progress=lambda *at: calls.append(at),
            **CPU,
        )
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_progress_is_a_bar_or_a_callback(demo_checkpoint, demo_dataset):
    with pytest.raises(InvalidArgumentError, match="progress: 3 is neither True"):
        dump(demo_checkpoint, demo_dataset, progress=3)


def test_no_terminal_and_no_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with shown_progress():
        begin("nothing")
