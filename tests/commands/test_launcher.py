"""`--nproc-per-node`: processes share a dump, end together, and never outlive their launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults.commands import HANG

TWO = [sys.executable, "-m", "dump_activations", "--demo", "--nproc-per-node=2"]


@pytest.fixture
def endless(tmp_path):
    """Start two processes with hours of work; return the launcher and their process ids.

    Both are loading torch: Python itself ends in other ways where a signal meets its own start.
    """
    call = [*TWO, "--n-samples=100000000", "--batch-size=64", "--no-write"]
    launcher = subprocess.Popen(call, stdout=-1, stderr=-1, text=True, cwd=tmp_path)
    listing = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    while len(children := listing.read_text().split()) < 2:
        assert launcher.poll() is None
        time.sleep(0.01)
    while any("libtorch_cpu" not in Path(f"/proc/{child}/maps").read_text() for child in children):
        time.sleep(0.01)
    return launcher, [*map(int, children)]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda each: each.name
)
def test_processes_end_with_their_launcher(number, endless):
    launcher, _ = endless
    launcher.send_signal(number)
    _, shown = launcher.communicate(timeout=HANG)  # Both streams end with the last process.
    assert launcher.returncode == -number
    assert "was ended by signal" not in shown


def test_the_first_error_ends_the_other_process_and_is_the_launchers(endless):
    launcher, children = endless
    os.kill(children[1], signal.SIGKILL)
    _, shown = launcher.communicate(timeout=HANG)
    assert launcher.returncode == -signal.SIGKILL
    assert "error: process 1 was ended by signal 9\n" in shown
    assert not any(Path(f"/proc/{child}").exists() for child in children)
