"""What a run did, in all its processes, and how long each of its stages was busy."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STAGES = ("boards", "forward", "copy", "write")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did. Times are in seconds.

    Attributes:
        output: the file; None if nothing was written.
        boards: how many boards went through the model.
        boards_by_rank: the same of each process, by its rank.
        resumed_boards: how many more were in the file from the run that was resumed.
        bytes_written: size of the file.
        seconds: wall time of the loop: reading, forward, copying and writing together.
        setup_seconds: wall time before the loop: loading, sampling, laying out the file.
        commit_seconds: wall time after it, until the file was durable under its name.
        stage_seconds: busy time of each stage, the mean of the processes. Stages overlap, so they
            may add up to more.
        waiting_seconds: how long the loop stood still for want of boards, the mean likewise.
        nonfinite: tensor name -> how many of its values are `nan` and `inf` as stored; only
            tensors with any, and only in the first process.
    """

    output: Path | None
    boards: int
    boards_by_rank: tuple[int, ...]
    resumed_boards: int
    bytes_written: int
    seconds: float
    setup_seconds: float
    commit_seconds: float
    stage_seconds: dict[str, float]
    waiting_seconds: float
    nonfinite: dict[str, dict[str, int]]

    @property
    def boards_per_second(self) -> float:
        """Boards through the loop a second."""
        return self.boards / self.seconds if self.seconds else 0.0

    @property
    def slowest_stage(self) -> str:
        """The stage that was busy longest, which the run cannot be faster than."""
        return max(self.stage_seconds, key=self.stage_seconds.__getitem__)

    @property
    def processes(self) -> int:
        """How many processes shared the run."""
        return len(self.boards_by_rank)

    @property
    def slowest_rank(self) -> int:
        """The process that did the fewest boards: each takes more of them when it has done some."""
        return self.boards_by_rank.index(min(self.boards_by_rank))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the figures derived from them, ready for JSON."""
        return {
            **asdict(self),
            "output": None if self.output is None else str(self.output),
            "boards_per_second": self.boards_per_second,
            "slowest_stage": self.slowest_stage,
            "processes": self.processes,
            "slowest_rank": self.slowest_rank,
        }
