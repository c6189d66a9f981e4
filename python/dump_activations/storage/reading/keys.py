"""Activation keys of a file, the layers of each, and the rows that are asked for.

Shape letters: N boards, L layers kept, R rows asked for.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dump_activations.dtypes import LABEL_PREFIX, STATISTICS_PREFIX
from dump_activations.errors import InvalidArgumentError, OutputError, RowIndexError, option
from dump_activations.storage.formats.layout import Contents, StoredTensor
from dump_activations.text import did_you_mean

Rows = ArrayLike | slice | None
"""Row numbers in any order, with repeats; a slice; a mask, bool (N,); None for all."""

# Tensors with a first axis of boards and no axis of layers.
_WITHOUT_LAYERS = frozenset(
    {"indices", "boards", "final_hidden", "pooled", "head_logits", "head_probs"}
)

# Tensors of a dump without an axis of boards, of any first length.
_NOT_OF_BOARDS = ("rmsnorm_gammas/", "attn_sinks", STATISTICS_PREFIX)

_LAYER = re.compile("0|[1-9][0-9]{,8}")


class Part(NamedTuple):
    """The values at `at` of each row of a stored tensor, whose rows are `of` equal parts."""

    tensor: str
    of: int = 1
    at: int = 0


@dataclass(frozen=True)
class Key:
    """An activation key, or one stored tensor by its own name.

    Attributes:
        name: the key, or the tensor's name.
        dtype: NumPy's name of it.
        value: shape of one board's value per layer, or of a whole tensor without boards.
        layers: numbers of the layers stored, in their order; None without an axis of layers.
        is_split: whether each layer is a tensor of its own.
        of_boards: whether the first axis is the boards.
    """

    name: str
    dtype: str
    value: tuple[int, ...]
    layers: tuple[int, ...] | None = None
    is_split: bool = False
    of_boards: bool = True

    @property
    def stacked(self) -> int | None:
        """Number of layers stacked in a stored tensor of the key; None without that axis."""
        return None if self.is_split or self.layers is None else len(self.layers)

    def shape(self, boards: int, layer: int | None = None) -> tuple[int, ...]:
        """Shape of the values of `boards` boards, of one layer or of all."""
        first = (boards,) if self.of_boards else ()
        layers = (len(self.layers),) if self.layers is not None and layer is None else ()
        return (*first, *layers, *self.value)

    def parts(self, layer: int | None) -> list[Part]:
        """Return where the values of a layer are stored, or of all layers in their order.

        Raises:
            InvalidArgumentError: the key does not have the layer.
        """
        if layer is not None and layer not in (self.layers or ()):
            has = f"layers {_listed(self.layers)}" if self.layers else "no layers"
            raise InvalidArgumentError(f"{option('layer', layer)}: {self.name} has {has}")
        layers = self.layers or ()
        if self.is_split:
            return [Part(f"{self.name}.{each}") for each in layers if layer in (each, None)]
        if layer is None:
            return [Part(self.name)]
        return [Part(self.name, of=len(layers), at=layers.index(layer))]


class Catalog:
    """Everything that can be read from a file, by name.

    Attributes:
        boards: N.
        keys: activation keys by name; a split key is one key.
        tensors: stored tensors by name.
    """

    def __init__(self, path: Path, contents: Contents) -> None:
        self._path = path
        self.tensors = {tensor.name: tensor for tensor in contents.tensors}
        lengths = {name: (*tensor.shape, 0)[0] for name, tensor in self.tensors.items()}
        counts = {lengths["indices"]} if "indices" in lengths else set(lengths.values())
        if len(counts) != 1:
            raise OutputError(f"{path} is not a dump: its tensors have different first axes")
        self.boards = counts.pop()
        self._layers = self._find_layers(contents.metadata)
        self.keys = self._find_keys()

    def find(self, name: str) -> Key:
        """Find an activation key, or a tensor by its own name.

        Raises:
            InvalidArgumentError: the file has neither; the text names those it has.
        """
        if name in self.keys:
            return self.keys[name]
        if name in self.tensors:
            return self._key_of(self.tensors[name])
        others = [other for other in self.tensors if _split_name(other)[0] not in self.keys]
        known = [*self.keys, *others]
        raise InvalidArgumentError(
            f"{self._path}: no {name!r} in it{did_you_mean(name, known)}, only {_listed(known)}"
        )

    def _find_layers(self, metadata: Mapping[str, str]) -> tuple[int, ...]:
        """Return the numbers of the layers kept; older dumps keep all, others name none."""
        number = metadata.get("num_layers", "")
        in_all = int(number) if number.isdecimal() and len(number) < 5 else 0
        layers = metadata.get("layers") or ",".join(map(str, range(in_all)))
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


def row_numbers(rows: Rows, boards: int, of: object) -> NDArray[np.int64]:
    """Return the numbers of rows `of` a file of `boards` boards, int64 (R,).

    Raises:
        InvalidArgumentError: rows are not integers (R,), and not a mask of all boards.
        RowIndexError: a row is negative or past the end.
    """
    if rows is None or isinstance(rows, slice):
        return np.arange(*(rows or slice(None)).indices(boards))
    numbers = np.asarray(rows)
    if numbers.shape == (0,):
        return np.empty(0, np.int64)
    if numbers.dtype == bool and numbers.shape == (boards,):
        return np.flatnonzero(numbers)
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        got = f"{numbers.dtype} {numbers.shape}" if numbers.ndim else f"a scalar, {rows!r}"
        raise InvalidArgumentError(
            f"{option('rows')} must be a 1-D integer array or a boolean mask of length {boards}; "
            f"got {got}"
        )
    outside = (numbers < 0) | (numbers >= boards)
    if outside.any():
        at = int(np.argmax(outside))
        raise RowIndexError(
            f"{option('rows')}: row {numbers[at]} at position {at} is not in {of}, which has "
            f"{boards} boards"
        )
    return np.ascontiguousarray(numbers, np.int64)


def _split_name(name: str) -> tuple[str, int | None]:
    """Split `KEY.LAYER`; any other name has no layer."""
    key, _, layer = name.rpartition(".")
    return (key, int(layer)) if _LAYER.fullmatch(layer) and key else (name, None)


def _listed(names: Iterable[object] | None) -> str:
    return ", ".join(map(str, names or ())) or "nothing"
