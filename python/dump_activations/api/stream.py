"""`stream`: run boards through a model, and yield the activations a batch at a time."""

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dump_activations.api.step_indices import with_step_indices
from dump_activations.dataset.dataset import StepsDataset
from dump_activations.dataset.expressions import Expression
from dump_activations.dtypes import LABEL_PREFIX
from dump_activations.errors import shape_text
from dump_activations.interrupts import HeldInterrupts, closed_at_exit
from dump_activations.model.activations import Layers
from dump_activations.model.encoder import Encoder
from dump_activations.pipeline.device import DeviceAdvice, current
from dump_activations.pipeline.options import StreamOptions
from dump_activations.pipeline.plan import Plan, make_plan
from dump_activations.pipeline.run import Run
from dump_activations.pipeline.transfer import ActivationBatch
from dump_activations.progress import Count

# One that the caller has, and one that is copied meanwhile.
_HOST_SLOTS = 2
_LONGEST_REPR = 20


@dataclass(frozen=True, repr=False, eq=False)
class Batch(Mapping[str, Tensor]):
    """Activations of consecutive boards of a run, as a mapping: name in a file -> tensor.

    `batch["layer_outputs"]`, `batch["boards"]`, `batch["indices"]` and `batch["labels/NAME"]` are
    tensors ``(B, *shape)``. With `tensors="copy"` all lie on the host and are yours to keep. With
    `"view"` and `"device"` the activations belong to the run: they are valid until the next batch
    is asked for or the stream ends. Indices, boards and labels always lie on the host.

    Attributes:
        first_row: row of the first board in the run.
        indices: global step indices, int64 (B,).
        boards: exponents, uint8 (B, 16).
        labels: name -> tensor ``(B, *shape)``, uint8, int64, float32 or float64.
        tensors: the activations ``(B, *shape)`` in the storage dtype and the parameters that were
            asked for, by their names in a file.
    """

    first_row: int
    indices: Tensor
    boards: Tensor
    labels: dict[str, Tensor]
    tensors: dict[str, Tensor]

    @property
    def _by_name(self) -> dict[str, Tensor]:
        labels = {LABEL_PREFIX + name: values for name, values in self.labels.items()}
        return {**self.tensors, "indices": self.indices, "boards": self.boards, **labels}

    def __getitem__(self, name: str) -> Tensor:
        """Return one tensor by its name."""
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of all tensors."""
        return iter(self._by_name)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._by_name)

    # Tensors have no truth value to compare mappings by.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        """Return at most 20 lines: the rows, and each tensor's dtype, shape and device."""
        stop = self.first_row + len(self.indices)
        lines = [f"Batch of rows {self.first_row:,} to {stop - 1:,}"]
        for name, tensor in self.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            lines.append(f"  {name}: {dtype} {shape_text(tensor.shape)} on {tensor.device}")
        if len(lines) > _LONGEST_REPR:
            more = len(lines) - _LONGEST_REPR + 1
            lines[_LONGEST_REPR - 1 :] = [f"  and {more} more tensors"]
        return "\n".join(lines)


def stream(
    init: str | os.PathLike[str] | Encoder,
    dataset: str | os.PathLike[str] | StepsDataset,
    *,
    outputs: str | Sequence[str] = ("final_hidden",),
    layers: Layers | None = None,
    split_layers: bool = False,
    n_samples: int = 1024,
    indices: ArrayLike | os.PathLike[str] | None = None,
    steps: slice | str | None = None,
    where: str | Expression | None = None,
    labels: str | Sequence[str] = (),
    scan_progress: Count | None = None,
    seed: int = 0,
    batch_size: int = 1024,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
    device: str | torch.device = "cuda",
    allow_cpu: bool = False,
    random_init: bool = False,
    precision: Literal["fp32", "tf32", "bf16", "bf16-true"] = "fp32",
    compile: bool = False,  # noqa: A002 -- the command's flag
    cuda_graph: bool = True,
    tensors: Literal["copy", "view", "device"] = "copy",
) -> Iterator[Batch]:
    """Run boards through a model and yield the activations, a batch at a time.

    Everything is loaded, checked and compiled before the call returns. On a GPU the next batch is
    computed while the caller works on the current one, in the stream that is current now. The
    caller may work in any stream. The run waits for the stream that is current at each batch.
    Until the call returns, other threads may not call `torch.cuda.synchronize()`, unless
    `cuda_graph` is False.

    Args:
        init: a checkpoint directory, `.pt` bundle or `hf://org/repo[/subdir][@revision]`;
            or a loaded Encoder, whose weights must not change before the last batch.
        dataset: a dataset of steps, or its directory.
        outputs: activation keys, globs of them ("attn_*") or names of TransformerLens hooks.
        layers: layers to keep, as Python indexes them: -1, [0, 3] or "0,3,-1,4:8"; None keeps
            all.
        split_layers: yield one tensor per layer, KEY.LAYER, in place of a stacked one.
        n_samples: steps to sample, unless `indices` or `steps` are given.
        indices: global step indices to use instead of a sample, whole numbers of any shape; or a
            file of them: a `.npy`, an `.npz` with `indices`, or an earlier dump.
        steps: steps to take in their order instead of a sample, START:STOP or START:STOP:STEP.
        where: take only steps that match this expression, such as "max_exponent >= 11".
        labels: labels to read with the boards, globs of them, or "all" for every field.
        scan_progress: called with the rows scanned and the rows in all while `where` is evaluated.
        seed: seed of the sample, of numpy.random.default_rng.
        batch_size: boards per forward pass.
        dtype: storage dtype of floating tensors.
        device: compute device: cuda, cuda:N, or cpu with `allow_cpu`.
        allow_cpu: run on the CPU where there is no GPU.
        random_init: give the checkpoint's architecture untrained weights, as a control.
        precision: arithmetic of the forward pass; tf32 on CUDA only.
        compile: run the model through torch.compile.
        cuda_graph: replay full batches as CUDA graphs, where a CUDA device and the model allow it.
        tensors: copy: yours to keep. view: host buffers, valid until the next batch. device: the
            same on the compute device.

    Raises:
        DumpActivationsError: one line that names what is wrong and the way out.
    """
    options = StreamOptions.of(locals())
    with DeviceAdvice(batch_size=options.batch_size):
        dataset, options = with_step_indices(dataset, options)
        plan = make_plan(init, dataset, options)
    return batches_of(plan, tensors=tensors)


