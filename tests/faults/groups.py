"""Runs a command as several processes, as a launcher does, but forked and signalled by the test."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.commands import HANG, Command, CommandServer


@dataclass(frozen=True)
class Group:
    """Processes of one command, by rank."""

    commands: list[Command]

    def wait(self, seconds: float = HANG) -> list[int]:
        """Return their exit codes."""
        end = time.monotonic() + seconds
        return [command.wait(max(end - time.monotonic(), 1)) for command in self.commands]

    @property
    def lines(self) -> list[str]:
        """All that they printed but notes."""
        return [line for command in self.commands for line in without_notes(command.lines)]


def without_notes(lines: Sequence[str]) -> list[str]:
    """Return the lines that are neither notes nor progress; an error in JSON as the other ones."""
    left = []
    for line in lines:
        content = json.loads(line) if line.startswith("{") else {}
        if "error" in content:
            left.append(f"error: {content['error']}")
        elif not (line.startswith("note: ") or {"note", "progress"} & content.keys()):
            left.append(line)
    return left


def place(rank: int, size: int) -> dict[str, str]:
    """Return the variables that a launcher sets."""
    values = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank}
    # Each process has all cores: the number of threads may change the bytes.
    return {name: str(value) for name, value in values.items()} | {"LOCAL_WORLD_SIZE": "1"}


def start_group(
    server: CommandServer,
    arguments: Sequence[str],
    logs: Path,
    *,
    size: int,
    of_rank: Mapping[int, Mapping[str, str]] | None = None,
    **options: Any,
) -> Group:
    """Start processes of a command.

    Args:
        server: what starts them.
        arguments: the command's.
        logs: directory of their logs.
        size: how many processes.
        of_rank: variables that only one of them has.
        options: for `CommandServer.start`.
    """
    logs.mkdir(exist_ok=True)
    commands = {}
    for rank in reversed(range(size)):
        environment = place(rank, size) | dict((of_rank or {}).get(rank, {}))
        commands[rank] = server.start(
            arguments, logs / str(rank), environment=environment, **options
        )
    return Group([commands[rank] for rank in range(size)])
