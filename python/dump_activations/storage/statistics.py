"""Statistics of activations in float64: taken per batch, merged in order, stored and read back.

A vector lies along the last axis of a tensor, and each place in it is a feature. A new statistic is
one new entry in `STATISTICS`.

Shape letters: L layers (1 for a tensor without their axis), F features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import reduce
from math import prod
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from dump_activations import _rust
from dump_activations.dtypes import DTYPES, STATISTICS_PREFIX, TensorSpec
from dump_activations.errors import InvalidArgumentError, OutputError, switch
from dump_activations.storage.formats.contents import read_exactly
from dump_activations.storage.parallel import in_parallel
from dump_activations.storage.reading.inspection import Inspection, open_again, read_bytes
from dump_activations.storage.reading.keys import Catalog, Key

Array = NDArray[np.float64]

TensorStatistics = dict[str, Array]
"""Statistics of a tensor by name: (L, F) and (L,), or (F,) and (1,) of one without layers."""

_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})

# Bytes that a thread reads and measures at a time. The bits of computed statistics depend on it.
_CHUNK_NBYTES = 8 << 20


@dataclass(frozen=True)
class Moments:
    """Mergeable state of some vectors of one tensor, all float64.

    Attributes:
        count: vectors per layer, (L,).
        mean: (L, F).
        m2: sum of squared deviations from the mean, (L, F).
        min: (L, F); NaN where there is a NaN.
        max: (L, F); NaN where there is a NaN.
        count_abs_gt_6: elements beyond 6 in magnitude, (L, F).
        norm_mean: mean of the vectors' norms, (L,).
        mean_squared_norm: mean of their squares, (L,).
    """

    count: Array
    mean: Array
    m2: Array
    min: Array
    max: Array
    count_abs_gt_6: Array
    norm_mean: Array
    mean_squared_norm: Array

    def merge(self, following: "Moments") -> "Moments":
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


@dataclass(frozen=True)
class Statistic:
    """Entry of the registry.

    Attributes:
        name: last part of the tensor's name.
        description: for people.
        value: Moments -> (L, F) if `per_feature`, else (L,).
        per_feature: one value per feature, or else one per layer.
    """

    name: str
    description: str
    value: Callable[[Moments], Array]
    _: KW_ONLY
    per_feature: bool = True

    def shape(self, *, layers: int | None, width: int) -> tuple[int, ...]:
        """Return the shape of the stored tensor."""
        axes = () if layers is None else (layers,)
        return (*axes, width) if self.per_feature else axes or (1,)


STATISTICS: tuple[Statistic, ...] = (
    Statistic("count", "number of vectors", lambda m: m.count, per_feature=False),
    Statistic("mean", "mean", lambda m: m.mean),
    Statistic("variance", "population variance", lambda m: m.variance),
    Statistic("min", "minimum", lambda m: m.min),
    Statistic("max", "maximum", lambda m: m.max),
    Statistic(
        "count_abs_gt_6", "number of values beyond 6 in magnitude", lambda m: m.count_abs_gt_6
    ),
    Statistic("norm_mean", "mean norm of a vector", lambda m: m.norm_mean, per_feature=False),
    Statistic(
        "mean_squared_norm",
        "mean squared norm of a vector",
        lambda m: m.mean_squared_norm,
        per_feature=False,
    ),
)


def statistics_specs(tensor: str, *, layers: int | None, width: int) -> list[TensorSpec]:
    """Return the tensors that hold the statistics of a tensor.

    Args:
        tensor: its name.
        layers: length of its axis of layers; None for a tensor without one.
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


