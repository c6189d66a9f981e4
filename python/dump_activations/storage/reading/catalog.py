"""Which activation keys a file has, and where the layers of each are.

Shape letters: N boards, L layers of those kept.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dump_activations.dtypes import LABEL_PREFIX, STATISTICS_PREFIX
from dump_activations.errors import InvalidArgumentError, OutputError, option
from dump_activations.storage.formats.contents import Contents, StoredTensor

# Of the tensors with a first axis of boards, those that have no axis of layers.
_WITHOUT_LAYERS = frozenset(
    {"indices", "boards", "final_hidden", "pooled", "head_logits", "head_probs"}
)

_LAYER = re.compile("0|[1-9][0-9]{,8}")

# Tensors of a dump that are not of boards, whatever their first axis.
_NOT_OF_BOARDS = ("rmsnorm_gammas/", "attn_sinks", STATISTICS_PREFIX)


@dataclass(frozen=True)
class Key:
    """A tensor as it is asked for: an activation key, or one stored tensor by its own name.

    Attributes:
        name: what it is called.
        dtype: NumPy's name of it.
        value: shape of one board's value, of one layer where it has layers; of the whole tensor
            where that has no axis of boards.
        layers: numbers of the layers that it has, in their order; None where it has no such axis.
        is_split: whether each layer is a tensor of its own.
        of_boards: whether the first axis is that of the boards.
    """

    name: str
    dtype: str
    value: tuple[int, ...]
    layers: tuple[int, ...] | None = None
    is_split: bool = False
    of_boards: bool = True

    @property
    def stacked(self) -> int | None:
        """How many layers are stacked in a stored tensor of it; None where it has no such axis."""
        return None if self.is_split or self.layers is None else len(self.layers)

    def shape(self, boards: int, layer: int | None = None) -> tuple[int, ...]:
        """Shape of the values of so many boards, of one layer or of all."""
        first = (boards,) if self.of_boards else ()
        layers = (len(self.layers),) if self.layers is not None and layer is None else ()
        return (*first, *layers, *self.value)

    def parts(self, layer: int | None) -> list["Part"]:
        """Say where the values of a layer are, or of all of them in order.

        Raises:
            InvalidArgumentError: there is no such layer.
        """
        if layer is not None and layer not in (self.layers or ()):
            has = f"layers {_listed(self.layers)}" if self.layers else "no layers"
            raise InvalidArgumentError(f"{option('layer', layer)}: {self.name} has {has}")
        if self.is_split:
            assert self.layers is not None
            wanted = self.layers if layer is None else (layer,)
            return [Part(f"{self.name}.{number}") for number in wanted]
        if layer is None or self.layers is None:
            return [Part(self.name)]
        return [Part(self.name, of=len(self.layers), at=self.layers.index(layer))]


@dataclass(frozen=True)
class Part:
    """Of each row of a stored tensor, part `at` of so many equal ones."""

    tensor: str
    of: int = 1
    at: int = 0


class Catalog:
    """What can be asked for of a file.

    Attributes:
        boards: N.
        keys: activation keys by name, with those that are split as one.
        tensors: stored tensors by name.

    Raises:
        OutputError: its tensors have no first axis in common.
    """

    def __init__(self, path: Path, contents: Contents) -> None:
        self._path = path
        self.tensors = {tensor.name: tensor for tensor in contents.tensors}
        self.boards = self._count_boards()
        self._layers = self._find_layers(contents.metadata)
        self.keys = self._find_keys()

    def find(self, name: str) -> Key:
        """Find an activation key, or a tensor by its own name.

        Raises:
            InvalidArgumentError: there is none; the text names those there are.
        """
        if name in self.keys:
            return self.keys[name]
        if name in self.tensors:
            return self._key_of(self.tensors[name])
        has = _listed([*self.keys, *self._others])
        raise InvalidArgumentError(f"{self._path}: no {name!r} in it, only {has}")

    @property
    def labels(self) -> list[str]:
        """Names of the labels."""
        names = (name for name in self.tensors if name.startswith(LABEL_PREFIX))
        return [name.removeprefix(LABEL_PREFIX) for name in names]

    @property
    def _others(self) -> list[str]:
        return [name for name in self.tensors if _split_name(name)[0] not in self.keys]

    def _count_boards(self) -> int:
        """Return the length of the first axis: of `indices`, or of all where there are none."""
        lengths = {name: (*tensor.shape, 0)[0] for name, tensor in self.tensors.items()}
        counts = {lengths["indices"]} if "indices" in lengths else set(lengths.values())
        if len(counts) != 1:
            raise OutputError(f"{self._path} is no dump: its tensors have no first axis in common")
        return counts.pop()

    def _find_layers(self, metadata: Mapping[str, str]) -> tuple[int, ...]:
        """Return the numbers of the layers kept; none where the file says nothing of them."""
        layers = metadata.get("layers") or ",".join(map(str, range(_number(metadata))))
        try:
            return tuple(int(layer) for layer in layers.split(",") if layer)
        except ValueError:
            raise OutputError(f"{self._path}: its layers are {layers[:80]!r}") from None

    def _find_keys(self) -> dict[str, Key]:
        keys: dict[str, Key] = {}
        for tensor in self.tensors.values():
            key = self._key_of(tensor)
            is_label = tensor.name.startswith(LABEL_PREFIX)
            if not key.of_boards or is_label or tensor.name in ("indices", "boards"):
                continue
            name, layer = _split_name(tensor.name)
            if layer is not None and layer in self._layers:
                alone = replace(key, name=name, layers=(layer,), is_split=True)
                others = keys.get(name, alone)
                if replace(others, layers=alone.layers) == alone:
                    layers = {*(others.layers or ()), layer}
                    key = replace(alone, layers=tuple(sorted(layers)))
            keys[key.name] = key
        return keys

    def _key_of(self, tensor: StoredTensor) -> Key:
        """Describe one stored tensor."""
        name, shape = tensor.name, tensor.shape
        if not shape or shape[0] != self.boards or name.startswith(_NOT_OF_BOARDS):
            return Key(name, tensor.dtype, shape, of_boards=False)
        layers = self._layers
        of_one_layer = name.startswith(LABEL_PREFIX) or _split_name(name)[1] is not None
        if name in _WITHOUT_LAYERS or of_one_layer or not layers or shape[1:2] != (len(layers),):
            return Key(name, tensor.dtype, shape[1:])
        return Key(name, tensor.dtype, shape[2:], layers)


def _split_name(name: str) -> tuple[str, int | None]:
    """Take `KEY.LAYER` apart; any other name has no layer."""
    key, _, layer = name.rpartition(".")
    return (key, int(layer)) if _LAYER.fullmatch(layer) and key else (name, None)


def _number(metadata: Mapping[str, str]) -> int:
    """Layers of the model, all of which older dumps have."""
    text = metadata.get("num_layers", "")
    return int(text) if text.isdecimal() and len(text) < 5 else 0


def _listed(names: Iterable[object] | None) -> str:
    return ", ".join(map(str, names or ())) or "nothing"
