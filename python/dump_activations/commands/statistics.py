"""What `inspect-activations --stats` shows of the activations in a file."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dump_activations.commands.tables import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dump_activations.storage.statistics import TensorStatistics

_NUMBERS = ("vectors", "mean norm", "rms", "min", "max", "outliers")


def as_dict(statistics: Mapping[str, TensorStatistics]) -> dict[str, dict[str, Any]]:
    """Return all statistics of each tensor, ready for JSON; null is what is no finite number."""
    return {
        tensor: {name: _plain(values.tolist()) for name, values in of_tensor.items()}
        for tensor, of_tensor in statistics.items()
    }


def table(statistics: Mapping[str, TensorStatistics], layers: Sequence[int]) -> Table:
    """Show a line a tensor and layer.

    Args:
        statistics: of each tensor.
        layers: numbers of those that are stacked in a tensor; none where that is not known.
    """
    rows = [
        row for tensor, of_tensor in statistics.items() for row in _rows(tensor, of_tensor, layers)
    ]
    return Table(("statistics", "layer", *_NUMBERS), rows, _NUMBERS)


def _rows(tensor: str, found: TensorStatistics, layers: Sequence[int]) -> Iterator[list[str]]:
    is_stacked = found["mean"].ndim == 2
    for at in range(len(found["count"])):
        of = {name: values[at] if is_stacked else values for name, values in found.items()}
        mean_square = of["mean_squared_norm"].item() / of["mean"].size
        yield [
            tensor,
            str(layers[at]) if is_stacked and at < len(layers) else "",
            f"{of['count'].item():,.0f}",
            f"{of['norm_mean'].item():.5g}",
            f"{math.sqrt(mean_square):.5g}",
            f"{of['min'].min():.5g}",
            f"{of['max'].max():.5g}",
            f"{of['count_abs_gt_6'].sum():,.0f}",
        ]


def _plain(values: Any) -> Any:
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return values if math.isfinite(values) else None
