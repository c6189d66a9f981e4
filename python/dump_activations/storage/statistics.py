"""Statistics of activations in float64: taken per batch, and merged in order.

A vector lies along the last axis of a tensor, and each place in it is a feature. A new statistic is
one new entry in `STATISTICS`.

Shape letters: L layers (1 for a tensor without their axis), F features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from math import prod
from operator import add
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dump_activations import _rust
from dump_activations.dtypes import DTYPES, STATISTICS_PREFIX, TensorSpec

Array = NDArray[np.float64]

TensorStatistics = dict[str, Array]
"""Statistics of a tensor by name: (L, F) and (L,), or (F,) and (1,) of one without layers."""


@dataclass(frozen=True)
class Moments:
    """Mergeable state of some vectors of one tensor, all float64."""

    count: Array  # vectors per layer, (L,)
    mean: Array  # (L, F)
    m2: Array  # sum of squared deviations from the mean, (L, F)
    min: Array  # (L, F); NaN where there is a NaN
    max: Array  # (L, F); NaN where there is a NaN
    count_abs_gt_6: Array  # elements beyond 6 in magnitude, (L, F)
    norm_mean: Array  # mean of the vectors' norms, (L,)
    mean_squared_norm: Array  # mean of their squares, (L,)

    def __add__(self, following: "Moments") -> "Moments":
        """Return the moments of these vectors and the following ones, by Chan's rule."""
        count = self.count + following.count
        weight = following.count / count

        def mean_of(mean: Array, other: Array) -> Array:
            # The difference of two infinite means is NaN. Their sum is NumPy's mean.
            # Transposed, (L,) and (L, F) are weighted alike.
            delta = other - mean
            return mean + np.where(np.isfinite(delta), (delta.T * weight).T, other)

        with np.errstate(invalid="ignore"):
            delta = following.mean - self.mean
            return Moments(
                count=count,
                mean=mean_of(self.mean, following.mean),
                m2=self.m2 + following.m2 + delta * delta * (weight * self.count)[:, None],
                min=np.minimum(self.min, following.min),
                max=np.maximum(self.max, following.max),
                count_abs_gt_6=self.count_abs_gt_6 + following.count_abs_gt_6,
                norm_mean=mean_of(self.norm_mean, following.norm_mean),
                mean_squared_norm=mean_of(self.mean_squared_norm, following.mean_squared_norm),
            )

    @property
    def variance(self) -> Array:
        """Population variance, (L, F); NaN where an element is not finite."""
        return np.where(np.isfinite(self.mean), self.m2 / self.count[:, None], np.nan)


class Statistic(NamedTuple):
    """An attribute of `Moments` that is stored: (L, F) if `per_feature`, else (L,)."""

    name: str
    description: str
    per_feature: bool = True

    def shape(self, layers: int | None, width: int) -> tuple[int, ...]:
        """Return the shape of the stored tensor."""
        axes = () if layers is None else (layers,)
        return (*axes, width) if self.per_feature else axes or (1,)

    def without_layers(self, stored: Array) -> Array:
        """Return the values of a tensor without layers: (F,), or a number in place of (1,)."""
        return stored if self.per_feature else stored[0]


STATISTICS: tuple[Statistic, ...] = (
    Statistic("count", "number of vectors", per_feature=False),
    Statistic("mean", "mean"),
    Statistic("variance", "population variance"),
    Statistic("min", "minimum"),
    Statistic("max", "maximum"),
    Statistic("count_abs_gt_6", "number of values beyond 6 in magnitude"),
    Statistic("norm_mean", "mean norm of a vector", per_feature=False),
    Statistic("mean_squared_norm", "mean squared norm of a vector", per_feature=False),
)


def statistics_specs(tensor: str, *, layers: int | None, width: int) -> list[TensorSpec]:
    """Return the tensors that hold the statistics of a tensor (N, layers, ..., width).

    `layers` is None for a tensor without their axis.
    """
    prefix = f"{STATISTICS_PREFIX}{tensor}/"
    shapes = {each.name: each.shape(layers, width) for each in STATISTICS}
    return [TensorSpec(prefix + name, "float64", shape) for name, shape in shapes.items()]


