"""A run that is checked and ready: model, dataset, step indices, and a description of its output.

docs/file-format.md explains each entry of the metadata and how each digest is computed.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dump_activations import _rust
from dump_activations import progress as phases
from dump_activations.dataset.columns import LabelReader
from dump_activations.dataset.dataset import StepsDataset
from dump_activations.dataset.expressions import Expression
from dump_activations.dataset.sampling import StepIndices
from dump_activations.dtypes import CELLS, LABEL_PREFIX, STORAGE_DTYPES, TensorSpec
from dump_activations.errors import (
    IndicesError,
    InvalidArgumentError,
    note,
    option,
    size_text,
    warn,
)
from dump_activations.model.activations import (
    Activation,
    BoardActivation,
    BoardTensor,
    WeightActivation,
    board_tensors,
    find_activations,
    find_layers,
)
from dump_activations.model.checkpoint import preferred_files, prepare_model
from dump_activations.model.encoder import Encoder
from dump_activations.pipeline.device import DeviceAdvice, current, find_device, lack_of_cuda
from dump_activations.pipeline.options import Options

# Flash attention puts boards on an axis of CUDA's grid that is no longer than this.
_LARGEST_CUDA_BATCH = 65_535

_FORMAT_VERSION = "1"
_DIGESTED_AT_ONCE = 1 << 20

# Entries of the metadata that determine the values of a run's tensors, with the rest of
# `fingerprint`. The dataset counts by the names, sizes and layouts of its shards, not by its rows.
_IDENTITY = (
    *("weights_sha256", "dataset_layout_sha256", "n_samples", "outputs", "layers", "labels"),
    *("dtype", "precision", "compile", "batch_size"),
    *("format_version", "dump_activations_version", "torch_version"),
)


@dataclass(frozen=True)
class Plan:
    """A run that is ready to start.

    The model is in eval mode, on `device`.

    Attributes:
        indices: global step indices, all of them inside the dataset; a slice is int64 (n,).
        sampling: how the indices were chosen, as the file's metadata has it.
        layers: numbers of the layers to keep, ascending.
        weights: parameters to store, by their names in the file, on the host.
    """

    model: Encoder
    dataset: StepsDataset
    indices: StepIndices
    sampling: str
    labels: LabelReader | None
    activations: list[Activation]
    layers: tuple[int, ...]
    weights: dict[str, Tensor]
    options: Options
    device: torch.device

    @property
    def input_files(self) -> list[Path]:
        """The files of the model and the dataset, and files that would be read in their place."""
        checkpoint = self.model.checkpoint_files
        directories = {path.parent for path in checkpoint}
        preferred = [path for each in directories for path in preferred_files(each)]
        return [*checkpoint, *preferred, *(shard.path for shard in self.dataset.shards)]

    @cached_property
    def board_tensors(self) -> list[BoardTensor]:
        """The tensors that have one value per board."""
        config, split = self.model.config, self.options.split_layers
        return [
            tensor
            for each in self.activations
            if isinstance(each, BoardActivation)
            for tensor in board_tensors(each, config, layers=self.layers, split=split)
        ]

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype of the floating tensors in the output."""
        dtype = getattr(torch, STORAGE_DTYPES[self.options.dtype].name)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def tensor_specs(self) -> list[TensorSpec]:
        """Return every tensor of the output; the first axis of all but the parameters is n."""
        n, dtype = len(self.indices), STORAGE_DTYPES[self.options.dtype].name
        labels = {} if self.labels is None else self.labels.dtypes
        shapes = {} if self.labels is None else self.labels.shapes
        return [
            *(TensorSpec(each.name, dtype, (n, *each.shape)) for each in self.board_tensors),
            *(TensorSpec(name, dtype, tuple(w.shape)) for name, w in self.weights.items()),
            TensorSpec("indices", "int64", (n,)),
            TensorSpec("boards", "uint8", (n, CELLS)),
            *(
                TensorSpec(LABEL_PREFIX + name, stored.name, (n, *shapes[name]))
                for name, stored in labels.items()
            ),
        ]


def make_plan(
    init: str | os.PathLike[str] | nn.Module,
    dataset: str | os.PathLike[str] | StepsDataset,
    options: Options,
) -> Plan:
    """Load and check everything a run needs, before any forward pass.

    Raises:
        DumpActivationsError: names what is wrong with the call, a file or the machine.
    """
    if options.allow_cpu and options.device == "cuda" and (reason := lack_of_cuda()):
        note(f"no CUDA device ({reason}): running on the CPU")
        options = replace(options, device="cpu")
    device = find_device(options.device)
    if device.type == "cuda" and options.batch_size > _LARGEST_CUDA_BATCH:
        raise InvalidArgumentError(
            f"{option('batch_size')}: must be {_LARGEST_CUDA_BATCH:,} or less on CUDA, got "
            f"{options.batch_size:,}"
        )
    for variable in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"):
        if options.compile and os.environ.get(variable) == "1":
            warn(f"{option('compile')}: ignored, since {variable} is set")
            options = replace(options, compile=False)
    if not isinstance(dataset, StepsDataset):
        phases.begin("opening the dataset")
        dataset = StepsDataset(dataset)
    phases.begin("loading the checkpoint")
    with DeviceAdvice(model_on=device), current(device):
        model = prepare_model(init, device, random_init=options.random_init, seed=options.seed)
    activations = find_activations(options.outputs, model.config)
    layers = find_layers(options.layers, model.config.num_hidden_layers)
    if options.layers is not None and not any(each.per_layer for each in activations):
        keys = ", ".join(each.key for each in activations)
        warn(f"{option('layers')}: no layers to choose from in {keys}")
    labels = dataset.label_reader(options.labels) if options.labels else None
    indices, sampling = _step_indices(dataset, options)
    weights = {
        name: tensor.detach().cpu()
        for activation in activations
        if isinstance(activation, WeightActivation)
        for name, tensor in activation.tensors(model, layers).items()
    }
    return Plan(
        model, dataset, indices, sampling, labels, activations, layers, weights, options, device
    )


