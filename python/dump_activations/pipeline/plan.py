"""A run that is checked and ready: model, dataset, step indices, and what the tensors will be."""

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from dump_activations import progress as phases
from dump_activations.dataset.columns import LabelReader
from dump_activations.dataset.dataset import StepsDataset
from dump_activations.dataset.sampling import StepIndices
from dump_activations.dtypes import CELLS, LABEL_PREFIX, STORAGE_DTYPES, TensorSpec
from dump_activations.errors import IndicesError, InvalidArgumentError, option, warn
from dump_activations.model.activations import (
    Activation,
    BoardActivation,
    WeightActivation,
    find_activations,
)
from dump_activations.model.board_tensors import BoardTensor, board_tensors
from dump_activations.model.checkpoint import load_announced
from dump_activations.model.checkpoint_files import preferred_files
from dump_activations.model.config import EncoderConfig
from dump_activations.model.encoder import Encoder
from dump_activations.model.layers import find_layers
from dump_activations.model.replica import replicate
from dump_activations.options import DumpOptions, Options
from dump_activations.pipeline.device import current, find_device
from dump_activations.pipeline.pinned import PinnedSlots
from dump_activations.pipeline.shortage import model_shortage_named
from dump_activations.place import Place
from dump_activations.statistics import STATISTICS_PREFIX, statistics_specs

_ALONE = Place()
_LARGE_TENSOR = 8 << 30


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start, as a context manager that gives back what it holds.

    Attributes:
        model: in eval mode, on `device`.
        dataset: where the boards come from.
        indices: global step indices, all of them inside the dataset; a slice is int64 (n,).
        indices_from: where they came from, for the file's metadata.
        labels: reads what is stored with the boards; None where nothing is.
        activations: what was asked for.
        layers: numbers of the layers it is wanted of, ascending.
        weights: the asked-for parameters by their names in the file, on the host.
        options: what to compute and how.
        device: where the model runs.
        host_slots: what batches are copied to from a CUDA device; None where they are not.
        exits: ends what the run holds.
    """

    model: Encoder
    dataset: StepsDataset
    indices: StepIndices
    indices_from: str
    labels: LabelReader | None
    activations: list[Activation]
    layers: tuple[int, ...]
    weights: dict[str, Tensor]
    options: Options
    device: torch.device
    host_slots: PinnedSlots | None
    exits: ExitStack

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.exits.close()

    @property
    def input_files(self) -> list[Path]:
        """List the files of the model and the dataset, and those that would be read in their place."""
        checkpoint = self.model.checkpoint_files
        directories = {path.parent for path in checkpoint}
        preferred = [path for each in directories for path in preferred_files(each)]
        return [*checkpoint, *preferred, *(shard.path for shard in self.dataset.shards)]

    @cached_property
    def board_tensors(self) -> list[BoardTensor]:
        """The tensors that have one value a board."""
        return _board_tensors(self.activations, self.model.config, self.layers, self.options)

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype of the floating tensors in the output."""
        return _storage_dtype(self.options)

    @property
    def largest_row_nbytes(self) -> int:
        """Bytes of a board in the largest tensor."""
        itemsize = STORAGE_DTYPES[self.options.dtype].nbytes
        return max((math.prod(each.shape) * itemsize for each in self.board_tensors), default=CELLS)

    def whole_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that do not come in batches: parameters."""
        return {name: tensor.to(self.storage_dtype) for name, tensor in self.weights.items()}

    def is_whole(self, name: str) -> bool:
        """Whether a tensor does not come in batches."""
        return name in self.weights or name.startswith(STATISTICS_PREFIX)

    def tensor_specs(self) -> list[TensorSpec]:
        """Return every tensor of the output file; the first axis of all but the parameters is n."""
        n, dtype = len(self.indices), STORAGE_DTYPES[self.options.dtype].name
        return [
            *(TensorSpec(each.name, dtype, (n, *each.shape)) for each in self.board_tensors),
            *(TensorSpec(name, dtype, tuple(w.shape)) for name, w in self.weights.items()),
            TensorSpec("indices", "int64", (n,)),
            TensorSpec("boards", "uint8", (n, CELLS)),
            *self._label_specs(),
            *self._statistics_specs(),
        ]

    @property
    def has_statistics(self) -> bool:
        """Whether statistics of the activations are stored beside them."""
        return isinstance(self.options, DumpOptions) and self.options.stats

    def _statistics_specs(self) -> list[TensorSpec]:
        if not self.has_statistics:
            return []
        stacked = None if self.options.split_layers else len(self.layers)
        return [
            spec
            for each in self.board_tensors
            for spec in statistics_specs(
                each.name,
                layers=stacked if each.activation.per_layer else None,
                width=each.shape[-1],
            )
        ]

    def _label_specs(self) -> list[TensorSpec]:
        if self.labels is None:
            return []
        dtypes, shapes, n = self.labels.dtypes, self.labels.shapes, len(self.indices)
        return [
            TensorSpec(LABEL_PREFIX + name, dtypes[name].name, (n, *shapes[name]))
            for name in dtypes
        ]


def make_plan(
    init: str | os.PathLike[str] | Encoder,
    dataset: str | os.PathLike[str] | StepsDataset,
    options: Options,
    *,
    host_slots: int = 0,
    place: Place = _ALONE,
) -> Plan:
    """Load and check everything a run needs, before any forward pass.

    Args:
        init: the checkpoint, or the model.
        dataset: the dataset, or its directory.
        options: what to compute and how.
        host_slots: how many batches there is to be room for on the host, where a CUDA device copies
            them. It is page-locked while the model is loaded.
        place: where this process stands: of several on a machine each gets a device of its own.

    Raises:
        DumpActivationsError: names what is wrong with the call, a file or the machine.
        PinnedMemoryError: this process's share of the host's memory is too small for the batches.
    """
    device = find_device(options.device, place)
    if not isinstance(dataset, StepsDataset):
        phases.begin("opening the dataset")
        dataset = StepsDataset(dataset)
    if isinstance(init, Encoder) and options.random_init:
        raise InvalidArgumentError(
            f"{option('random_init')}: the model is loaded already; give load_encoder "
            "random_init=True"
        )
    with ExitStack() as exits:
        slots: PinnedSlots | None = None

        def begin(config: EncoderConfig) -> None:
            nonlocal slots
            shapes = _shapes_at_most(config, len(dataset), options)
            if host_slots and shapes and device.type == "cuda":
                slots = PinnedSlots(shapes, _storage_dtype(options), device, count=host_slots)
                exits.enter_context(slots)

        phases.begin("loading the checkpoint")
        with model_shortage_named(device), current(device):
            if isinstance(init, Encoder):
                begin(init.config)
                model = replicate(init, device)
            else:
                model = load_announced(init, begin, device=device, random_init=options.random_init)
        activations = find_activations(options.outputs, model.config)
        layers = find_layers("layers", options.layers, model.config.num_hidden_layers)
        if options.layers is not None and not any(each.per_layer for each in activations):
            keys = ", ".join(each.key for each in activations)
            warn(f"{option('layers')}: no layers to choose from in {keys}")
        labels = dataset.label_reader(options.labels) if options.labels else None
        indices, indices_from = _step_indices(dataset, options)
        weights = {
            name: tensor.detach().cpu()
            for activation in activations
            if isinstance(activation, WeightActivation)
            for name, tensor in activation.tensors(model, layers).items()
        }
        return Plan(
            model=model,
            dataset=dataset,
            indices=indices,
            indices_from=indices_from,
            labels=labels,
            activations=activations,
            layers=layers,
            weights=weights,
            options=options,
            device=device,
            host_slots=slots,
            exits=exits.pop_all(),
        )


def _storage_dtype(options: Options) -> torch.dtype:
    dtype = getattr(torch, STORAGE_DTYPES[options.dtype].name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _board_tensors(
    activations: Sequence[Activation],
    config: EncoderConfig,
    layers: Sequence[int],
    options: Options,
) -> list[BoardTensor]:
    return [
        tensor
        for activation in activations
        if isinstance(activation, BoardActivation)
        for tensor in board_tensors(activation, config, layers=layers, split=options.split_layers)
    ]


def _shapes_at_most(
    config: EncoderConfig, dataset_rows: int, options: Options
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a full batch's tensors, or of larger ones where a filter leaves fewer.

    They are wanted before the steps are: a filter may take a minute to look for them.
    """
    if options.indices is not None:
        most = np.asarray(options.indices).size
    elif options.steps is not None:
        assert isinstance(options.steps, slice)
        most = len(range(dataset_rows)[options.steps])
    else:
        most = options.n_samples
    layers = find_layers("layers", options.layers, config.num_hidden_layers)
    activations = find_activations(options.outputs, config)
    rows = min(options.batch_size, most)
    tensors = _board_tensors(activations, config, layers, options)
    return {tensor.name: (rows, *tensor.shape) for tensor in tensors}


