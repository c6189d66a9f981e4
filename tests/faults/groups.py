"""Runs a command as the processes of a torchrun group, without torchrun: forked, and signalled."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from faults.commands import HANG, Command, CommandServer


@dataclass(frozen=True)
class Group:
    """Commands that share a run.

    Attributes:
        commands: by rank.
    """

    commands: list[Command]

    def wait(self, seconds: float = HANG) -> list[int]:
        """Return their exit codes, by rank."""
        end = time.monotonic() + seconds
        return [command.wait(max(end - time.monotonic(), 1)) for command in self.commands]

    def signal(self, number: signal.Signals) -> None:
        """Signal all of them, as their launcher does; none may have been waited for."""
        for command in self.commands:
            command.signal(number)

    @property
    def lines(self) -> list[str]:
        """All that they printed but notes."""
        return [
            line
            for command in self.commands
            for line in command.lines
            if not line.startswith("note: ")
        ]


class Launcher:
    """Starts groups one after another, which all find the same store, as those of a launcher do."""

    def __init__(self, server: CommandServer, logs: Path) -> None:
        self._server = server
        self._logs = logs
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(
        self,
        arguments: Sequence[str],
        *,
        size: int,
        of_rank: Mapping[int, Sequence[str]] | None = None,
        order: Sequence[int] | None = None,
        restarts: Sequence[int] | None = None,
        **options: Any,
    ) -> Group:
        """Start a group of so many processes.

        Args:
            arguments: the command's.
            size: how many processes.
            of_rank: arguments that only one of them has.
            order: in which they are started; by default that of the ranks.
            restarts: how often each was started before.
            options: for `CommandServer.start`.
        """
        self._logs.mkdir(exist_ok=True)
        commands = {}
        for rank in order or range(size):
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": "1",  # or the cores would be shared out
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": str(restarts[rank] if restarts else 0),
            }
            commands[rank] = self._server.start(
                [*arguments, *(of_rank or {}).get(rank, ())],
                self._logs / str(rank),
                environment=environment,
                **options,
            )
        return Group([commands[rank] for rank in range(size)])
