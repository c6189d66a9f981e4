"""Whether all processes of a group were started for the same work."""

import hashlib
from collections.abc import Mapping

from dump_activations.errors import GroupError
from dump_activations.pipeline.group import BITS, Group
from dump_activations.storage.writing.work import names_of

_COUNT = "work"


def check_same_work(group: Group, work: Mapping[str, str]) -> None:
    """Compare all that determines the file's bytes with what the first process has.

    That one waits for all: it makes no file before.

    Args:
        group: the processes.
        work: name -> text.

    Raises:
        GroupError: names what differs.
    """
    hashes = {name: _hash(text) for name, text in work.items()}
    if group.place.rank == 0:
        for name, number in hashes.items():
            group.say(f"{_COUNT}/{name}", number)
        group.say(_COUNT, len(work))
        for rank in group.others:
            group.hear(f"same/{rank}", rank)
        return
    count = group.hear(_COUNT, 0)
    differing = [
        name for name, number in hashes.items() if group.heard(f"{_COUNT}/{name}") != number
    ]
    if differing or count != len(work):
        names = names_of(differing) if differing else "options that only that one has"
        raise GroupError(f"rank {group.place.rank} differs from rank 0 in {names}")
    group.say(f"same/{group.place.rank}", 1)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> (64 - BITS)