def _step_indices(dataset: StepsDataset, options: Options) -> tuple[StepIndices, str]:
    """Return the step indices of a run, and say where they came from."""
    phases.begin("choosing the steps")
    if options.indices is not None:
        return dataset.check_indices(options.indices), "given"
    assert not isinstance(options.steps, str)
    progress = options.scan_progress
    if options.where is not None:
        progress = phases.counted(phases.Phase("scanning the dataset", "rows"), also=progress)
    steps = dataset.matches(options.where, options.steps, progress=progress)
    if options.steps is None:
        replaced = options.n_samples > len(steps)
        drawn = dataset.sample_from(steps, options.n_samples, options.seed)
        return drawn, "draw with replacement" if replaced else "draw"
    if len(steps) == 0:
        raise IndicesError(f"{option('where')}: no row of {dataset.path} matches")
    wanted = range(len(dataset))[options.steps]
    return steps, f"steps {wanted.start}:{wanted.stop}:{wanted.step}"


def warn_of_large_tensors(specs: Sequence[TensorSpec]) -> None:
    """Warn of each tensor that will take 8 GiB or more on disk."""
    for spec in specs:
        if spec.nbytes >= _LARGE_TENSOR:
            warn(
                f"{spec.name} will take {spec.nbytes / 2**30:.1f} GiB; fewer boards "
                f"({option('n_samples')}) or {option('dtype', 'fp16')} or bf16 make it smaller"
            )