@dataclass(frozen=True)
class Vectors:
    """A tensor (N, ..., F), or (N, L, ..., F) where `layers` is L, whose vectors are measured."""

    dtype: str
    layers: int | None
    shape: tuple[int, ...]

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row."""
        return prod(self.shape[1:]) * DTYPES[self.dtype].nbytes

    def measure(self, data: NDArray[np.uint8]) -> Moments:
        """Return the moments of rows, uint8 (nbytes,), without the interpreter."""
        layers, width = self.layers or 1, self.shape[-1]
        run = prod(self.shape[1:-1]) // layers
        # Each record holds 5 values per feature and 2 more: rust/statistics.rs lists them.
        records = np.empty((layers, 5 * width + 2))
        _rust.measure(data, self.dtype, run, records)
        count = np.full(layers, run * (len(data) // self.row_nbytes), np.float64)
        per_feature = records[:, :-2].reshape(layers, 5, width)
        return Moments(count, *per_feature.swapaxes(0, 1), *records[:, -2:].T)

    def statistics(self, moments: Moments) -> TensorStatistics:
        """Return the statistics as they are stored."""
        found = {}
        for each in STATISTICS:
            values: Array = getattr(moments, each.name)
            # Zeros are positive and NaN is one value: which one comes first differs by processor.
            values = np.where(np.isnan(values), np.nan, values + 0.0)
            found[each.name] = values.reshape(each.shape(self.layers, self.shape[-1]))
        return found


class RunningStatistics:
    """Statistics of tensors whose batches arrive in any order, from any thread.

    Batches are merged in their order, so that the bits depend on nothing else. Of the tensors of a
    file, those with statistics among them, `names`, are measured.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        shapes = {spec.name: spec.shape for spec in specs}
        self._vectors: dict[str, Vectors] = {}
        for spec in specs:
            mean = shapes.get(f"{STATISTICS_PREFIX}{spec.name}/mean")
            if mean is not None:
                layers = mean[0] if len(mean) > 1 else None
                self._vectors[spec.name] = Vectors(spec.dtype, layers, spec.shape)
        self._lock = Lock()
        self._merged: dict[str, Moments] = {}
        self._pending: dict[int, Mapping[str, Moments]] = {}
        self.names = list(self._vectors)
        self.next_batch = 0  # the first that is not merged yet

    def measure(self, name: str, data: NDArray[np.uint8]) -> Moments:
        """Return the moments of a batch's rows, uint8 (nbytes,), without the interpreter."""
        return self._vectors[name].measure(data)

    def add(self, batch: int, moments: Mapping[str, Moments]) -> None:
        """Add the moments of all `names` in a batch, once. It waits for the batches before it."""
        assert moments.keys() == self._vectors.keys(), moments.keys()
        with self._lock:
            assert batch >= self.next_batch, f"batch {batch} was added before"
            assert batch not in self._pending, f"batch {batch} was added before"
            self._pending[batch] = moments
            while (following := self._pending.pop(self.next_batch, None)) is not None:
                for name, more in following.items():
                    before = self._merged.get(name)
                    self._merged[name] = before + more if before else more
                self.next_batch += 1

    def tensors(self) -> dict[str, Array]:
        """Return the statistics of all batches by their tensors' names in a file, float64."""
        with self._lock:
            assert not self._pending, f"batch {self.next_batch} is missing"
            return {
                f"{STATISTICS_PREFIX}{tensor}/{name}": values
                for tensor, vectors in self._vectors.items()
                for name, values in vectors.statistics(self._merged[tensor]).items()
            }


def merge_stored(stored: Sequence[TensorStatistics]) -> TensorStatistics:
    """Merge all statistics of one tensor in several files, in their order; shapes stay."""

    def moments(of_file: TensorStatistics) -> Moments:
        found = {
            each.name: of_file[each.name].reshape((-1, width) if each.per_feature else -1)
            for each in STATISTICS
        }
        found["m2"] = found["variance"] * found["count"][:, None]
        return Moments(**{field.name: found[field.name] for field in fields(Moments)})

    if len(stored) == 1:  # as it is, to the bit
        return stored[0]
    *layers, width = stored[0]["mean"].shape
    vectors = Vectors("float64", layers[0] if layers else None, (width,))
    return vectors.statistics(reduce(add, map(moments, stored)))
