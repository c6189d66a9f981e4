"""Kills and interrupts a dump of the demo, then resumes it: byte for byte the unbroken run's file.

All of it, 20 moments a format and signal, by one command:

    uv run --locked pytest tests/api/test_faults_kills.py --faults 20
"""

import hashlib
import random
import signal
import time
from pathlib import Path

import pytest

from faults.commands import Command, CommandServer
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


class Runs:
    """Starts runs, and knows what they come to when nothing disturbs them."""

    def __init__(self, server: CommandServer, directory: Path) -> None:
        self.server = server
        self._directory = directory
        self._known: dict[tuple[str, ...], tuple[str, float]] = {}

    def start(self, arguments: list[str], log: Path) -> Command:
        return self.server.start(arguments, log, sync_interval=SYNC_INTERVAL)

    def unbroken(self, arguments: list[str], suffix: str) -> tuple[str, float]:
        """Return the digest of an undisturbed run's file, and the seconds that the run took."""
        key = (*arguments, suffix)
        if key not in self._known:
            target = self._directory / f"a{suffix}"
            started = time.monotonic()
            command = self.start([*arguments, f"-o{target}"], self._directory / "log")
            assert command.wait() == 0, command.lines
            self._known[key] = sha256(target), time.monotonic() - started
            target.unlink()
        return self._known[key]


@pytest.fixture(scope="module")
def runs(server, tmp_path_factory):
    return Runs(server, tmp_path_factory.mktemp("unbroken"))


def is_whole(directory: Path, target: Path, expected: str) -> None:
    assert sorted(path.name for path in directory.iterdir()) == sorted(["log", target.name])
    assert sha256(target) == expected


@pytest.mark.parametrize("suffix", FORMATS)
def test_killed(suffix, moment_of_run, runs, tmp_path):
    """Killed anywhere from before the first batch to the commit; some are killed once more."""
    expected, seconds = runs.unbroken(LONG, suffix)
    chance = random.Random(f"{suffix} {moment_of_run}")
    target = tmp_path / f"a{suffix}"
    arguments = [*LONG, f"-o{target}"]
    command = runs.start(arguments, tmp_path / "log")
    time.sleep(moment_of_run * seconds)
    command.signal(signal.SIGKILL)
    assert command.wait() in {-signal.SIGKILL, 0}
    if chance.random() < 1 / 3:
        command = runs.start(arguments, tmp_path / "log")
        time.sleep(chance.uniform(0, 1 - moment_of_run) * seconds)
        command.signal(signal.SIGKILL)
        command.wait()
    assert not target.exists() or sha256(target) == expected
    command = runs.start(arguments, tmp_path / "log")
    assert command.wait() == 0, command.lines
    is_whole(tmp_path, target, expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
@pytest.mark.parametrize("suffix", FORMATS)
def test_interrupted(suffix, number, moment_of_run, runs, tmp_path):
    expected, seconds = runs.unbroken(LONG, suffix)
    target = tmp_path / f"a{suffix}"
    target.write_bytes(b"old")
    arguments = [*LONG, "--overwrite", f"-o{target}"]
    command = runs.start(arguments, tmp_path / "log")
    command.wait_until(command.log.exists)
    time.sleep(0.02 + moment_of_run * seconds)
    command.signal(number)
    code = command.wait(PROMPTLY)
    assert code in {0, -number}
    # An interruption of the commit itself counts only once the file is there.
    if target.read_bytes() == b"old":
        assert code == -number
        is_resumable(command, target)
        command = runs.start(arguments, tmp_path / "log")
        assert command.wait() == 0, command.lines
    is_whole(tmp_path, target, expected)


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


@pytest.mark.parametrize("suffix", FORMATS)
def test_killed_in_a_system_call(suffix, server, runs, tmp_path, request):
    """Killed before a call that changes a file, from making it to removing its journal.

    Before every one of them in the full suite, else before every fifth.
    """
    expected, _ = runs.unbroken(SHORT, suffix)
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
        assert not target.exists() or sha256(target) == expected
        code, lines = server.run(arguments, directory / "log")
        assert code == 0, lines
        is_whole(directory, target, expected)
        call += step
    is_whole(directory, target, expected)
    assert call > 20
