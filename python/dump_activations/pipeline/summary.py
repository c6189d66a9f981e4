"""The facts of a finished run, and how long each of its stages was busy."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dump_activations.text import size_text

STAGES = ("boards", "forward", "copy", "write")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The work that this process did in a run. Times are in seconds.

    Attributes:
        output: the file, or the name of its shards; None if nothing was written.
        boards: boards that went through the model.
        resumed_boards: boards that were already on disk from earlier runs.
        bytes_written: size of the finished files of the output.
        shards_written: shards that this process wrote; 0 for one file.
        shards_found: shards that were complete or that others wrote meanwhile; 0 for one file.
        seconds: wall time of the loop: reading, forward, copying and writing together.
        setup_seconds: wall time before the loop: loading, sampling, compiling, the first batch.
        commit_seconds: wall time until finished files were durable under their names.
        stage_seconds: busy time of each stage. Stages overlap, so they may add up to more.
        waiting_seconds: how long the loop waited for boards.
        nonfinite: tensor name -> number of its values stored as `nan` and as `inf`; only tensors
            with any.
    """

    output: Path | None = None
    boards: int = 0
    resumed_boards: int = 0
    bytes_written: int = 0
    shards_written: int = 0
    shards_found: int = 0
    seconds: float = 0.0
    setup_seconds: float = 0.0
    commit_seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    waiting_seconds: float = 0.0
    nonfinite: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def boards_per_second(self) -> float:
        """Boards per second of the loop."""
        return self.boards / self.seconds if self.seconds else 0.0

    @property
    def slowest_stage(self) -> str:
        """The stage that was busy longest, which bounds the run's speed."""
        return max(self.stage_seconds, key=self.stage_seconds.__getitem__)

    @property
    def total_seconds(self) -> float:
        """Wall time of the whole call."""
        return self.setup_seconds + self.seconds + self.commit_seconds

    def __str__(self) -> str:
        """Return work, place, size and speed in one line, as the command shows them."""
        resumed = f" (and {self.resumed_boards:,} resumed)" if self.resumed_boards else ""
        shards = f", {self.shards_written:,} shards of it" if self.shards_written else ""
        where = (
            f"{size_text(self.bytes_written)} in {self.output}{shards}"
            if self.output
            else "nothing written"
        )
        speed = f", {self.boards_per_second:,.0f} boards/s in the loop" if self.boards else ""
        return f"{self.boards:,} boards{resumed}: {where}; {self.total_seconds:.1f} s{speed}"

    def stage_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return the headings and the rows of a table of the stages."""
        stages = {"setup": self.setup_seconds, **self.stage_seconds}
        stages |= {"waiting for boards": self.waiting_seconds, "whole loop": self.seconds}
        rows: list[tuple[str, ...]] = []
        for stage, seconds in {**stages, "commit": self.commit_seconds}.items():
            slowest = " (slowest)" if self.boards and stage == self.slowest_stage else ""
            share = f"{seconds / self.total_seconds:.0%}" if self.total_seconds else "-"
            # A time that rounds to zero gives no rate.
            rate = f"{self.boards / seconds:,.0f}" if seconds >= 0.0005 else "-"
            rows.append((f"{stage}{slowest}", f"{seconds:.3f}", share, rate))
        return ("stage", "seconds", "share", "boards/s"), rows

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the figures derived from them, ready for JSON."""
        return {
            **asdict(self),
            "output": None if self.output is None else str(self.output),
            "boards_per_second": self.boards_per_second,
            "total_seconds": self.total_seconds,
            "slowest_stage": self.slowest_stage,
        }
