"""Of several processes that fail together one says why, or their launcher does."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path

DIRECTORY = "DUMP_ACTIVATIONS_FAILURES"
"""Variable that names a directory where the launcher of this process looks for failures."""


@dataclass(frozen=True)
class Failure:
    """How a process ended.

    Attributes:
        code: its exit code; minus the number of the signal that it dies of.
        text: why.
        line: the same with all that a user should know.
    """

    code: int
    text: str
    line: str

    @property
    def notes(self) -> str:
        """What the line says beside the text."""
        return self.line.removeprefix(self.text).removeprefix("; ")


def is_to_say(failure: Failure) -> bool:
    """Whether this process is to print why it fails; one of its group is, or a launcher."""
    rank = os.environ.get("RANK")
    if rank is None:
        return True
    is_first = rank == "0"
    directory = os.environ.get(DIRECTORY)
    if directory is None:
        return is_first
    name = f"0-{'first' if is_first else 'later'}-{rank}"
    try:
        Path(directory, name).write_text(json.dumps(asdict(failure)))
    except OSError:  # The launcher is gone.
        return is_first
    return False


def read_failures(directory: Path) -> list[Failure]:
    """Read how the processes ended that were started last; the one that is to be said first."""
    found: dict[int, list[tuple[str, Failure]]] = {}
    for path in directory.iterdir():
        restarts, _, name = path.name.partition("-")
        with suppress(ValueError):  # It was killed as it wrote.
            failure = Failure(**json.loads(path.read_text()))
            found.setdefault(int(restarts), []).append((name, failure))
    return [failure for _, failure in sorted(found[max(found)], key=itemgetter(0))] if found else []
