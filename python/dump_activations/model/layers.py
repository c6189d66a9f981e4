"""Which layers of a model are wanted: numbers and slices, as Python indexes them."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from reprlib import repr as brief
from typing import Any

from dump_activations.errors import InvalidArgumentError, option

Layers = str | Iterable[int | slice]
"""As text `0,3,-1,4:8`; or numbers and slices."""


def parse_layers(name: str, layers: Layers | None) -> tuple[int | slice, ...] | None:
    """Check what can be checked without a model; None stands for all layers.

    Args:
        name: the option to name in errors.
        layers: the option's value.

    Raises:
        InvalidArgumentError: neither numbers nor slices, or none of them.
    """
    if layers is None:
        return None
    try:
        items = layers.split(",") if isinstance(layers, str) else layers
        parsed = tuple(_parse_item(item) for item in items)
    except (TypeError, ValueError):
        raise InvalidArgumentError(
            f"{option(name)}: {brief(layers)} is not a list of numbers and slices such as "
            f"{option(name, '0,3,-1,4:8')}"
        ) from None
    if any(isinstance(item, slice) and item.step == 0 for item in parsed):
        raise InvalidArgumentError(f"{option(name)}: a slice's step cannot be 0")
    if not parsed:
        raise InvalidArgumentError(f"{option(name)}: no layers")
    return parsed


def _parse_item(item: Any) -> int | slice:
    """Return a number or a slice; TypeError or ValueError if it is neither."""
    if isinstance(item, str):
        if ":" not in item:
            return int(item)
        return slice(*(int(text) if text.strip() else None for text in item.split(":")))
    if isinstance(item, slice):
        bounds = [item.start, item.stop, item.step]
        return slice(*(None if bound is None else operator.index(bound) for bound in bounds))
    return operator.index(item)


def find_layers(name: str, layers: Layers | None, count: int) -> tuple[int, ...]:
    """Return the numbers of the wanted layers among `count`, each once and ascending.

    Raises:
        InvalidArgumentError: there is no such layer, or slices leave none.
    """
    numbers = range(count)
    parsed = parse_layers(name, layers)
    if parsed is None:
        return tuple(numbers)
    found: set[int] = set()
    for item in parsed:
        if isinstance(item, slice):
            found.update(numbers[item])
        elif -count <= item < count:
            found.add(numbers[item])
        else:
            raise InvalidArgumentError(
                f"{option(name)}: no layer {item}: the model has {count}, 0 to {count - 1}"
            )
    if not found:
        raise InvalidArgumentError(f"{option(name)}: the slices leave none of the {count} layers")
    return tuple(sorted(found))
