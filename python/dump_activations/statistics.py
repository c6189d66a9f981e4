"""The registry of statistics: what is stored of an activation's vectors beside them, by name.

A vector is what lies along the last axis of a tensor; each place in it is a feature. A new
statistic is one new entry in `STATISTICS`. Importing this module does not import NumPy.

Shape letters: L layers, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dump_activations.dtypes import TensorSpec

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

STATISTICS_PREFIX = "stats/"
"""Statistics of a tensor T are the tensors `stats/T/NAME`."""

FRACTION_BITS = 352
"""Exact sums are whole numbers of units of 2^-352."""

_ONE = 1 << FRACTION_BITS


@dataclass(frozen=True)
class Totals:
    """What is known of the vectors of a layer.

    The sums are exact. They are those of finite elements alone: `special` is what the others of a
    feature add up to, 0 where there are none, and `special_norms` the same of norms.

    Attributes:
        count: of the vectors.
        sums: of each feature's elements, in units of 2^-352.
        squares: of each feature's squared elements, in units of 2^-352.
        norms: of the vectors' norms, in units of 2^-352.
        special: float64 (F,).
        special_norms: infinite, NaN or 0.
        min: least element of each feature, float64 (F,); NaN where there is a NaN.
        max: likewise.
        outliers: elements beyond 6 in magnitude, float64 (F,).
    """

    count: int
    sums: list[int]
    squares: list[int]
    norms: int
    special: NDArray[Any]
    special_norms: float
    min: NDArray[Any]
    max: NDArray[Any]
    outliers: NDArray[Any]

    def mean(self) -> ArrayLike:
        """Return the mean of each feature."""
        return self.special + [total / (self.count * _ONE) for total in self.sums]

    def variance(self) -> ArrayLike:
        """Return the variance of each feature, about the mean of all there are."""
        n = self.count
        exact = [
            (n * square * _ONE - total * total) / (n * n * _ONE * _ONE)
            for total, square in zip(self.sums, self.squares, strict=True)
        ]
        return self.special * 0 + exact

    def norm_mean(self) -> ArrayLike:
        """Return the mean of the vectors' norms."""
        return self.special_norms + self.norms / (self.count * _ONE)

    def norm_square_mean(self) -> ArrayLike:
        """Return the mean of the vectors' squared norms."""
        return self.special_norms + sum(self.squares) / (self.count * _ONE)


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """An entry of the registry.

    Attributes:
        name: last part of the tensor's name.
        per_feature: whether there is a value a feature, or one of all vectors.
        text: what it is.
        value: Totals -> (F,) where `per_feature`, else one number.
    """

    name: str
    per_feature: bool
    text: str
    value: Callable[[Totals], ArrayLike]

    def shape(self, *, layers: int | None, width: int) -> tuple[int, ...]:
        """Shape of the tensor that holds it, of so many layers and features."""
        axes = () if layers is None else (layers,)
        return (*axes, width) if self.per_feature else axes or (1,)


STATISTICS: tuple[Statistic, ...] = (
    Statistic(
        name="count", per_feature=False, text="number of vectors", value=lambda totals: totals.count
    ),
    Statistic(name="mean", per_feature=True, text="mean of a feature", value=Totals.mean),
    Statistic(
        name="variance",
        per_feature=True,
        text="variance of a feature, of all vectors there are",
        value=Totals.variance,
    ),
    Statistic(
        name="min", per_feature=True, text="least of a feature", value=lambda totals: totals.min
    ),
    Statistic(
        name="max", per_feature=True, text="greatest of a feature", value=lambda totals: totals.max
    ),
    Statistic(
        name="outliers",
        per_feature=True,
        text="how many of a feature are beyond 6 in magnitude",
        value=lambda totals: totals.outliers,
    ),
    Statistic(
        name="norm_mean", per_feature=False, text="mean norm of a vector", value=Totals.norm_mean
    ),
    Statistic(
        name="norm_square_mean",
        per_feature=False,
        text="mean squared norm of a vector",
        value=Totals.norm_square_mean,
    ),
)


def statistics_specs(tensor: str, *, layers: int | None, width: int) -> list[TensorSpec]:
    """Return the tensors that hold the statistics of a tensor.

    Args:
        tensor: its name.
        layers: how many layers are stacked in it; None for a tensor without their axis.
        width: features of a vector.
    """
    return [
        TensorSpec(
            f"{STATISTICS_PREFIX}{tensor}/{each.name}",
            "float64",
            each.shape(layers=layers, width=width),
        )
        for each in STATISTICS
    ]


def values_of(totals: Iterable[Totals]) -> dict[str, NDArray[Any]]:
    """Return the statistics of some layers, float64 with a first axis of them, by name."""
    import numpy as np

    totals = list(totals)
    found = {}
    with np.errstate(invalid="ignore"):  # infinity less infinity is NaN, as anywhere
        for each in STATISTICS:
            # Zeros are positive and NaN is one value, whatever came first.
            values = np.array([each.value(layer) for layer in totals], np.float64) + 0.0
            found[each.name] = np.where(np.isnan(values), np.nan, values)
    return found
