"""The forward passes of a run, with boards read ahead and each stage's time counted."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Self

from dump_activations.chunks import Chunk
from dump_activations.pipeline.board_feed import feed_boards
from dump_activations.pipeline.forward import Forward
from dump_activations.pipeline.group import Group
from dump_activations.pipeline.plan import Plan
from dump_activations.pipeline.summary import STAGES, Summary
from dump_activations.pipeline.transfer import ActivationBatch, make_transfer
from dump_activations.timing import Stopwatch

_MICROSECONDS = 1_000_000
_WAITING = "waiting"


def _nothing(_boards: int) -> None:
    pass


class Loop:
    """One run's forward passes and the buffers they fill, as a context manager.

    Leaving the context ends the reading ahead and waits for the device. The run's device is to be
    the thread's current one.

    Args:
        plan: what to run.
        forward: the plan's, entered.
        on_device: whether batches are taken on the device that computes them.

    Attributes:
        ended: when it ended, on the performance counter; later where others are waited for.
    """

    ended: float

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
        self._boards = 0
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        self._exits.callback(self._transfer.close)
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()
        self.ended = time.perf_counter()

    def batches(
        self, done: Callable[[int], object] = _nothing, *, stretches: Iterable[range] | None = None
    ) -> Generator[ActivationBatch, None, None]:
        """Turn each batch of boards into its batch of activations, which the caller releases.

        A batch is yielded once its forward is queued. Closing the generator early drops what is
        queued and not begun.

        Args:
            done: called with the boards of each batch, about when they are done.
            stretches: rows of the run to do, each stretch from a multiple of the batch size on;
                taken one by one, when their boards are to be read ahead. All rows by default.
        """
        plan = self._plan
        feed = feed_boards(
            plan.dataset,
            plan.indices,
            plan.labels,
            batch_size=plan.options.batch_size,
            vocabulary=plan.model.config.input_vocab_size,
            stretches=stretches,
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
                self._boards += len(boards.indices)
                done(len(boards.indices))
            while queued:
                queued.popleft().wait()
        finally:
            self._forward.abandon()

    def tell(self, group: Group, write_seconds: float = 0.0) -> None:
        """Tell the group what this process did, and how long each stage was busy; after the end."""
        busy = (
            self._reading.seconds,
            self._forward.seconds,
            self._transfer.copying.seconds,
            write_seconds,
            self._waiting.seconds,
        )
        for name, seconds in zip((*STAGES, _WAITING), busy, strict=True):
            group.say(f"{name}/{group.place.rank}", int(seconds * _MICROSECONDS))
        group.say(f"done/{group.place.rank}", self._boards)

    def summary(
        self,
        group: Group,
        started: float,
        *,
        output: Path | None = None,
        resumed_boards: int = 0,
        bytes_written: int = 0,
        nonfinite: dict[str, dict[str, int]] | None = None,
    ) -> Summary:
        """Sum up the run of all processes, once they have told what they did.

        It began at `started` on the performance counter; the rest is as in `Summary`.
        """
        ranks = range(group.place.size)

        def mean(name: str) -> float:
            told = (group.hear(f"{name}/{rank}", rank) for rank in ranks)
            return sum(told) / len(ranks) / _MICROSECONDS

        boards = tuple(group.hear(f"done/{rank}", rank) for rank in ranks)
        return Summary(
            output=output,
            boards=sum(boards),
            boards_by_rank=boards,
            resumed_boards=resumed_boards,
            bytes_written=bytes_written,
            seconds=self.ended - self._started,
            setup_seconds=self._started - started,
            commit_seconds=time.perf_counter() - self.ended,
            stage_seconds={name: mean(name) for name in STAGES},
            waiting_seconds=mean(_WAITING),
            nonfinite=nonfinite or {},
        )
