"""Runs the package's commands as processes that can be signalled, limited and failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Seconds after which a command is taken to hang.
HANG = 60


class CommandServer:
    """Starts commands; use as a context manager.

    Args:
        preload: a library that every command is started with.
    """

    def __init__(self, preload: Path | None = None) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
        if preload:
            environment["LD_PRELOAD"] = str(preload)
        self._server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def start(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        command: str = "dump-activations",
        environment: dict[str, str] | None = None,
        limits: dict[str, int] | None = None,
        sync_interval: float | None = None,
        first_note: float | None = None,
        cores: int | None = None,
    ) -> Command:
        """Start a command.

        Args:
            arguments: those after its name.
            log: where all that it prints goes; made when the command itself begins.
            command: its name.
            environment: variables set in addition to this process's.
            limits: resource limits by their names in `resource`; RLIMIT_DATA beyond what the server
                holds already.
            sync_interval: seconds between flushes of the output, in place of the command's own.
            first_note: seconds of waiting for other processes before the first note.
            cores: number of cores that it may use.
        """
        log.unlink(missing_ok=True)
        pid = self.ask(
            command=command,
            arguments=list(arguments),
            log=str(log),
            environment=environment or {},
            limits=limits or {},
            sync_interval=sync_interval,
            first_note=first_note,
            cores=cores,
        )
        return Command(self, pid, log)

    def run(self, arguments: Sequence[str], log: Path, **options: Any) -> tuple[int, list[str]]:
        """Run a command to its end; return its exit code and the lines it printed."""
        command = self.start(arguments, log, **options)
        return command.wait(), command.lines

    def ask(self, **request: Any) -> Any:
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


@dataclass(frozen=True)
class Command:
    """A running command."""

    server: CommandServer
    pid: int
    log: Path

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = HANG) -> int:
        """Return its exit code; minus the number of the signal that killed it."""
        end = time.monotonic() + seconds
        while (code := self.server.ask(poll=self.pid)) is None:
            if time.monotonic() > end:
                self.signal(signal.SIGUSR1)  # prints where each thread is
                time.sleep(0.5)
                self.signal(signal.SIGKILL)
                while self.server.ask(poll=self.pid) is None:
                    time.sleep(0.01)
                text = "\n".join(self.lines)
                raise AssertionError(f"still running after {seconds} seconds:\n{text}")
            time.sleep(0.002)
        assert isinstance(code, int)
        return code

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Poll until `condition()` holds, or the time after which a command is taken to hang."""
        end = time.monotonic() + HANG
        while not condition():
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.001)

    @property
    def lines(self) -> list[str]:
        """The output, without the progress lines that only a slow machine prints."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if " progress: " not in line]
