"""Every option of a run, once: its name, default, check and description.

`dump`, `stream` and the command take them from the fields of these classes, so a new option is one
new field. They are checked before torch is imported or any file is opened.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from dump_activations.dataset.expressions import Expression, parse, split_names
from dump_activations.dtypes import STORAGE_DTYPES
from dump_activations.errors import InvalidArgumentError, option, switch
from dump_activations.model.activations import find_activations
from dump_activations.model.layers import Layers, parse_layers
from dump_activations.progress import Count

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def _progress(name: str, value: Any) -> Count | bool:
    if value is not None and not isinstance(value, bool) and not callable(value):
        raise InvalidArgumentError(
            f"{option(name)}: {value!r} is neither True, for a bar, nor to be called"
        )
    return value or False


DEFAULT_OUTPUT = "activations.safetensors"

TENSORS = ("own", "borrowed", "device")

PRECISIONS = ("fp32", "tf32", "bf16", "bf16-true")

_Check = Callable[[str, Any], Any]


class Group(StrEnum):
    """What an option is about, as `--help` has it."""

    RUN = "What to run"
    KEEP = "What to keep"
    COMPUTE = "How to compute"
    AGAIN = "After an interruption"


@dataclass(frozen=True)
class Described:
    """An option as others show it.

    Attributes:
        name: of the field.
        default: its default.
        text: what it is.
        group: what it is about.
        choices: all values that it takes, where they are few.
    """

    name: str
    default: Any
    text: str
    group: Group
    choices: tuple[str, ...]


def _option(
    text: str,
    *,
    group: Group,
    default: Any,
    check: _Check = lambda _name, value: value,
    choices: Collection[str] = (),
) -> Any:
    """Describe an option; `check` gives the value as the run has it, or refuses it."""
    if choices:
        check = _one_of(choices)
    shown = {"help": text, "group": group, "choices": tuple(choices)}
    return field(default=default, metadata={**shown, "check": check})


def _whole_from(least: int) -> _Check:
    def check(name: str, value: Any) -> int:
        # NumPy's integers are as good as Python's own.
        try:
            number = operator.index(value)
        except TypeError:
            raise InvalidArgumentError(
                f"{option(name)}: must be a whole number, not {value!r}"
            ) from None
        if number < least:
            raise InvalidArgumentError(f"{option(name)}: must be {least} or more, not {number}")
        return number

    return check


def _one_of(choices: Collection[str]) -> _Check:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in choices:
            raise InvalidArgumentError(
                f"{option(name)}: {value!r} is not one of {', '.join(choices)}"
            )
        return value

    return check


def _keys(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    """Return what was asked for, as it was: a model says what a glob stands for."""
    try:
        keys = split_names(value)
    except (AttributeError, TypeError):
        raise InvalidArgumentError(
            f"{option(name)}: {value!r} is not a list of activation keys"
        ) from None
    find_activations(keys)
    return keys


def _labels(_name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    return split_names(value)


def _where(_name: str, value: str | Expression | None) -> Expression | None:
    return parse(value) if isinstance(value, str) else value


def _steps(name: str, value: str | slice | None) -> slice | None:
    if value is None:
        return None
    try:
        if isinstance(value, str):
            parts = [int(part) if part.strip() else None for part in value.split(":")]
            if len(parts) not in (2, 3):
                raise ValueError
            value = slice(*parts)
        if not isinstance(value, slice):
            raise TypeError
        # Python's own check of the three.
        step = range(1)[value].step
    except (TypeError, ValueError):
        raise InvalidArgumentError(
            f"{option(name)}: {value!r} is no START:STOP or START:STOP:STEP of whole numbers"
        ) from None
    if step < 1:
        raise InvalidArgumentError(f"{option(name)}: steps are taken in their order, not backwards")
    return value


def _device(name: str, value: object) -> str:
    text = str(value)
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", text):
        raise InvalidArgumentError(f"{option(name)}: {text!r} is neither cuda, cuda:N nor cpu")
    return text


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """What a run computes and how, apart from its model, its dataset and its file.

    Raises:
        InvalidArgumentError: a value that no model or dataset could make right.
        ActivationNotImplementedError: an activation key without an implementation.
    """

    outputs: str | Sequence[str] = _option(
        "comma-separated activation keys, globs of them (quoted: 'attn_*') or names of "
        "TransformerLens hooks without a layer",
        group=Group.KEEP,
        default=("final_hidden",),
        check=_keys,
    )
    layers: Layers | None = _option(
        f"layers to keep, as Python indexes them: {option('layers', '0,3,-1,4:8')}; all by default",
        group=Group.KEEP,
        default=None,
        check=parse_layers,
    )
    split_layers: bool = _option(
        "one tensor a layer, KEY.LAYER, in place of a stacked one", group=Group.KEEP, default=False
    )
    n_samples: int = _option(
        f"number of samples to draw (ignored with {option('indices')} or {option('steps')})",
        group=Group.RUN,
        default=1024,
        check=_whole_from(1),
    )
    indices: ArrayLike | None = _option(
        "global step indices to use instead of a draw; order and duplicates are kept",
        group=Group.RUN,
        default=None,
    )
    steps: slice | str | None = _option(
        "a stretch of the dataset in its order instead of a draw, START:STOP or START:STOP:STEP; "
        "':' is all of it",
        group=Group.RUN,
        default=None,
        check=_steps,
    )
    where: str | Expression | None = _option(
        "only steps for which an expression holds, such as 'max_rank >= 11 and run_id % 10 != 0', "
        "over fields of the rows and labels",
        group=Group.RUN,
        default=None,
        check=_where,
    )
    labels: str | Sequence[str] = _option(
        "comma-separated labels to store with the boards: fields of the rows, what the rules say "
        "of the board, what metadata.db says of the run, globs of them, or all for every field",
        group=Group.KEEP,
        default=(),
        check=_labels,
    )
    scan_progress: Count | None = _option(
        f"called while {option('where')} is looked for, with the rows done and the rows in all",
        group=Group.COMPUTE,
        default=None,
    )
    seed: int = _option(
        "seed of the draw, which is that of numpy.random.default_rng",
        group=Group.RUN,
        default=0,
        check=_whole_from(0),
    )
    batch_size: int = _option(
        "boards a forward pass", group=Group.COMPUTE, default=1024, check=_whole_from(1)
    )
    dtype: str = _option(
        "storage dtype of floating tensors",
        group=Group.KEEP,
        default="fp32",
        choices=STORAGE_DTYPES,
    )
    device: str = _option(
        f"compute device: cuda, cuda:N, or cpu with {switch('allow_cpu')}",
        group=Group.COMPUTE,
        default="cuda",
        check=_device,
    )
    allow_cpu: bool = _option(
        "accept a device that is not CUDA", group=Group.COMPUTE, default=False
    )
    random_init: bool = _option(
        "untrained weights in the checkpoint's architecture, as a control",
        group=Group.RUN,
        default=False,
    )
    precision: str = _option(
        "arithmetic of the forward pass (tf32 on CUDA only)",
        group=Group.COMPUTE,
        default="fp32",
        choices=PRECISIONS,
    )
    compile: bool = _option(
        "run the model through torch.compile", group=Group.COMPUTE, default=False
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value = each.metadata["check"](each.name, getattr(self, each.name))
            object.__setattr__(self, each.name, value)
        for other in ("steps", "where"):
            if self.indices is not None and getattr(self, other) is not None:
                raise InvalidArgumentError(
                    f"{option('indices')}: contradicts {option(other)}; leave out one of them"
                )
        if self.device == "cpu" and not self.allow_cpu:
            raise InvalidArgumentError(
                f"{option('device')}: cpu is not a CUDA device; {switch('allow_cpu')} runs "
                "on the CPU all the same"
            )
        if self.device == "cpu" and self.precision == "tf32":
            raise InvalidArgumentError(
                f"{option('precision')}: tf32 is CUDA's; use fp32 or bf16 on the CPU"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class DumpOptions(Options):
    """What a run computes and how, and what becomes of its file."""

    write: bool = _option(
        "write the file; without, the model is run and nothing is kept",
        group=Group.KEEP,
        default=True,
    )
    stats: bool = _option(
        "store statistics of each activation beside it: stats/KEY/mean and others",
        group=Group.KEEP,
        default=False,
    )
    resume: bool = _option(
        "do only what is missing: a complete file of the same work is left as it is",
        group=Group.AGAIN,
        default=False,
    )
    overwrite: bool = _option(
        "start anew, whatever an interrupted run left", group=Group.AGAIN, default=False
    )
    progress: Count | bool | None = _option(
        "True for a bar, or what is called after each batch with the boards done and the boards "
        "in all",
        group=Group.COMPUTE,
        default=None,
        check=_progress,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.overwrite:
            raise InvalidArgumentError(
                f"{option('resume')}: contradicts {option('overwrite')}; leave out one of them"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamOptions(Options):
    """What a run computes and how, and in which memory its batches are handed out."""

    tensors: str = _option(
        "whose a batch's tensors are: own, the caller's to keep; borrowed, of the run, in host "
        "memory, until the next batch; device, likewise but where they were computed, not copied",
        group=Group.KEEP,
        default="own",
        check=_one_of(TENSORS),
    )


def describe(options: type[Options]) -> list[Described]:
    """Describe an options class's fields, in their order."""
    return [
        Described(
            each.name,
            each.default,
            each.metadata["help"],
            each.metadata["group"],
            each.metadata["choices"],
        )
        for each in fields(options)
    ]
