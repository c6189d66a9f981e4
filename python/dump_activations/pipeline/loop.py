"""The forward passes of a run, with boards read ahead and each stage's time counted."""

import time
from collections import deque
from collections.abc import Generator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Self

from dump_activations.chunks import Chunk
from dump_activations.options import Progress
from dump_activations.pipeline.board_feed import feed_boards
from dump_activations.pipeline.forward import Forward
from dump_activations.pipeline.plan import Plan
from dump_activations.pipeline.summary import Summary
from dump_activations.pipeline.transfer import ActivationBatch, make_transfer
from dump_activations.timing import Stopwatch


class Loop:
    """One run's forward passes and the buffers they fill, as a context manager.

    Leaving the context ends the reading ahead and waits for the device. The run's device is to be
    the thread's current one.

    Args:
        plan: what to run.
        forward: the plan's, entered.
        on_device: whether batches are taken on the device that computes them.
    """

    def __init__(self, plan: Plan, forward: Forward, *, on_device: bool = False) -> None:
        self._plan = plan
        self._forward = forward
        self._transfer = make_transfer(
            {tensor.name: (forward.rows, *tensor.shape) for tensor in plan.board_tensors},
            plan.storage_dtype,
            plan.device,
            host_slots=plan.host_slots,
            on_device=on_device,
        )
        self._reading = Stopwatch()
        self._waiting = Stopwatch()
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        self._exits.callback(self._transfer.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()
        self._ended = time.perf_counter()

    def batches(
        self, progress: Progress | None = None, *, start: int = 0
    ) -> Generator[ActivationBatch, None, None]:
        """Turn each batch of boards into its batch of activations, which the caller releases.

        A batch is yielded once its forward is queued. Closing the generator early drops what is
        queued and not begun.

        Args:
            progress: called for each batch, about when it is done.
            start: row of the run to begin at, a multiple of the batch size.
        """
        plan = self._plan
        feed = feed_boards(
            plan.pool,
            plan.indices,
            plan.labels,
            batch_size=plan.options.batch_size,
            vocabulary=plan.model.config.input_vocab_size,
            start=start,
            reading=self._reading,
            waiting=self._waiting,
        )
        queued: deque[Chunk] = deque()
        try:
            for boards in self._exits.enter_context(closing(feed)):
                capturing = self._transfer.capture(boards)
                chunks = self._forward.start(capturing.tokens, capturing.buffers)
                queued.extend(chunks)
                yield capturing.send(chunks)
                # As many as keep the workers busy while the next batch is queued.
                while len(queued) > self._forward.workers:
                    queued.popleft().wait()
                if progress:
                    progress(boards.first_row + len(boards.indices), len(plan.indices))
            while queued:
                queued.popleft().wait()
        finally:
            self._forward.abandon()

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
            boards=len(self._plan.indices) - resumed_boards,
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
