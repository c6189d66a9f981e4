"""A process's place among those that torchrun started."""

import os
from dataclasses import dataclass
from typing import Self

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_STORE_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Where a process stands; by default alone.

    Attributes:
        rank: its number; the process of number 0 makes the file, and speaks for all.
        size: how many processes there are.
        local_rank, local_size: the same on its machine.
        restarts: how often the processes of its machine were started again after a failure.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0

    @classmethod
    def of_process(cls) -> Self | None:
        """Return the place that torchrun gave this process; None if it did not start it."""
        if not all(os.environ.get(name) for name in (*_VARIABLES, *_STORE_VARIABLES)):
            return None
        rank, size, local_rank, local_size = (int(os.environ[name]) for name in _VARIABLES)
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        return cls(rank, size, local_rank, local_size, restarts)

    @classmethod
    def here(cls) -> Self:
        """Return the same, or where a process stands that is alone."""
        return cls.of_process() or cls()

    @property
    def cores(self) -> int:
        """Its share of the cores that its machine gives to it and its neighbours."""
        return max(len(os.sched_getaffinity(0)) // self.local_size, 1)