def metadata(plan: Plan) -> dict[str, str]:
    """Describe a run for its output file, without `computed_by`. Entries of no use are left out."""
    options, model, config = plan.options, plan.model, plan.model.config
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}
    entries = {
        "checkpoint": model.checkpoint,
        "hub_commit": model.hub_commit,
        "hidden_size": str(config.hidden_size),
        "num_layers": str(config.num_hidden_layers),
        "head_type": config.head_type,
        "n_bins": None if config.head_type == "none" else str(config.logits_shape[-1]),
        "random_init": str(model.random_init).lower(),
        "tokenizer": model.tokenizer,
        "weights_sha256": model.weights_sha256,
        "weights_dtype": None if dtypes == {"float32"} else ",".join(sorted(dtypes)),
        "outputs": ",".join(sorted(each.key for each in plan.activations)),
        "layers": ",".join(map(str, plan.layers)),
        "labels": None if plan.labels is None else ",".join(plan.labels.dtypes),
        "dtype": options.dtype,
        "precision": options.precision,
        "compile": str(options.compile).lower(),
        "batch_size": str(options.batch_size),
        "seed": str(options.seed),
        "n_samples": str(len(plan.indices)),
        "dataset": plan.dataset.source,
        "dataset_rows": str(len(plan.dataset)),
        "dataset_layout_sha256": plan.dataset.layout_sha256,
        "sampling": plan.sampling,
        "where": options.where.text if isinstance(options.where, Expression) else None,
        "steps": plan.sampling.removeprefix("steps ") if options.steps is not None else None,
        "format_version": _FORMAT_VERSION,
        "dump_activations_version": _rust.__version__,
        "torch_version": torch.__version__,
    }
    return {name: text for name, text in entries.items() if text is not None}


def fingerprint(plan: Plan) -> dict[str, str]:
    """Name everything that determines the values of a run's tensors, and nothing else.

    It is the same in all processes and on all machines: without paths, devices or threads.
    """
    digest = hashlib.sha256()
    for start in range(0, len(plan.indices), _DIGESTED_AT_ONCE):
        digest.update(plan.indices[start : start + _DIGESTED_AT_ONCE].data)
    split = {"split_layers": "true"} if plan.options.split_layers else {}
    entries = metadata(plan)
    return {
        **{name: entries[name] for name in _IDENTITY if name in entries},
        **split,
        "config": repr(plan.model.config),
        "indices": digest.hexdigest(),
    }


def computed_by(plan: Plan) -> dict[str, str]:
    """Name what may change the last bits of a result: the device, and threads on a CPU."""
    if plan.device.type == "cuda":
        return {"device": torch.cuda.get_device_name(plan.device)}
    name = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    return {"device": name, "threads": str(torch.get_num_threads())}


def _step_indices(dataset: StepsDataset, options: Options) -> tuple[StepIndices, str]:
    """Return the step indices of a run, and how they were chosen."""
    phases.begin("choosing the steps")
    if options.indices is not None:
        assert not isinstance(options.indices, os.PathLike)
        return dataset.check_indices(options.indices), "given"
    assert not isinstance(options.steps, str)
    progress = options.scan_progress
    if options.where is not None:
        progress = phases.counted(phases.Phase("scanning the dataset", "rows"), also=progress)
    steps = dataset.matches(options.where, options.steps, progress=progress)
    if options.steps is None:
        replaced = options.n_samples > len(steps)
        sample = dataset.sample_from(steps, options.n_samples, options.seed)
        return sample, "with replacement" if replaced else "without replacement"
    if len(steps) == 0:
        raise IndicesError(f"{option('where')}: no row of {dataset.path} matches")
    wanted = range(len(dataset))[options.steps]
    return steps, f"steps {wanted.start}:{wanted.stop}:{wanted.step}"


@dataclass(frozen=True)
class Preview:
    """The output of a plan, known before any forward pass.

    Attributes:
        output: the file, or the name or URL of its shards; None if nothing is written.
        free_nbytes: free space of the disk; None if it is unknown or nothing is written.
        shards: boards of each shard to write, in order; empty for one file.
    """

    plan: Plan
    tensors: Sequence[TensorSpec]
    output: Path | str | None = None
    free_nbytes: int | None = None
    shards: Mapping[Path, int] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """All but the tensors, in one line."""
        it = self.as_dict()
        work = f"{it['boards']:,} boards of {', '.join(it['keys'])}: {size_text(it['bytes'])}"
        if self.output is None:
            return f"{work}, not written"
        shards = ""
        if self.shards:
            several = "1 shard" if len(self.shards) == 1 else f"{len(self.shards):,} shards"
            shards = f" in {several} of at most {max(self.shards.values()):,} boards"
        free = "" if self.free_nbytes is None else f"; {size_text(self.free_nbytes)} free"
        return f"{work} to {self.output}{shards}{free}"

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, ready for JSON."""
        return {
            "boards": sum(self.shards.values()) if self.shards else len(self.plan.indices),
            "keys": [each.key for each in self.plan.activations],
            "bytes": sum(each.nbytes for each in self.tensors),
            "output": None if self.output is None else str(self.output),
            "free_bytes": self.free_nbytes,
            "shards": {str(path): boards for path, boards in self.shards.items()},
            "tensors": [
                {"key": each.name, "dtype": each.dtype, "shape": each.shape, "bytes": each.nbytes}
                for each in self.tensors
            ],
        }
