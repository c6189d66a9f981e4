"""Comparison of two dumps, in any formats: metadata by its text, tensors by their values.

Chunks of values are read at a time, so memory does not grow with the files.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dump_activations.dtypes import READABLE_DTYPES, STATISTICS_PREFIX
from dump_activations.errors import OutputError
from dump_activations.storage.digests import INTEGRITY_KEY
from dump_activations.storage.formats.contents import StoredTensor
from dump_activations.storage.parallel import in_parallel
from dump_activations.storage.reading.inspection import Inspection, read_bytes

# Elements of each file that a thread compares at a time.
_CHUNK = 1 << 20

# Metadata derived from the rest: it differs wherever anything does.
_DERIVED = frozenset({"fingerprint", INTEGRITY_KEY})


@dataclass(frozen=True)
class Difference:
    """How the values of two tensors of one shape differ; NaN is equal to NaN.

    Attributes:
        elements: elements that differ.
        nonfinite: how many of them are NaN or infinite in one file or both.
        largest: largest absolute difference of the others; 0.0 if there are none.
        relative: largest difference of an element, divided by its larger value.
        place: indices of the first element with the largest difference; None if no finite element
            differs.
    """

    elements: int = 0
    nonfinite: int = 0
    largest: float = 0.0
    relative: float = 0.0
    place: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TensorPair:
    """Tensors of one name; None where a file lacks it, no difference where shapes differ."""

    name: str
    first: StoredTensor | None
    second: StoredTensor | None
    difference: Difference | None
    has_tolerance: bool = False

    @property
    def is_equal(self) -> bool:
        """Whether both files have the same dtype, shape and values, within the tolerance."""
        if self.first is None or self.second is None or self.difference != Difference():
            return False
        dtypes = {self.first.dtype, self.second.dtype}
        return len(dtypes) == 1 or (self.has_tolerance and all("float" in name for name in dtypes))


@dataclass(frozen=True)
class Comparison:
    """The differences of two dumps.

    Attributes:
        metadata: key -> its text in each dump, or None; only keys that differ.
        tensors: all tensors of both.
    """

    metadata: Mapping[str, tuple[str | None, str | None]]
    tensors: list[TensorPair]

    @property
    def is_equal(self) -> bool:
        """Whether all tensors are equal; the metadata may differ."""
        return all(pair.is_equal for pair in self.tensors)


def compare(
    first: Inspection,
    second: Inspection,
    *,
    threads: int,
    rtol: float = 0.0,
    atol: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Read two dumps and compare them.

    Each shard has statistics of its own, which are left out where a dump is in shards.

    With a tolerance, floating values are equal if |a - b| <= atol + rtol * max(|a|, |b|), and so
    are tensors of different floating dtypes.

    Args:
        first: one dump.
        second: the other.
        threads: threads that compare values.
        rtol: tolerance relative to the larger value.
        atol: absolute tolerance.
        progress: called in this thread with the elements done and the elements in all.

    Raises:
        OutputError: a file cannot be read, or its values cannot be compared.
    """
    ours, theirs = (_tensors(each, both=(first, second)) for each in (first, second))
    both = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    for name in both:
        for inspection in (first, second):
            _check_comparable(inspection, name)
    found = dict.fromkeys(both, Difference())
    chunks = [
        (name, start, min(start + _CHUNK, elements))
        for name in both
        for elements in [math.prod(ours[name].shape)]
        for start in range(0, elements, _CHUNK)
    ]
    done, in_all = 0, sum(stop - start for _, start, stop in chunks)

    def compare_chunk(chunk: tuple[str, int, int]) -> Difference:
        name, start, stop = chunk
        a, b = (_read(each, name, start, stop) for each in (first, second))
        return _difference(a, b, start, ours[name].shape, (rtol, atol))

    def take(chunk: tuple[str, int, int], difference: Difference) -> None:
        nonlocal done
        name, start, stop = chunk
        found[name] = _joined(found[name], difference)
        done += stop - start
        if progress is not None:
            progress(done, in_all)

    in_parallel(compare_chunk, chunks, threads, take)
    return Comparison(
        _differing(first.contents.metadata, second.contents.metadata),
        [
            TensorPair(name, ours.get(name), theirs.get(name), found.get(name), rtol + atol > 0)
            for name in {**ours, **theirs}
        ],
    )


