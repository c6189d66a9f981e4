"""A run handed out a batch at a time: what `stream` does."""

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dump_activations.api.sources import Init, Pool
from dump_activations.options import Options
from dump_activations.pipeline.device import current
from dump_activations.pipeline.forward import Forward
from dump_activations.pipeline.interrupts import HeldInterrupts
from dump_activations.pipeline.loop import Loop
from dump_activations.pipeline.plan import Plan, make_plan
from dump_activations.pipeline.shortage import batch_shortage_named
from dump_activations.pipeline.transfer import ActivationBatch


@dataclass(frozen=True)
class Batch:
    """Activations of consecutive boards of a run. All tensors lie on the host and are the caller's.

    Attributes:
        first_row: place of the first board in the run.
        indices: global step indices, int64 (B,).
        boards: exponents, uint8 (B, 16).
        labels: name -> tensor (B, *shape), uint8, int64, float32 or float64.
        tensors: by their names in a file, the activations (B, *shape) in the storage dtype, and
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


def stream_batches(init: Init, pool: Pool, options: Options) -> Iterator[Batch]:
    """Check a run, and hand out its batches."""
    with batch_shortage_named(options.batch_size):
        plan = make_plan(init, pool, options)
    return _interruptible(_taken_batches(plan), plan.device, options.batch_size)


def _interruptible(
    batches: Generator[Batch, None, None], device: torch.device, batch_size: int
) -> Iterator[Batch]:
    """Hand on the batches; an interruption between two of them ends the run in order.

    The run's device is current only while a batch is computed, not while the caller has it. Of an
    error's frames this one stays: it holds nothing of the run but the generator.
    """
    try:
        while True:
            with HeldInterrupts(), batch_shortage_named(batch_size), current(device):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch
            del batch  # It is the caller's, to keep or not.
    finally:
        with HeldInterrupts(), current(device):
            batches.close()


def _taken_batches(plan: Plan) -> Generator[Batch, None, None]:
    # The CPU is the caller's between two batches.
    ahead = 1 if plan.device.type == "cuda" else 0
    under_way: deque[ActivationBatch] = deque()
    with Forward(plan) as forward, Loop(plan, forward) as loop:
        for batch in loop.batches():
            under_way.append(batch)
            if len(under_way) > ahead:
                yield _take(plan, under_way.popleft())
        while under_way:
            yield _take(plan, under_way.popleft())


def _take(plan: Plan, batch: ActivationBatch) -> Batch:
    for chunk in batch.chunks:
        chunk.wait()
    tensors = {key: tensor.clone() for key, tensor in batch.tensors.items()}
    batch.release()
    weights = {n: tensor.to(plan.storage_dtype, copy=True) for n, tensor in plan.weights.items()}
    boards = batch.boards
    return Batch(
        boards.first_row,
        torch.from_numpy(boards.indices.copy()),
        boards.boards_BS.clone(),
        {name: values.clone() for name, values in boards.labels.items()},
        tensors | weights,
    )
