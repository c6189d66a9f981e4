"""The options of a run, checked before torch is imported or any file is opened."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dump_activations.activations import (
    Activation,
    BoardActivation,
    WeightActivation,
    find_activations,
)
from dump_activations.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

DEFAULT_SAMPLES = 1024
DEFAULT_BATCH_SIZE = 1024
DEFAULT_OUTPUTS = ("final_hidden",)
DEFAULT_OUTPUT = "activations.safetensors"
DEFAULT_SEED = 0
DEFAULT_DTYPE = "fp32"
DEFAULT_DEVICE = "cuda"
DEFAULT_PRECISION = "fp32"

PRECISIONS = ("fp32", "tf32", "bf16")

# --dtype -> the torch and NumPy name of the dtype.
STORAGE_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run computes and how, apart from its model, its dataset and its file.

    `outputs` is a sequence of activation keys, or one comma-separated string of them; `n_samples`
    is None where the step indices are given.

    Raises:
        InvalidArgumentError: a value that no model or dataset could make right.
        ActivationNotImplementedError: an activation key without an implementation.
    """

    outputs: str | Sequence[str]
    n_samples: int | None
    batch_size: int
    seed: int
    dtype: str
    device: str
    allow_cpu: bool
    random_init: bool
    precision: str
    compile: bool

    def __post_init__(self) -> None:
        if not isinstance(self.outputs, str):
            object.__setattr__(self, "outputs", tuple(self.outputs))
        # NumPy's integers and torch's devices are as good as Python's own.
        for name in ("n_samples", "batch_size", "seed"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, operator.index(value))
        object.__setattr__(self, "device", str(self.device))
        find_activations(self.keys)
        if self.n_samples is not None:
            _check_at_least(1, "--n-samples", self.n_samples)
        _check_at_least(1, "--batch-size", self.batch_size)
        _check_at_least(0, "--seed", self.seed)
        _check_choice("--dtype", self.dtype, STORAGE_DTYPES)
        _check_choice("--precision", self.precision, PRECISIONS)
        self._check_device()

    def _check_device(self) -> None:
        kind, colon, index = self.device.partition(":")
        if kind == "cuda" and (not colon or (index.isascii() and index.isdecimal())):
            return
        if self.device != "cpu":
            raise InvalidArgumentError(f"--device: {self.device!r} is neither cuda, cuda:N nor cpu")
        if not self.allow_cpu:
            raise InvalidArgumentError(
                "--device: cpu is not a CUDA device; --allow-cpu runs on the CPU all the same"
            )

    @property
    def keys(self) -> list[str]:
        """The asked-for activation keys, as they were given."""
        keys = self.outputs.split(",") if isinstance(self.outputs, str) else self.outputs
        return [key.strip() for key in keys if key.strip()]

    @property
    def board_activations(self) -> list[BoardActivation]:
        """The asked-for activations that have one value a board."""
        return [a for a in self._activations if isinstance(a, BoardActivation)]

    @property
    def weight_activations(self) -> list[WeightActivation]:
        """The asked-for keys that dump the model's own parameters."""
        return [a for a in self._activations if isinstance(a, WeightActivation)]

    @property
    def _activations(self) -> list[Activation]:
        return find_activations(self.keys)


def _check_at_least(least: int, flag: str, value: int) -> None:
    if value < least:
        raise InvalidArgumentError(f"{flag}: must be {least} or more, not {value}")


def _check_choice(flag: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise InvalidArgumentError(f"{flag}: {value!r} is not one of {', '.join(choices)}")
