"""The forward passes of a run, with boards read ahead and each stage's time counted."""

import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from dump_activations.feed import BoardBatch, feed_boards
from dump_activations.forward import Forward
from dump_activations.parts import Part
from dump_activations.timing import Stopwatch
from dump_activations.transfer import HostBatch, make_transfer
from dump_activations.work import Work

Progress = Callable[[int, int], None]
"""Called after each batch with the boards done and the boards in all."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did. Times are in seconds.

    Attributes:
        output: the file; None if nothing was written.
        boards: how many boards went through the model.
        resumed_boards: how many more were in the file from the run that was resumed.
        bytes_written: size of the file.
        seconds: wall time of the loop: reading, forward, copying and writing together.
        setup_seconds: wall time before the loop: loading, sampling, laying out the file.
        commit_seconds: wall time after it, until the file was durable under its name.
        stage_seconds: busy time of each stage. Stages overlap, so they may add up to more.
        waiting_seconds: how long the loop stood still for want of boards.
        nonfinite: tensor name -> how many of its values are `nan` and `inf` as stored; only
            tensors with any.
    """

    output: Path | None
    boards: int
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

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the figures derived from them, ready for JSON."""
        return {
            **asdict(self),
            "output": None if self.output is None else str(self.output),
            "boards_per_second": self.boards_per_second,
            "slowest_stage": self.slowest_stage,
        }


class Loop:
    """One run's forward passes and the buffers they fill, as a context manager.

    Leaving the context ends the reading ahead, removes the hooks and waits for the device.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        rows = min(work.options.batch_size, len(work.indices))
        self._transfer = make_transfer(
            {key: (rows, *shape) for key, shape in work.board_shapes.items()},
            work.storage_dtype,
            work.device,
        )
        self._forward = Forward(
            work.model,
            work.options.board_activations,
            options=work.options,
            device=work.device,
            rows=rows,
        )
        self._reading = Stopwatch()
        self._waiting = Stopwatch()
        self._parts: list[Part] = []
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        self._exits.callback(self._transfer.close)
        self._exits.enter_context(self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()
        self._ended = time.perf_counter()

    def batches(
        self, progress: Progress | None = None, *, start: int = 0
    ) -> Generator[BoardBatch, None, None]:
        """Yield each batch once its forward is queued; `to_host` gives its activations.

        Closing the generator early drops what is queued and not begun.

        Args:
            progress: called for each batch, about when it is done.
            start: row of the run to begin at, a multiple of the batch size.
        """
        work = self._work
        boards = feed_boards(
            work.dataset,
            work.indices,
            batch_size=work.options.batch_size,
            vocabulary=work.model.config.input_vocab_size,
            pinned=work.device.type == "cuda",
            start=start,
            reading=self._reading,
            waiting=self._waiting,
        )
        queued: deque[Part] = deque()
        try:
            for batch in self._exits.enter_context(closing(boards)):
                buffers = self._transfer.buffers(len(batch.indices))
                self._parts = self._forward.start(batch.boards_BS, buffers)
                queued.extend(self._parts)
                yield batch
                # As many as keep the workers busy while the next batch is queued.
                while len(queued) > self._forward.workers:
                    queued.popleft().wait()
                if progress:
                    progress(batch.first_row + len(batch.indices), len(work.indices))
            while queued:
                queued.popleft().wait()
        finally:
            self._forward.abandon()

    def to_host(self) -> HostBatch:
        """Pass on the activations of the batch yielded last, which is possible once."""
        return self._transfer.to_host(self._parts)

    def summary(
        self,
        started: float,
        *,
        output: Path | None = None,
        resumed_boards: int = 0,
        bytes_written: int = 0,
        write_seconds: float = 0.0,
        nonfinite: dict[str, dict[str, int]] | None = None,
    ) -> Summary:
        """Sum up the run, which began at `started` on the performance counter and has ended."""
        return Summary(
            output=output,
            boards=len(self._work.indices) - resumed_boards,
            resumed_boards=resumed_boards,
            bytes_written=bytes_written,
            seconds=self._ended - self._started,
            setup_seconds=self._started - started,
            commit_seconds=time.perf_counter() - self._ended,
            stage_seconds={
                "boards": self._reading.seconds,
                "forward": self._forward.seconds,
                "copy": self._transfer.copying.seconds,
                "write": write_seconds,
            },
            waiting_seconds=self._waiting.seconds,
            nonfinite=nonfinite or {},
        )