def _tensors(inspection: Inspection, both: tuple[Inspection, ...]) -> dict[str, StoredTensor]:
    has_statistics = not any(each.shards for each in both)
    return {
        tensor.name: tensor
        for tensor in inspection.contents.tensors
        if has_statistics or not tensor.name.startswith(STATISTICS_PREFIX)
    }


def _differing(
    first: Mapping[str, str], second: Mapping[str, str]
) -> dict[str, tuple[str | None, str | None]]:
    return {
        key: (first.get(key), second.get(key))
        for key in {**first, **second}
        if key not in _DERIVED and first.get(key) != second.get(key)
    }


def _check_comparable(inspection: Inspection, name: str) -> None:
    for file in inspection.files:
        tensor = file.tensor(name)
        if tensor.dtype not in READABLE_DTYPES:
            raise OutputError(f"{file.path}: {name} is {tensor.dtype}, which cannot be compared")
        if tensor.offset is None:
            raise OutputError(
                f"{file.path}: {name} is compressed or not in C order, and cannot be compared"
            )


def _read(inspection: Inspection, name: str, start: int, stop: int) -> NDArray[Any]:
    """Read elements `start` to `stop`, counted through a tensor, (stop - start,)."""
    dtype = READABLE_DTYPES[inspection.tensor(name).dtype]
    values = np.empty(stop - start, dtype.npy or "<u2")
    read_bytes(inspection, name, start * dtype.nbytes, values.view(np.uint8))
    if dtype.name == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _difference(
    first: NDArray[Any],
    second: NDArray[Any],
    start: int,
    shape: tuple[int, ...],
    tolerance: tuple[float, float],
) -> Difference:
    """Compare elements (n,) of a tensor, from element `start` on."""
    places = np.flatnonzero(first != second)
    if len(places) < len(first):
        first, second = first[places], second[places]
    finite = np.isfinite(first) & np.isfinite(second)
    nonfinite = 0
    if not finite.all():
        both_nan = (first != first) & (second != second)  # noqa: PLR0124 -- of integers too
        nonfinite = int(np.count_nonzero(~finite) - np.count_nonzero(both_nan))
        places, first, second = places[finite], first[finite], second[finite]
    if not len(places):
        return Difference(nonfinite, nonfinite)
    distances = _distances(first, second)
    larger = np.maximum(np.abs(first.astype(np.float64)), np.abs(second.astype(np.float64)))
    if any(tolerance) and first.dtype.kind == second.dtype.kind == "f":
        rtol, atol = tolerance
        beyond = distances > atol + rtol * larger
        places, distances, larger = places[beyond], distances[beyond], larger[beyond]
        if not len(places):
            return Difference(nonfinite, nonfinite)
    np.divide(distances, larger, out=larger)
    i = int(np.argmax(distances))
    return Difference(
        elements=len(places) + nonfinite,
        nonfinite=nonfinite,
        largest=float(distances[i]),
        relative=float(larger.max()),
        place=tuple(map(int, np.unravel_index(start + int(places[i]), shape))),
    )


def _distances(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
    """Return |first - second|, rounded to float64 once."""
    if first.dtype == second.dtype and first.dtype.kind in "iub":
        exact: NDArray[np.uint64] = np.maximum(first, second).astype(np.uint64)
        exact -= np.minimum(first, second).astype(np.uint64)
        return exact.astype(np.float64)
    distances: NDArray[np.float64] = np.abs(first.astype(np.float64) - second.astype(np.float64))
    return distances


def _joined(first: Difference, second: Difference) -> Difference:
    """Join the differences of two chunks of a tensor, one after the other."""
    larger = second if second.largest > first.largest else first
    return Difference(
        elements=first.elements + second.elements,
        nonfinite=first.nonfinite + second.nonfinite,
        largest=larger.largest,
        relative=max(first.relative, second.relative),
        place=larger.place if larger.place is not None else second.place,
    )
