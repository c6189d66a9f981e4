"""Reading a dump the way its readers do: with the ordinary library of each format."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

FORMATS = (".safetensors", ".pt", ".npz")
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Dump:
    """The content of one file."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    def numpy(self, key: str) -> np.ndarray:
        """Return one tensor, floating ones as float64."""
        tensor = self.tensors[key]
        return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def read_dump(path: Path) -> Dump:
    """Open a finished file of any of the three formats."""
    match path.suffix:
        case ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        case ".pt":
            tensors = torch.load(path, weights_only=True)
            metadata = tensors.pop("metadata")
        case ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            document = arrays.pop("metadata")
            assert document.shape == ()
            metadata = json.loads(str(document))
            tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        case suffix:
            raise AssertionError(suffix)
    assert all(isinstance(text, str) for pair in metadata.items() for text in pair)
    return Dump(tensors, metadata)
