"""Every option of a run, once: its name, default, check and description.

`dump`, `stream` and the command take them from the fields of these classes, so a new option is one
new field. They are checked before torch is imported or any file is opened.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self

from dump_activations.dataset.expressions import Expression, parse, split_names
from dump_activations.dtypes import STORAGE_DTYPES
from dump_activations.errors import InvalidArgumentError, did_you_mean, option, switch
from dump_activations.model.activations import (
    Layers,
    find_activations,
    parse_layers,
    split_layer_alias,
)
from dump_activations.progress import Count

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


DEFAULT_OUTPUT = "activations.safetensors"

TENSORS = ("copy", "view", "device")

PRECISIONS = ("fp32", "tf32", "bf16", "bf16-true")

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

# Names that other tools use.
_OTHER_NAMES = {
    "float32": "fp32",
    "float": "fp32",
    "float16": "fp16",
    "half": "fp16",
    "bfloat16": "bf16",
    "gpu": "cuda",
}

_Check = Callable[[str, Any], Any]


class Group(StrEnum):
    """The subject of an option, a heading of `--help`."""

    RUN = "What to run"
    KEEP = "What to keep"
    COMPUTE = "How to compute"
    SHARE = "Shards and processes"
    AGAIN = "After an interruption"


RUN, KEEP, COMPUTE, SHARE, AGAIN = Group


def _option(
    group: Group,
    text: str,
    *,
    default: Any,
    check: _Check | None = None,
    choices: Collection[str] = (),
) -> Any:
    """Describe an option that the command has too.

    `text` is its help, imperative, in at most 12 words: of the flag that turns it off, where it is
    on by default. `check` gives the value as the run has it, or refuses it. `choices` are all
    values that it takes.
    """
    check = check or (_one_of(choices) if choices else None)
    shown = {"group": group, "text": text, "choices": tuple(choices), "check": check}
    return field(default=default, metadata=shown)


def _wrong(name: str, text: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{option(name)}: {text}")


def _whole_from(least: int) -> _Check:
    def check(name: str, value: Any) -> int:
        try:
            number = operator.index(value)  # NumPy's integers have it too.
        except TypeError:
            raise _wrong(name, f"must be a whole number, not {value!r}") from None
        if number < least:
            raise _wrong(name, f"must be {least} or more, not {number}")
        return number

    return check


def _one_of(choices: Collection[str]) -> _Check:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in choices:
            listed = ", ".join(choices)
            raise _wrong(name, f"{value!r} is not one of {listed}{_hint(value, choices)}")
        return value

    return check


def _dtype(name: str, value: Any) -> Any:
    """Return the name of a storage dtype. A dtype of torch stands for itself."""
    of_torch = {f"torch.{each.name}": short for short, each in STORAGE_DTYPES.items()}
    short = value if isinstance(value, str) else of_torch.get(str(value), value)
    return _one_of(STORAGE_DTYPES)(name, short)


def _hint(value: object, choices: Collection[str]) -> str:
    return did_you_mean(_OTHER_NAMES.get(str(value).lower(), str(value)), choices)


def _keys(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    """Return what was asked for, as it was: a model says what a glob stands for."""
    try:
        keys = split_names(value)
    except (AttributeError, TypeError):
        raise _wrong(name, f"{value!r} is not a list of activation keys") from None
    keys = tuple("*" if key == "all" else key for key in keys)
    find_activations(keys)
    return keys


def _steps(name: str, value: str | slice | None) -> slice | None:
    if value is None:
        return None
    try:
        if isinstance(value, str):
            start, stop, *step = (int(part) if part.strip() else None for part in value.split(":"))
            value = slice(start, stop, *step)
        if not isinstance(value, slice):
            raise TypeError
        width = range(1)[value].step  # Python's own check of the three.
    except (TypeError, ValueError):
        text = f"must be START:STOP or START:STOP:STEP, of whole numbers; got {value!r}"
        raise _wrong(name, text) from None
    if width < 1:
        raise _wrong(name, "steps are taken in their order, not backwards")
    return value


def _size(name: str, value: int | str | None) -> int | None:
    """Return bytes: a number of them, or one with a decimal unit."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kMGT]?B)?", str(value).strip())
    nbytes = int(float(match[1]) * _UNITS[match[2] or "B"]) if match else 0
    if nbytes < 1:
        text = f"must be a size such as 4GB, 500MB or a number of bytes; got {value!r}"
        raise _wrong(name, text)
    return nbytes


def _shards(name: str, value: int | str | range | None) -> range | None:
    """Return the numbers of shards, counted from 1."""
    if value is None or (
        isinstance(value, range) and value.step == 1 and 1 <= value.start < value.stop
    ):
        return value
    match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", str(value).strip())
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        text = "must be a shard's number or a range such as 1-20, counted from 1"
        raise _wrong(name, f"{text}; got {value!r}")
    return range(first, last + 1)


def _device(name: str, value: object) -> str:
    text = str(value)
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", text):
        hint = _hint(text, ("cuda", "cpu", "cuda:0"))
        raise _wrong(name, f"{text!r} is neither cuda, cuda:N nor cpu{hint}")
    return text


