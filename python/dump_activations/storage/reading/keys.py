"""Activation keys of a file: where the values of each are stored, and which layers they are of.

Shape letters: N boards, L layers kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from dump_activations.dtypes import LABEL_PREFIX, STATISTICS_PREFIX, TensorSpec
from dump_activations.errors import (
    InvalidArgumentError,
    MissingKeyError,
    OutputError,
    did_you_mean,
    option,
)
from dump_activations.model.activations import ACTIVATIONS, WeightActivation, split_layer_alias
from dump_activations.storage.formats.layout import StoredTensor

_OF_RUN = ("indices", "boards")

# Tensors with a first axis of boards and no axis of layers.
_WITHOUT_LAYERS = {*_OF_RUN, *(each.key for each in ACTIVATIONS if not each.per_layer)}

# Tensors of a dump without an axis of boards, of any first length.
_WITHOUT_BOARDS = tuple(each.key for each in ACTIVATIONS if isinstance(each, WeightActivation))

_ALIASES = {each.alias: each.key for each in ACTIVATIONS if each.alias}
_LAYER = re.compile("0|[1-9][0-9]{,8}")


class Part(NamedTuple):
    """The values at `at` of each row of a stored tensor, whose rows are `of` equal parts."""

    tensor: str
    of: int = 1
    at: int = 0


@dataclass(frozen=True)
class Key:
    """An activation key, one layer of it, or one stored tensor by its own name."""

    name: str  # the key, or the tensor's name
    dtype: str  # NumPy's name
    value: tuple[int, ...]  # of one board per layer, or of a whole tensor without boards
    parts: tuple[Part, ...]  # one tensor, or a tensor per layer
    layers: tuple[int, ...] | None = None  # numbers of the layers along their axis; None without it
    in_model: int | None = None  # layers of the model, kept or not; None if unknown
    of_boards: bool = True  # the first axis is the boards

    @property
    def is_split(self) -> bool:
        """True where each layer is a tensor of its own."""
        return self.layers is not None and self.parts[0].tensor != self.name

    def shape(self, boards: int) -> tuple[int, ...]:
        """Shape of the values of a number of boards."""
        layers = () if self.layers is None else (len(self.layers),)
        return (*((boards,) if self.of_boards else ()), *layers, *self.value)

    def layer(self, number: int) -> Key:
        """Return one layer by its number in the model; negative ones count from its last."""
        layers = self.layers or ()
        counted = number + (self.in_model or 0) if number < 0 else number
        if counted in layers:
            return self.pick(layers.index(counted))
        has = f"layers {', '.join(map(str, layers))}" if layers else "no layers"
        if layers and number < 0 and self.in_model is None:
            has += ", and the file does not say how many layers its model has"
        raise InvalidArgumentError(f"{option('layer', number)}: {self.name} has {has}")

    def pick(self, places: int | slice) -> Key:
        """Return layers by their places on the axis, of which a number drops the axis."""
        layers = self.layers or ()
        parts = self.parts
        if len(parts) < len(layers):  # stacked
            parts = tuple(Part(self.name, len(layers), at) for at in range(len(layers)))
        if not isinstance(places, slice):
            return replace(self, parts=(parts[places],), layers=None)
        if layers[places] == layers:
            return self
        return replace(self, parts=parts[places], layers=layers[places])


class Catalog:
    """Everything that can be read from a file: `boards`, `keys` and `tensors` by name."""

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, StoredTensor | TensorSpec],
        metadata: Mapping[str, str],
    ) -> None:
        self._path = path
        self.tensors = tensors
        lengths = {name: (*tensor.shape, 0)[0] for name, tensor in self.tensors.items()}
        counts = {lengths["indices"]} if "indices" in lengths else set(lengths.values())
        if len(counts) != 1:
            raise OutputError(f"{path} is not a dump: its tensors have different first axes")
        self.boards = counts.pop()
        self._in_model, self._layers = self._find_layers(metadata)
        self.keys = self._find_keys()

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers that keys have."""
        return sorted({layer for key in self.keys.values() for layer in key.layers or ()})

    def find(self, name: str) -> Key:
        """Find a key, a layer of one, or a tensor, by any name that `outputs` takes or its own."""
        if name in self.keys:
            return self.keys[name]
        if name in self.tensors:
            return self._key_of(self.tensors[name])
        alias, layer = split_layer_alias(name) or (name, None)
        key = self.keys.get(_ALIASES.get(alias, ""))
        if key is not None:
            return key if layer is None else key.layer(layer)
        others = [other for other in self.tensors if _split_name(other)[0] not in self.keys]
        known = [*self.keys, *others]
        raise MissingKeyError(
            f"{self._path}: no {name!r} in it{did_you_mean(name, known)}, only "
            f"{', '.join(known) or 'nothing'}"
        )

    def _find_layers(self, metadata: Mapping[str, str]) -> tuple[int | None, tuple[int, ...]]:
        """Return the model's layers, and those kept; older dumps keep all, others name none."""
        number = metadata.get("num_layers", "")
        in_model = int(number) if number.isdecimal() and len(number) < 5 else None
        layers = metadata.get("layers") or ",".join(map(str, range(in_model or 0)))
        try:
            return in_model, tuple(int(layer) for layer in layers.split(",") if layer)
        except ValueError:
            raise OutputError(f"{self._path}: its layers are {layers[:80]!r}") from None

    def _find_keys(self) -> dict[str, Key]:
        keys: dict[str, Key] = {}
        for tensor in self.tensors.values():
            key = self._key_of(tensor)
            if not key.of_boards or tensor.name in _OF_RUN or tensor.name.startswith(LABEL_PREFIX):
                continue
            name, layer = _split_name(tensor.name)
            others = keys.get(name, replace(key, layers=(), parts=()))
            if (
                layer in self._layers
                and name not in self.tensors
                and (others.dtype, others.value) == (key.dtype, key.value)
            ):
                found = dict(zip(others.layers or (), others.parts, strict=True))
                found[layer] = Part(tensor.name)
                layers, parts = zip(*sorted(found.items()), strict=True)
                key = replace(key, name=name, layers=layers, parts=parts, in_model=self._in_model)
            keys[key.name] = key
        return keys

    def _key_of(self, tensor: StoredTensor | TensorSpec) -> Key:
        """Describe one stored tensor."""
        name, shape, layers = tensor.name, tensor.shape, self._layers
        parts = (Part(name),)
        outside = (*_WITHOUT_BOARDS, STATISTICS_PREFIX)
        if not shape or shape[0] != self.boards or name.startswith(outside):
            return Key(name, tensor.dtype, shape, parts, of_boards=False)
        of_one_layer = name.startswith(LABEL_PREFIX) or _split_name(name)[1] is not None
        if name in _WITHOUT_LAYERS or of_one_layer or not layers or shape[1:2] != (len(layers),):
            return Key(name, tensor.dtype, shape[1:], parts)
        return Key(name, tensor.dtype, shape[2:], parts, layers, self._in_model)


def _split_name(name: str) -> tuple[str, int | None]:
    """Split `KEY.LAYER`; any other name has no layer."""
    key, _, layer = name.rpartition(".")
    return (key, int(layer)) if _LAYER.fullmatch(layer) and key else (name, None)