def batches_of(
    plan: Plan,
    rows: Iterable[range] | None = None,
    *,
    tensors: Literal["copy", "view", "device"],
    computes_ahead: bool = False,
) -> Generator[Batch, None, None]:
    """Make a plan's run ready, and return its batches: of all rows, or of ranges of rows.

    With `computes_ahead` the CPU too computes the next batch meanwhile, as a GPU does.
    """
    caller = _Caller(plan.device, copies=tensors == "copy")
    # Else the CPU is the caller's between two batches.
    ahead = 1 if computes_ahead or plan.device.type == "cuda" else 0
    run = _computed_ahead(plan, rows, on_device=tensors == "device", ahead=ahead)
    batches = closed_at_exit(_interruptible(run, caller, plan.device, plan.options.batch_size))
    next(batches)
    return cast("Generator[Batch, None, None]", batches)


_Computed = Generator[ActivationBatch | None, None, None]


class _Caller:
    """Hands a run's batches to their consumer; on CUDA, keeps their streams in order.

    The run works in the stream that is current when it begins. The caller's stream is the one that
    is current when it asks for a batch: it may be another each time.
    """

    def __init__(self, device: torch.device, *, copies: bool) -> None:
        self._device = device
        self._copies = copies
        on_cuda = device.type == "cuda"
        self._run_stream = torch.cuda.current_stream(device) if on_cuda else None
        self._viewed_in: torch.cuda.Stream | None = None

    def returned(self) -> AbstractContextManager[object]:
        """Return a context for the run's work, which comes after the caller's on its views."""
        if self._run_stream is None:
            return nullcontext()
        if self._viewed_in is not None:
            self._run_stream.wait_stream(self._viewed_in)
            self._run_stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._run_stream)

    def take(self, run: _Computed) -> Batch | None:
        """Ask for the next batch. Its memory is used again when another is asked for."""
        with self.returned():
            computed = next(run, None)
        if computed is None:
            return None
        for chunk in computed.chunks:
            chunk.wait()
        boards = computed.boards

        def given(tensor: Tensor) -> Tensor:
            return tensor.clone() if self._copies else tensor

        batch = Batch(
            boards.first_row,
            torch.from_numpy(boards.indices.copy()),
            given(boards.boards_BS),
            {name: given(values) for name, values in boards.labels.items()},
            {name: given(tensor) for name, tensor in computed.tensors.items()},
        )
        if not self._copies and self._run_stream is not None:
            self._viewed_in = torch.cuda.current_stream(self._device)
        computed.release()
        return batch


def _interruptible(
    run: _Computed, caller: _Caller, device: torch.device, batch_size: int
) -> Generator[Batch | None, None, None]:
    """Make the run ready, yield None, then its batches; an interruption ends it in order.

    The run's device is current only while a batch is computed, not while the caller has it. An
    error keeps the frame of this function: it holds nothing of the run but the generator.
    """
    has_failed = False
    try:
        with (
            HeldInterrupts(),
            DeviceAdvice(batch_size=batch_size),
            current(device),
            caller.returned(),
        ):
            next(run)
        yield None
        while True:
            with HeldInterrupts(), DeviceAdvice(batch_size=batch_size), current(device):
                batch = caller.take(run)
            if batch is None:
                return
            yield batch
            del batch  # The caller keeps it, or drops it to free its memory.
    except (Exception, KeyboardInterrupt):
        has_failed = True
        raise
    finally:
        # A device that has failed fails again here. The first error tells more.
        first = suppress(RuntimeError) if has_failed else nullcontext()
        with first, HeldInterrupts(), current(device), caller.returned():
            run.close()


def _computed_ahead(
    plan: Plan, rows: Iterable[range] | None, *, on_device: bool, ahead: int
) -> _Computed:
    """Make the run ready, yield None, then its batches, which the device may still work on."""
    place = plan.device if on_device else "cpu"
    under_way: deque[ActivationBatch] = deque()
    with Run(plan, host_slots=0 if on_device else _HOST_SLOTS) as run:
        weights = {
            name: tensor.to(place, plan.storage_dtype, copy=True)
            for name, tensor in plan.weights.items()
        }
        yield None
        for batch in run.batches(rows):
            under_way.append(replace(batch, tensors=batch.tensors | weights))
            if len(under_way) > ahead:
                yield under_way.popleft()
        yield from under_way
