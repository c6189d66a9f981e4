"""What a run consists of once everything it needs is loaded and checked: model, boards, tensors."""

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dump_activations.board import CELLS
from dump_activations.checkpoint import load_encoder
from dump_activations.dataset import StepsDataset
from dump_activations.device import find_device
from dump_activations.encoder import Encoder
from dump_activations.errors import DumpActivationsWarning, InvalidArgumentError
from dump_activations.options import STORAGE_DTYPES, Options
from dump_activations.output.layout import TensorSpec

_LARGE_TENSOR = 8 << 30


@dataclass(frozen=True)
class Work:
    """A run that is ready to start.

    Attributes:
        model: in eval mode, on `device`.
        dataset: where the boards come from.
        indices: global step indices, int64 (n,), all of them inside the dataset.
        weights: the asked-for parameters by their names in the file, on the host.
        options: what to compute and how.
        device: where the model runs.
    """

    model: Encoder
    dataset: StepsDataset
    indices: NDArray[np.int64]
    weights: dict[str, Tensor]
    options: Options
    device: torch.device

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype of the floating tensors in the output."""
        dtype = getattr(torch, STORAGE_DTYPES[self.options.dtype])
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def board_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one board's value for each asked-for board activation."""
        return {a.key: a.shape(self.model.config) for a in self.options.board_activations}

    def whole_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that do not come in batches: parameters, and the step indices."""
        weights = {name: tensor.to(self.storage_dtype) for name, tensor in self.weights.items()}
        return {**weights, "indices": torch.from_numpy(self.indices)}

    def tensor_specs(self) -> list[TensorSpec]:
        """Return every tensor of the output file; the first axis of all but the parameters is n."""
        n, dtype = len(self.indices), STORAGE_DTYPES[self.options.dtype]
        return [
            *(TensorSpec(key, dtype, (n, *shape)) for key, shape in self.board_shapes.items()),
            *(TensorSpec(name, dtype, tuple(w.shape)) for name, w in self.weights.items()),
            TensorSpec("indices", "int64", (n,)),
            TensorSpec("boards", "uint8", (n, CELLS)),
        ]

    def metadata(self) -> dict[str, str]:
        """Describe the run for the output file, string to string."""
        config = self.model.config
        return {
            "checkpoint": self.model.checkpoint,
            "hidden_size": str(config.hidden_size),
            "num_layers": str(config.num_hidden_layers),
            "head_type": config.head_type,
            "n_bins": str(config.logits_shape[-1]),
            "n_samples": str(len(self.indices)),
            "seed": str(self.options.seed),
            "dtype": self.options.dtype,
            "outputs": ",".join(sorted(set(self.options.keys))),
            "precision": self.options.precision,
            "compile": str(self.options.compile).lower(),
            "random_init": str(self.model.random_init).lower(),
        }

    def fingerprint(self) -> str:
        """Digest everything that determines the bytes of the output file.

        Of the dataset it takes the shards' names, sizes and layout, not their rows.
        """
        digest = hashlib.sha256(repr(self.model.config).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        shards = [(Path(path).name, rows) for path, rows, _first in self.dataset.shards]
        digest.update(repr((shards, self.dataset.dtype)).encode())
        digest.update(self.indices.data)
        digest.update(repr((self.metadata(), self.options.batch_size, self.device.type)).encode())
        return digest.hexdigest()


def prepare(
    init: str | os.PathLike[str] | Encoder,
    dataset: str | os.PathLike[str] | StepsDataset,
    *,
    options: Options,
    indices: ArrayLike | None,
) -> Work:
    """Load and check everything a run needs, before any forward pass.

    Raises:
        DumpActivationsError: names what is wrong with the call, a file or the machine.
    """
    device = find_device(options.device)
    if not isinstance(dataset, StepsDataset):
        dataset = StepsDataset(dataset)
    if isinstance(init, Encoder):
        if options.random_init:
            raise InvalidArgumentError(
                "random_init: the model is loaded already; give load_encoder random_init=True"
            )
        model = init.to(device).eval()
    else:
        model = load_encoder(init, device=device, random_init=options.random_init)
    if indices is None:
        if options.n_samples is None:
            raise InvalidArgumentError("n_samples: give a number, or indices")
        steps = dataset.sample_indices(options.n_samples, seed=options.seed)
    else:
        steps = dataset.check_indices(indices)
    weights = {
        name: tensor.detach().cpu()
        for activation in options.weight_activations
        for name, tensor in activation.tensors(model).items()
    }
    return Work(model, dataset, steps, weights, options, device)


def warn_of_large_tensors(specs: Sequence[TensorSpec]) -> None:
    """Warn of each tensor that will take 8 GiB or more on disk."""
    for spec in specs:
        if spec.nbytes >= _LARGE_TENSOR:
            warnings.warn(
                f"{spec.name} will take {spec.nbytes / 2**30:.1f} GiB; fewer boards (--n-samples) "
                "or --dtype fp16 or bf16 make it smaller",
                DumpActivationsWarning,
                stacklevel=2,
            )
