"""A run handed out a batch at a time: what `stream` does."""

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from dump_activations.api.sources import Dataset, Init
from dump_activations.options import StreamOptions
from dump_activations.pipeline.device import current
from dump_activations.pipeline.forward import Forward
from dump_activations.pipeline.interrupts import HeldInterrupts
from dump_activations.pipeline.loop import Loop
from dump_activations.pipeline.plan import Plan, make_plan
from dump_activations.pipeline.shortage import batch_shortage_named
from dump_activations.pipeline.transfer import ActivationBatch

# One with the caller, one that is copied meanwhile.
_HOST_SLOTS = 2


@dataclass(frozen=True)
class Batch:
    """Activations of consecutive boards of a run.

    With `tensors="own"` all tensors lie on the host and are the caller's. With `"borrowed"` and
    `"device"` they are the run's, and hold what they hold until the next batch is asked for or the
    stream ends; indices, boards and labels lie on the host all the same.

    Attributes:
        first_row: place of the first board in the run.
        indices: global step indices, int64 (B,).
        boards: exponents, uint8 (B, 16).
        labels: name -> tensor ``(B, *shape)``, uint8, int64, float32 or float64.
        tensors: by their names in a file, the activations ``(B, *shape)`` in the storage dtype, and
            the parameters that were asked for.
    """

    first_row: int
    indices: Tensor
    boards: Tensor
    labels: dict[str, Tensor]
    tensors: dict[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        """Return one tensor by its key."""
        return self.tensors[key]


def stream_batches(init: Init, dataset: Dataset, options: StreamOptions) -> Iterator[Batch]:
    """Check a run and make it ready, and hand out its batches."""
    on_device = options.tensors == "device"
    with batch_shortage_named(options.batch_size):
        plan = make_plan(init, dataset, options, host_slots=0 if on_device else _HOST_SLOTS)
    caller = _Caller(plan.device, owns=options.tensors == "own")
    run = _computed_ahead(plan, on_device=on_device)
    batches = _interruptible(run, caller, plan.device, options.batch_size)
    next(batches)
    return cast("Iterator[Batch]", batches)


_Run = Generator[ActivationBatch | None, None, None]


class _Caller:
    """Whoever takes a run's batches; on CUDA, the streams that it works in.

    The run is in the stream that is current when it begins. The caller's is the one that is current
    when it asks for a batch: another each time, if it likes.
    """

    def __init__(self, device: torch.device, *, owns: bool) -> None:
        self._device = device
        self._owns = owns
        on_cuda = device.type == "cuda"
        self._runs_stream = torch.cuda.current_stream(device) if on_cuda else None
        self._has_lent_in: torch.cuda.Stream | None = None

    def returned(self) -> AbstractContextManager[object]:
        """Return a context for the run's work, which comes after the caller's on what was lent."""
        if self._runs_stream is None:
            return nullcontext()
        if self._has_lent_in is not None:
            self._runs_stream.wait_stream(self._has_lent_in)
            self._runs_stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._runs_stream)

    def take(self, run: _Run) -> Batch | None:
        """Ask for the next batch; its memory is used again when another is asked for."""
        with self.returned():
            computed = next(run, None)
        if computed is None:
            return None
        for chunk in computed.chunks:
            chunk.wait()
        boards = computed.boards
        batch = Batch(
            boards.first_row,
            torch.from_numpy(boards.indices.copy()),
            boards.boards_BS,
            boards.labels,
            computed.tensors,
        )
        if self._owns:
            batch = _cloned(batch)
        elif self._runs_stream is not None:
            self._has_lent_in = torch.cuda.current_stream(self._device)
        computed.release()
        return batch


def _cloned(batch: Batch) -> Batch:
    return Batch(
        batch.first_row,
        batch.indices,
        batch.boards.clone(),
        {name: values.clone() for name, values in batch.labels.items()},
        {key: tensor.clone() for key, tensor in batch.tensors.items()},
    )


def _interruptible(
    run: _Run, caller: _Caller, device: torch.device, batch_size: int
) -> Iterator[Batch | None]:
    """Make the run ready, yield None, then its batches; an interruption ends it in order.

    The run's device is current only while a batch is computed, not while the caller has it. Of an
    error's frames this one stays: it holds nothing of the run but the generator.
    """
    try:
        with HeldInterrupts(), batch_shortage_named(batch_size), current(device), caller.returned():
            next(run)
        yield None
        while True:
            with HeldInterrupts(), batch_shortage_named(batch_size), current(device):
                batch = caller.take(run)
            if batch is None:
                return
            yield batch
            del batch  # It is the caller's, to keep or not.
    finally:
        with HeldInterrupts(), current(device), caller.returned():
            run.close()


def _computed_ahead(plan: Plan, *, on_device: bool) -> _Run:
    """Make the run ready, yield None, then its batches, which the device may not be done with."""
    # The CPU is the caller's between two batches.
    ahead = 1 if plan.device.type == "cuda" else 0
    place = plan.device if on_device else "cpu"
    under_way: deque[ActivationBatch] = deque()
    with plan, Forward(plan) as forward, Loop(plan, forward, on_device=on_device) as loop:
        weights = {
            name: tensor.to(place, plan.storage_dtype, copy=True)
            for name, tensor in plan.weights.items()
        }
        yield None
        for batch in loop.batches():
            under_way.append(replace(batch, tensors=batch.tensors | weights))
            if len(under_way) > ahead:
                yield under_way.popleft()
        yield from under_way
