"""Kills and interrupts a dump of the demo, then resumes it: byte for byte the unbroken run's file.

All of it, 20 moments a format and signal, by one command:

    uv run --locked pytest tests/api/test_faults_kills.py --faults 20
"""

import hashlib
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from faults.commands import HANG, Command, CommandServer
from reference.dumps import FORMATS

# Seconds in which an interrupted command must end; a batch takes milliseconds.
PROMPTLY = 10

# 31 MB in 188 batches: about half a second, with five journal entries.
LONG = ["--demo", "--n-samples=1500", "--batch-size=8", "--outputs=layer_outputs,final_hidden"]
SYNC_INTERVAL = 0.1

# Four batches and whole tensors: few system calls.
SHORT = ["--demo", "--n-samples=10", "--batch-size=3", "--outputs=pooled,rmsnorm_gammas"]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Unbroken:
    """The result of an undisturbed run."""

    sha256: str
    seconds: float


class Runs:
    """Starts runs, and knows what they come to when nothing disturbs them."""

    def __init__(self, server: CommandServer, directory: Path) -> None:
        self.server = server
        self._directory = directory
        self._known: dict[tuple[str, ...], Unbroken] = {}

    def start(self, arguments: list[str], log: Path) -> Command:
        return self.server.start(arguments, log, sync_interval=SYNC_INTERVAL)

    def unbroken(self, arguments: list[str], suffix: str) -> Unbroken:
        key = (*arguments, suffix)
        if key not in self._known:
            target = self._directory / f"a{suffix}"
            started = time.monotonic()
            command = self.start([*arguments, f"-o{target}"], self._directory / "log")
            assert command.wait() == 0, command.lines
            self._known[key] = Unbroken(sha256(target), time.monotonic() - started)
            target.unlink()
        return self._known[key]


@pytest.fixture(scope="module")
def runs(server, tmp_path_factory):
    return Runs(server, tmp_path_factory.mktemp("unbroken"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Spread the moments evenly over a run, each sampled from its own range of it."""
    if "moment" in metafunc.fixturenames:
        count = metafunc.config.getoption("--faults")
        chance = random.Random(metafunc.function.__name__)
        moments = [(i + chance.random()) / count for i in range(count)]
        metafunc.parametrize("moment", moments, ids="{:.3f}".format)


def is_whole(directory: Path, target: Path, expected: str) -> None:
    assert sorted(path.name for path in directory.iterdir()) == sorted(["log", target.name])
    assert sha256(target) == expected


@pytest.mark.parametrize("suffix", FORMATS)
def test_killed(suffix, moment, runs, tmp_path):
    """Killed anywhere from before the first batch to the commit; some are killed once more."""
    expected = runs.unbroken(LONG, suffix)
    chance = random.Random(f"{suffix} {moment}")
    target = tmp_path / f"a{suffix}"
    arguments = [*LONG, f"-o{target}"]
    command = runs.start(arguments, tmp_path / "log")
    time.sleep(moment * expected.seconds)
    command.signal(signal.SIGKILL)
    assert command.wait() in {-signal.SIGKILL, 0}
    if chance.random() < 1 / 3:
        command = runs.start(arguments, tmp_path / "log")
        time.sleep(chance.uniform(0, 1 - moment) * expected.seconds)
        command.signal(signal.SIGKILL)
        command.wait()
    assert not target.exists() or sha256(target) == expected.sha256
    command = runs.start(arguments, tmp_path / "log")
    assert command.wait() == 0, command.lines
    is_whole(tmp_path, target, expected.sha256)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("suffix", FORMATS)
def test_interrupted(suffix, number, moment, runs, tmp_path):
    expected = runs.unbroken(LONG, suffix)
    target = tmp_path / f"a{suffix}"
    target.write_bytes(b"old")
    arguments = [*LONG, "--overwrite", f"-o{target}"]
    command = runs.start(arguments, tmp_path / "log")
    command.wait_until(command.log.exists)
    time.sleep(0.02 + moment * expected.seconds)
    command.signal(number)
    code = command.wait(PROMPTLY)
    assert code in {0, -number}
    # An interruption of the commit itself counts only once the file is there.
    if target.read_bytes() == b"old":
        assert code == -number
        is_resumable(command, target)
        command = runs.start(arguments, tmp_path / "log")
        assert command.wait() == 0, command.lines
    is_whole(tmp_path, target, expected.sha256)


def error_line(lines: list[str]) -> str:
    """Return the one line that a command printed but notes."""
    told = [line for line in lines if not line.startswith("note: ")]
    assert len(told) == 1, "\n".join(lines)
    return told[0]


def is_resumable(command: Command, target: Path) -> None:
    """Check what an interrupted command said and left; progress, where there is any, is kept."""
    line = error_line(command.lines)
    assert "interrupted" in line
    left = {path.name for path in target.parent.iterdir()} - {"log", target.name}
    if left:
        assert left == {f"{target.name}.partial", f"{target.name}.partial.journal"}
        assert str(target) in line
        assert "the same call again does the rest" in line


def catches(process: int, number: signal.Signals) -> bool:
    """Return True where a process handles a signal itself."""
    status = Path(f"/proc/{process}/status").read_text()
    caught = re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def test_interrupted_while_it_starts(moment, tmp_path):
    """A command that is still importing ends as quietly, without a first batch."""
    chance = random.Random(moment)
    with (tmp_path / "log").open("w") as log:
        command = subprocess.Popen(
            [sys.executable, "-m", "dump_activations", *LONG, "-oa.pt"],
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        )
        while not catches(command.pid, signal.SIGTERM):
            time.sleep(0.01)
        time.sleep(2 * moment)
        number = chance.choice([signal.SIGINT, signal.SIGTERM])
        command.send_signal(number)
        code = command.wait(HANG)
    # A slow machine is told how far the import is.
    lines = [
        line for line in (tmp_path / "log").read_text().splitlines() if " progress: " not in line
    ]
    assert code == -number, lines
    line = error_line(lines)
    assert "interrupted" in line
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize("suffix", FORMATS)
def test_killed_in_a_system_call(suffix, server, runs, tmp_path, request):
    """Killed before a call that changes a file, from making it to removing its journal.

    Before every one of them in the full suite, else before every fifth.
    """
    expected = runs.unbroken(SHORT, suffix)
    step = max(5 // request.config.getoption("--faults"), 1)
    call = 1
    while True:
        directory = tmp_path / str(call)
        directory.mkdir()
        target = directory / f"a{suffix}"
        arguments = [*SHORT, f"-o{target}"]
        code, lines = server.run(
            arguments,
            directory / "log",
            environment={"FAULT": f"any:{call}:kill:{directory}/"},
            sync_interval=0,
        )
        if code == 0:
            break
        assert code == -signal.SIGKILL, lines
        assert not target.exists() or sha256(target) == expected.sha256
        code, lines = server.run(arguments, directory / "log")
        assert code == 0, lines
        is_whole(directory, target, expected.sha256)
        call += step
    is_whole(directory, target, expected.sha256)
    assert call > 20