def _progress(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, bool) and not callable(value):
        raise _wrong(name, f"must be True for a bar, or a function; got {value!r}")
    return value


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """The options of a run, apart from its model, its dataset and its output.

    Raises:
        InvalidArgumentError: a value that no model or dataset could make right.
        ActivationNotImplementedError: an activation key without an implementation.
    """

    outputs: str | Sequence[str] = _option(
        KEEP,
        "activation keys, separated by commas, or all; globs and TransformerLens names work",
        default=("final_hidden",),
        check=_keys,
    )
    layers: Layers | None = _option(
        KEEP,
        f"keep only these layers, indexed as in Python, e.g. {option('layers', '0,3,-1,4:8')}",
        default=None,
        check=parse_layers,
    )
    split_layers: bool = _option(
        KEEP, "write one tensor per layer, KEY.LAYER, instead of a stacked one", default=False
    )
    n_samples: int = _option(
        RUN,
        f"number of boards to sample (ignored with {option('indices')} or {option('steps')})",
        default=1024,
        check=_whole_from(1),
    )
    indices: ArrayLike | os.PathLike[str] | None = _option(
        RUN,
        "an .npy or .npz file, or a dump: global step indices to use instead of a sample; "
        "order and duplicates are kept",
        default=None,
    )
    steps: slice | str | None = _option(
        RUN,
        "take steps START:STOP or START:STOP:STEP in order instead of a sample; ':' is all",
        default=None,
        check=_steps,
    )
    where: str | Expression | None = _option(
        RUN,
        "take only steps that match an expression, e.g. 'max_exponent >= 9 and empty_cells < 4'",
        default=None,
        check=lambda _name, value: parse(value) if isinstance(value, str) else value,
    )
    labels: str | Sequence[str] = _option(
        KEEP,
        "labels to store per board, separated by commas, e.g. move_dir,max_exponent; or all fields",
        default=(),
        check=lambda _name, value: split_names(value),
    )
    scan_progress: Count | None = None
    seed: int = _option(
        RUN,
        "seed of the sample, as numpy.random.default_rng takes it",
        default=0,
        check=_whole_from(0),
    )
    batch_size: int = _option(
        COMPUTE, "boards per forward pass", default=1024, check=_whole_from(1)
    )
    dtype: str = _option(
        KEEP,
        "storage dtype of floating-point tensors",
        default="fp32",
        check=_dtype,
        choices=STORAGE_DTYPES,
    )
    device: str = _option(
        COMPUTE,
        f"compute device: cuda, cuda:N, or cpu with {switch('allow_cpu')}",
        default="cuda",
        check=_device,
    )
    allow_cpu: bool = _option(COMPUTE, "run on the CPU where there is no GPU", default=False)
    random_init: bool = _option(
        RUN, "use untrained weights in the checkpoint's architecture, as a control", default=False
    )
    precision: str = _option(
        COMPUTE,
        "arithmetic of the forward pass (tf32 on CUDA only)",
        default="fp32",
        choices=PRECISIONS,
    )
    compile: bool = _option(COMPUTE, "compile the model with torch.compile", default=False)
    cuda_graph: bool = _option(
        COMPUTE, "launch each kernel, in place of replaying batches as CUDA graphs", default=True
    )

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Take the options among the arguments of a call, which may be all its local names."""
        names = [each.name for each in fields(cls) if each.name in arguments]
        return cls(**{name: arguments[name] for name in names})

    def __post_init__(self) -> None:
        for each in fields(self):
            if check := each.metadata.get("check"):
                object.__setattr__(self, each.name, check(each.name, getattr(self, each.name)))
        for other in ("steps", "where"):
            if self.indices is not None and getattr(self, other) is not None:
                raise _wrong("indices", f"contradicts {option(other)}; leave out one of them")
        if self.layers is not None and any(map(split_layer_alias, self.outputs)):
            text = f"contradicts a key of {option('outputs')} that names its layer"
            raise _wrong("layers", f"{text}; leave out one of them")
        if self.device == "cpu" and not self.allow_cpu:
            raise _wrong("device", f"cpu is not a CUDA device; add {switch('allow_cpu')}")
        if self.device == "cpu" and self.precision == "tf32":
            raise _wrong("precision", "tf32 is CUDA's; use fp32 or bf16 on the CPU")


@dataclass(frozen=True, kw_only=True, eq=False)
class DumpOptions(Options):
    """The options of a run and its output."""

    write: bool = _option(KEEP, "run the model and write nothing", default=True)
    stats: bool = _option(
        KEEP, "store statistics of each activation, e.g. stats/KEY/mean", default=False
    )
    shard_size: int | str | None = _option(
        SHARE,
        "write shards of at most this size, e.g. 4GB, that several processes can share",
        default=None,
        check=_size,
    )
    shards: int | str | range | None = _option(
        SHARE,
        "write only these shards, e.g. 3 or 1-20, and return when they are done",
        default=None,
        check=_shards,
    )
    overwrite: bool = _option(
        AGAIN, "replace output of other work when the new one is whole", default=False
    )
    progress: Count | bool | None = field(default=None, metadata={"check": _progress})


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamOptions(Options):
    """The options of a run whose batches are yielded."""

    tensors: str = field(default="copy", metadata={"check": _one_of(TENSORS)})