@dataclass(frozen=True)
class _Vectors:
    """A tensor (N, ..., F), or (N, L, ..., F) where `layers` is L, whose vectors are measured."""

    name: str
    dtype: str
    layers: int | None
    shape: tuple[int, ...]

    @property
    def row_nbytes(self) -> int:
        return prod(self.shape[1:]) * DTYPES[self.dtype].nbytes

    def measure(self, data: NDArray[np.uint8]) -> Moments:
        layers, width = self.layers or 1, self.shape[-1]
        run = prod(self.shape[1:-1]) // layers
        # Each record holds 5 values per feature and 2 more: rust/statistics.rs lists them.
        records = np.empty((layers, 5 * width + 2))
        _rust.measure(data, self.dtype, run, records)
        count = np.full(layers, run * (len(data) // self.row_nbytes), np.float64)
        per_feature = records[:, :-2].reshape(layers, 5, width)
        return Moments(count, *per_feature.swapaxes(0, 1), *records[:, -2:].T)

    def statistics(self, moments: Moments) -> TensorStatistics:
        return {
            each.name: _canonical(each.value(moments)).reshape(
                each.shape(layers=self.layers, width=self.shape[-1])
            )
            for each in STATISTICS
        }


def _canonical(values: Array) -> Array:
    """Make zeros positive and NaN one value: which one comes first differs between processors."""
    return np.where(np.isnan(values), np.nan, values + 0.0)


class RunningStatistics:
    """Statistics of tensors whose batches arrive in any order, from any thread.

    Batches are merged in their order, so that the bits depend on nothing else.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        """Begin with no batch.

        Args:
            specs: the tensors of a file. Those with statistics among them are measured.
        """
        shapes = {spec.name: spec.shape for spec in specs}
        self._vectors: dict[str, _Vectors] = {}
        for spec in specs:
            mean = shapes.get(f"{STATISTICS_PREFIX}{spec.name}/mean")
            if mean is not None:
                layers = mean[0] if len(mean) > 1 else None
                self._vectors[spec.name] = _Vectors(spec.name, spec.dtype, layers, spec.shape)
        self._lock = Lock()
        self._merged: dict[str, Moments] = {}
        self._pending: dict[int, Mapping[str, Moments]] = {}
        self._next_batch = 0

    @property
    def names(self) -> list[str]:
        """Tensors that have statistics."""
        return list(self._vectors)

    @property
    def next_batch(self) -> int:
        """The first batch that is not merged yet."""
        return self._next_batch

    def measure(self, name: str, data: NDArray[np.uint8]) -> Moments:
        """Return the moments of whole rows of a tensor, on any thread, without the interpreter.

        Args:
            name: one of `names`.
            data: the rows of a batch, C-contiguous uint8 (nbytes,).
        """
        return self._vectors[name].measure(data)

    def add(self, batch: int, moments: Mapping[str, Moments]) -> None:
        """Add a batch once, from any thread. It waits for the batches before it.

        Args:
            batch: its number; the first is 0.
            moments: its moments by tensor, of all `names`.
        """
        assert moments.keys() == self._vectors.keys(), moments.keys()
        with self._lock:
            assert batch >= self._next_batch, f"batch {batch} was added before"
            assert batch not in self._pending, f"batch {batch} was added before"
            self._pending[batch] = moments
            while (following := self._pending.pop(self._next_batch, None)) is not None:
                for name, more in following.items():
                    before = self._merged.get(name)
                    self._merged[name] = before.merge(more) if before else more
                self._next_batch += 1

    def tensors(self) -> dict[str, Array]:
        """Return the statistics of all batches by their tensors' names in a file, float64."""
        with self._lock:
            assert not self._pending, f"batch {self._next_batch} is missing"
            return {
                f"{STATISTICS_PREFIX}{tensor}/{name}": values
                for tensor, vectors in self._vectors.items()
                for name, values in vectors.statistics(self._merged[tensor]).items()
            }


def merge_stored(stored: Sequence[Mapping[str, Array]]) -> TensorStatistics:
    """Merge the stored statistics of one tensor's shards.

    Args:
        stored: all statistics of each shard by name, in the order of the shards.

    Returns:
        The statistics of all shards, in the same shapes.
    """
    merged = reduce(Moments.merge, map(_stored_moments, stored))
    return {
        each.name: _canonical(each.value(merged)).reshape(stored[0][each.name].shape)
        for each in STATISTICS
    }


def _stored_moments(stored: Mapping[str, Array]) -> Moments:
    width = stored["mean"].shape[-1]
    of = {
        each.name: stored[each.name].reshape((-1, width) if each.per_feature else -1)
        for each in STATISTICS
    }
    of["m2"] = of["variance"] * of["count"][:, None]
    return Moments(**{field.name: of[field.name] for field in fields(Moments)})


def stored_statistics(inspection: Inspection) -> dict[str, TensorStatistics]:
    """Return the statistics that a file holds by tensor; empty if it holds none.

    Tensors whose statistics are incomplete are left out.

    Raises:
        OutputError: they cannot be read.
    """
    found: dict[str, TensorStatistics] = {}
    with open_again(inspection) as file:
        for stored in inspection.contents.tensors:
            tensor, _, name = stored.name.removeprefix(STATISTICS_PREFIX).rpartition("/")
            if f"{STATISTICS_PREFIX}{tensor}/{name}" != stored.name or stored.dtype != "float64":
                continue
            if stored.offset is None:  # compressed, by another program
                continue
            try:
                data = np.frombuffer(read_exactly(file, stored.offset, stored.nbytes), "<f8")
            except ValueError as error:
                raise OutputError(f"{inspection.path}: {stored.name}: {error}") from None
            found.setdefault(tensor, {})[name] = data.reshape(stored.shape)
    return {tensor: statistics for tensor, statistics in found.items() if _is_whole(statistics)}


def _is_whole(found: TensorStatistics) -> bool:
    """Say whether these are all statistics of a tensor, in their shapes."""
    shape = found["mean"].shape if "mean" in found else ()
    if len(shape) not in (1, 2):
        return False
    layers = shape[0] if len(shape) == 2 else None
    shapes = {each.name: each.shape(layers=layers, width=shape[-1]) for each in STATISTICS}
    return shapes.items() <= {name: values.shape for name, values in found.items()}.items()


def compute_statistics(
    inspection: Inspection, *, threads: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, TensorStatistics]:
    """Read a file and return the statistics of its activations by tensor.

    They agree with those of `dump(stats=True)` to rounding, and do not depend on `threads`.

    Args:
        inspection: of the file.
        threads: how many read and measure at once.
        progress: called in this thread with bytes read and bytes in all; may raise.

    Raises:
        OutputError: the file cannot be read, or its tensors have no axis of boards.
    """
    vectors = _vectors_in(inspection)
    chunks = [
        (each, start, min(start + chunk_nbytes, nbytes))
        for each in vectors
        for nbytes in [inspection.tensor(each.name).nbytes]
        for chunk_nbytes in [max(_CHUNK_NBYTES // each.row_nbytes, 1) * each.row_nbytes]
        for start in range(0, nbytes, chunk_nbytes)
    ]
    done, in_all = 0, sum(stop - start for _, start, stop in chunks)
    merged: dict[str, Moments] = {}

    def measure(chunk: tuple[_Vectors, int, int]) -> Moments:
        of, start, stop = chunk
        data = np.empty(stop - start, np.uint8)
        read_bytes(inspection, of.name, start, data)
        return of.measure(data)

    def merge(chunk: tuple[_Vectors, int, int], moments: Moments) -> None:
        nonlocal done
        of, start, stop = chunk
        before = merged.get(of.name)
        merged[of.name] = moments if before is None else before.merge(moments)
        done += stop - start
        if progress is not None:
            progress(done, in_all)

    in_parallel(measure, chunks, threads, merge)
    return {each.name: each.statistics(merged[each.name]) for each in vectors}


def _vectors_in(inspection: Inspection) -> list[_Vectors]:
    """List the floating activations of a file. Its metadata names their layers."""
    catalog = Catalog(inspection.path, inspection.contents)
    found = []
    for key in catalog.keys.values():
        for part in key.parts(None):
            stored = catalog.tensors[part.tensor]
            if stored.dtype not in _DTYPES or not key.value or not stored.nbytes:
                continue
            if stored.offset is None:
                raise OutputError(
                    f"{inspection.path}: {stored.name} is compressed or not in C order; save it "
                    "uncompressed to compute its statistics"
                )
            found.append(_Vectors(stored.name, stored.dtype, key.stacked, stored.shape))
    return found


def key_statistics(key: Key, layer: int | None, stored: Mapping[str, Array]) -> TensorStatistics:
    """Return the stored statistics of a key, of all its layers or of one.

    Args:
        key: the key.
        layer: the layer by its number in the model; None for all.
        stored: a file's tensors by name.

    Raises:
        InvalidArgumentError: the file holds none of the key, or has no such layer.
    """
    parts = key.parts(layer)
    found: TensorStatistics = {}
    for each in STATISTICS:
        names = [f"{STATISTICS_PREFIX}{part.tensor}/{each.name}" for part in parts]
        values = [stored[name] for name in names if name in stored]
        shape = each.shape(layers=key.stacked, width=prod(key.value[-1:]))
        if [(of.shape, of.dtype) for of in values] != [(shape, np.dtype(np.float64))] * len(parts):
            continue
        if key.stacked is not None:
            [of_layers] = values
            found[each.name] = of_layers if layer is None else of_layers[parts[0].at]
            continue
        if not each.per_feature:
            values = [of[0] for of in values]
        found[each.name] = np.stack(values) if key.is_split and layer is None else values[0]
    if not found:
        raise InvalidArgumentError(
            f"{key.name} has no statistics in the file; dump with {switch('stats')}, or let "
            "inspect-activations --stats compute them"
        )
    return found
