"""Progress: the figures of a phase, a bar on terminals, lines in logs, and nothing twice."""

import io
import json
import re
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dump_activations import dump
from dump_activations import progress as display
from dump_activations.commands.console import print_line
from dump_activations.progress import (
    BYTES,
    Phase,
    begin,
    counted,
    reported_to,
    reporter,
    shown_progress,
)

CPU = {"device": "cpu", "allow_cpu": True}
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d progress: "


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose only element is the time of the monotonic clock."""
    times = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: times[0])
    return times


def test_figures_of_boards(clock):
    phase = Phase("", "boards", of=4000, nbytes=8 * 10**9)
    clock[0] = 103.0
    assert phase.text() == "0/4,000 boards"
    assert phase.figures() == ["3 s"]
    clock[0] = 110.0
    phase.advance(1000, 4000)
    assert phase.fraction == 0.25
    assert phase.text() == "1,000/4,000 boards"
    assert phase.figures() == ["10 s", "30 s left", "100 boards/s", "200 MB/s of 8.00 GB"]


def test_resumed_boards_count_as_done_and_not_in_the_rate(clock):
    phase = Phase("", "boards", start=3000, of=4000)
    clock[0] = 110.0
    phase.advance(3100, 4000)
    assert phase.figures() == ["10 s", "1 min 30 s left", "10 boards/s"]


def test_the_rate_is_of_the_last_half_minute(clock):
    phase, done = Phase("", "boards", of=10_000), 0
    for second in range(1, 101):
        clock[0] += 1
        done += 10 if second <= 60 else 1
        phase.advance(done, 10_000)
    assert phase.figures()[2] == "1 boards/s"


def test_figures_of_a_download(clock):
    phase = Phase("downloading hf://a/b", BYTES)
    clock[0] = 102.0
    phase.advance(1_500_000, 0)
    assert phase.fraction is None
    assert phase.text() == "downloading hf://a/b: 1.50 MB"
    clock[0] = 104.0
    phase.advance(3_000_000, 6_000_000)
    assert phase.text() == "downloading hf://a/b: 3.00 MB/6.00 MB"
    assert phase.figures() == ["4 s", "4 s left", "750 kB/s"]


class Log(io.StringIO):
    """A log that reports when it got a line."""

    def __init__(self):
        super().__init__()
        self.got_line = threading.Event()

    def flush(self):
        self.got_line.set()


@pytest.fixture
def log(monkeypatch):
    """Return a function that replaces stderr by a log. pytest sets stderr before each phase."""

    def replace(make=Log):
        log = make()
        monkeypatch.setattr(sys, "stderr", log)
        return log

    return replace


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(display, "_FIRST_LINE", 0.001)


def test_a_log_gets_a_line_with_the_time_for_each_phase(log, soon):
    log, threads = log(), {*threading.enumerate()}
    with shown_progress():
        begin("loading\x1b[2J")
        log.got_line.wait(30)
        while "loading" not in log.getvalue():
            log.got_line.wait(0.01)
        counted(Phase("", "boards", of=4000))(1000, 4000)
        while "boards" not in log.getvalue():
            log.got_line.wait(0.01)
    lines = log.getvalue().splitlines()
    assert re.fullmatch(STAMP + r"(starting|loading\\x1b\[2J), 0 s", lines[0])
    assert re.match(STAMP + r"(0|1,000)/4,000 boards, (0|25)%", lines[-1])
    assert {*threading.enumerate()} <= threads


def test_each_line_of_a_log_is_json_if_asked_for(log, soon):
    log = log()
    with shown_progress(as_json=True):
        begin("loading\x1b[2J")
        while "loading" not in log.getvalue():
            log.got_line.wait(0.01)
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert all(line.keys() == {"time", "progress"} for line in lines)
    assert lines[-1]["progress"].startswith("loading\x1b[2J, ")


def test_a_log_names_phases_of_ten_seconds_and_then_gets_a_line_a_minute(clock, monkeypatch):
    monkeypatch.setattr(display, "_FIRST_LINE", 10.0)
    clock[0] = 0.0
    reporter, shown = display.Reporter(), {}
    phases = {15: "short", 20: "long", 200: "short", 205: "short", 210: "short", 215: "last"}

    class Seconds:
        def wait(self, _timeout):
            clock[0] += 1
            if name := phases.get(clock[0]):
                reporter.phase = Phase(name)
            return clock[0] > 240

    for line in display._due_lines(reporter, Seconds()):
        shown[clock[0]] = line.partition(",")[0]
    assert shown == {
        **{10: "starting", 30: "long", 90: "long", 150: "long"},
        **{210: "short", 225: "last"},
    }


def test_a_short_run_prints_nothing_in_a_log(log, demo_checkpoint, demo_dataset, tmp_path):
    log = log()
    options = {"n_samples": 5, "progress": True, **CPU}
    dump(demo_checkpoint, demo_dataset, tmp_path / "a.pt", **options)
    assert log.getvalue() == ""


class NoTerminal:
    """A stderr that can write and nothing else."""

    def write(self, text):
        pass


def full_disk():
    return Path("/dev/full").open("w")


@pytest.mark.parametrize("make", [lambda: None, NoTerminal, io.StringIO, full_disk])
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_stderr_ends_a_run(make, ends, log, soon):
    stream = log(make)
    if ends and hasattr(stream, "close"):
        stream.close()
    with shown_progress():
        begin("loading")
        counted(Phase("", "boards", of=4))(1, 4)
        print_line("error", "a line")
        time.sleep(0.01)
    assert reporter() is None
    with suppress(AttributeError, OSError):
        stream.close()


def test_a_terminal_shows_each_phase(
    terminal, demo_checkpoint, demo_dataset, tmp_path, monkeypatch
):
    close, begun = terminal(), []

    class Noting(display.Reporter):
        def __setattr__(self, name, phase):
            begun.append(phase.name or phase.unit)
            super().__setattr__(name, phase)

    monkeypatch.setattr(display, "Reporter", Noting)
    options = {"n_samples": 50, "where": "max_rank >= 5", **CPU}
    dump(demo_checkpoint, demo_dataset, tmp_path / "a.pt", **options, progress=True)
    with reported_to(display.Reporter()):
        dump(demo_checkpoint, demo_dataset, tmp_path / "b.pt", **options, progress=True)
    assert begun[: begun.index("starting", 1)] == [
        "starting",
        "opening the dataset",
        "loading the checkpoint",
        "choosing the steps",
        "scanning the dataset",
        "preparing the output",
        "boards",
        "completing the output",
    ]
    assert "\x1b[2K" in close()


def test_a_terminal_may_close_under_a_bar(terminal):
    terminal()
    with shown_progress():
        begin("loading")
        display.live_console().file._stream.close()
        begin("running")


def test_a_piped_stdout_gets_what_is_printed_under_a_bar(terminal, monkeypatch):
    out, close = io.StringIO(), terminal()
    monkeypatch.setattr(sys, "stdout", out)
    with shown_progress():
        print("result")
    assert out.getvalue() == "result\n"
    assert "result" not in close()


class Latin:
    encoding = "latin-1"


@pytest.mark.parametrize("name", ["", "x\ny\x1b[2J", "盤面" * 5], ids=["plain", "control", "wide"])
@pytest.mark.parametrize("stream", [None, Latin()], ids=["utf-8", "latin-1"])
@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200])
def test_a_bar_takes_one_line_of_any_width(width, stream, name):
    phase = Phase(name, "boards", of=4_000_000, nbytes=10**12)
    phase.advance(1_000_000, 4_000_000)
    line = display._bar_line(phase, width, stream)
    words = re.match(".*1,000,000/4,000,000 boards", line.plain)[0]
    assert line.no_wrap
    assert line.cell_len < width or line.plain.startswith(words)
    assert line.plain.isprintable()
    assert line.plain.encode("latin-1" if stream else "utf-8")
    if not name:
        assert line.cell_len <= max(width - 1, len(words))
        assert ("/s of 1.00 TB" in line.plain) == (width >= 100)
        assert ("=" if stream else "━") in line.plain or width < 100


def test_progress_is_shown_once_and_given_to_a_callback_too(log, demo_checkpoint, demo_dataset):
    log()
    calls = []
    options = {"write": False, "n_samples": 5, "batch_size": 2, **CPU}
    with shown_progress():
        outer = reporter()
        with shown_progress():
            assert reporter() is outer
        dump(demo_checkpoint, demo_dataset, **options, progress=lambda *at: calls.append(at))
        assert reporter() is outer
    assert reporter() is None
    assert calls == [(2, 5), (4, 5), (5, 5)]
