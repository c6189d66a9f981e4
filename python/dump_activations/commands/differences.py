"""What `inspect-activations` shows of two files."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dump_activations.commands.contents import shortened
from dump_activations.commands.tables import Table
from dump_activations.dtypes import STATISTICS_PREFIX
from dump_activations.text import shape_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from dump_activations.storage.formats.contents import StoredTensor
    from dump_activations.storage.reading.comparison import (
        Comparison,
        Difference,
        TensorPair,
    )


def as_dict(first: Path, second: Path, comparison: Comparison) -> dict[str, object]:
    """Return all that differs in two files, ready for JSON."""
    return {
        "files": [str(first), str(second)],
        "equal": comparison.is_equal,
        "metadata": comparison.metadata,
        "tensors": [_pair_dict(pair) for pair in comparison.tensors],
    }


def _pair_dict(pair: TensorPair) -> dict[str, Any]:
    both = (pair.first, pair.second)
    return {
        "key": pair.name,
        "equal": pair.is_equal,
        "dtypes": [tensor and tensor.dtype for tensor in both],
        "shapes": [tensor and tensor.shape for tensor in both],
        "difference": pair.difference and asdict(pair.difference),
    }


def parts(first: Path, second: Path, comparison: Comparison) -> Iterator[str | Table]:
    """Yield what people are shown of two files: the same, as lines and tables."""
    yield f"a: {first}"
    yield f"b: {second}"
    if comparison.metadata:
        rows = [
            row
            for key, texts in comparison.metadata.items()
            for row in zip((key, ""), "ab", map(_text, texts), strict=True)
        ]
        yield Table(("metadata", "", "value"), rows)
    shapes = [
        (pair.name, _described(pair.first), _described(pair.second))
        for pair in _shown(comparison)
        if _described(pair.first) != _described(pair.second)
    ]
    if shapes:
        yield Table(("tensor", "a", "b"), shapes)
    found = {
        pair.name: (pair.difference, math.prod(pair.first.shape))
        for pair in _shown(comparison)
        if pair.first is not None and pair.difference is not None and pair.difference.elements
    }
    if found:
        yield _value_table(found)
    if comparison.metadata or shapes or found:
        yield ""
    yield _verdict(comparison)


def _shown(comparison: Comparison) -> list[TensorPair]:
    """Return what differs, but for statistics where that of which they are does too."""
    differing = [pair for pair in comparison.tensors if not pair.is_equal]
    return [pair for pair in differing if not _is_statistics(pair)] or differing


def _is_statistics(pair: TensorPair) -> bool:
    return pair.name.startswith(STATISTICS_PREFIX)


def _text(value: str | None) -> str:
    return "-" if value is None else shortened(value)


def _described(tensor: StoredTensor | None) -> str:
    return "-" if tensor is None else f"{tensor.dtype} {shape_text(tensor.shape)}"


def _value_table(found: Mapping[str, tuple[Difference, int]]) -> Table:
    """Show how values differ: name -> the difference, and how many values there are."""
    with_nonfinite = any(difference.nonfinite for difference, _ in found.values())
    numbers = ["differing", "share", *["not finite"] * with_nonfinite, "largest", "relative"]

    def row(name: str, difference: Difference, elements: int) -> list[str]:
        cells = [name, f"{difference.elements:,}", f"{difference.elements / elements:.2%}"]
        if with_nonfinite:
            cells.append(f"{difference.nonfinite:,}")
        if difference.place is None:
            return [*cells, "-", "-", "-"]
        place = ", ".join(map(str, difference.place))
        return [*cells, _figure(difference.largest), f"{difference.relative:.2g}", f"[{place}]"]

    rows = [row(name, *values) for name, values in found.items()]
    return Table(("tensor", *numbers, "largest at"), rows, numbers)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= value < 1e15 else f"{value:.3g}"


def _verdict(comparison: Comparison) -> str:
    differing = [pair for pair in comparison.tensors if not pair.is_equal]
    if not differing:
        return f"all {len(comparison.tensors):,} tensors are equal"
    text = f"{len(differing):,} of {len(comparison.tensors):,} tensors differ"
    if statistics := sum(map(_is_statistics, differing)):
        text += f", {statistics:,} of them statistics"
    if "indices" in [pair.name for pair in differing]:
        text += "; their rows are of other boards, so that values tell little"
    return text
