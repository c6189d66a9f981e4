"""Of several processes that fail together one says why, or their launcher does."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path

from dump_activations.place import Place

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
    place = Place.of_process()
    if place is None:
        return True
    is_first = _fails_first(failure, place)
    directory = os.environ.get(DIRECTORY)
    if directory is None:
        return is_first
    name = f"{place.restarts}-{'first' if is_first else 'later'}-{place.rank}"
    try:
        Path(directory, name).write_text(json.dumps(asdict(failure)))
    except OSError:  # The launcher is gone.
        return is_first
    return False


def _fails_first(failure: Failure, place: Place) -> bool:
    """Whether this process fails before any other, or is to say so where it cannot know."""
    # Who is interrupted does not wait for torch, whose import can be what was interrupted.
    if failure.code > 0 or "dump_activations.pipeline.group" in sys.modules:
        with suppress(ImportError):  # It is why the process fails.
            from dump_activations.pipeline.group import fails_first

            return fails_first(waits=failure.code > 0)
    return place.local_rank == 0


def read_failures(directory: Path) -> list[Failure]:
    """Read how the processes ended that were started last; the one that is to be said first."""
    found: dict[int, list[tuple[str, Failure]]] = {}
    for path in directory.iterdir():
        restarts, _, name = path.name.partition("-")
        with suppress(ValueError):  # It was killed as it wrote.
            failure = Failure(**json.loads(path.read_text()))
            found.setdefault(int(restarts), []).append((name, failure))
    return [failure for _, failure in sorted(found[max(found)], key=itemgetter(0))] if found else []
