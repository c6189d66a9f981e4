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
from dump_activations.interrupts import sum_in_parallel
from dump_activations.storage.digests import INTEGRITY_KEY
from dump_activations.storage.formats.layout import StoredTensor
from dump_activations.storage.reading.dump_files import DumpFiles

# Elements of each file that a thread compares at a time.
_CHUNK = 1 << 20

# Metadata derived from the rest: it differs wherever anything does.
_DERIVED = frozenset({"fingerprint", INTEGRITY_KEY})


@dataclass(frozen=True)
class Difference:
    """How the values of two tensors of one shape differ; NaN is equal to NaN."""

    elements: int = 0  # elements that differ
    nonfinite: int = 0  # how many of them are NaN or infinite in a file
    largest: float = 0.0  # largest absolute difference of the others; 0.0 without any
    relative: float = 0.0  # largest difference of an element, divided by its larger value
    place: tuple[int, ...] | None = None  # first element with the largest; None without any

    def __add__(self, following: "Difference") -> "Difference":
        """Join the differences of two chunks of a tensor, one after the other."""
        larger = max(self, following, key=lambda each: each.largest)
        return Difference(
            elements=self.elements + following.elements,
            nonfinite=self.nonfinite + following.nonfinite,
            largest=larger.largest,
            relative=max(self.relative, following.relative),
            place=larger.place or following.place,
        )


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
        """True where both files have the same dtype, shape and values, within the tolerance."""
        if self.first is None or self.second is None or self.difference != Difference():
            return False
        dtypes = {self.first.dtype, self.second.dtype}
        return len(dtypes) == 1 or (self.has_tolerance and all("float" in name for name in dtypes))


@dataclass(frozen=True)
class Comparison:
    """The differences of two dumps."""

    metadata: Mapping[str, tuple[str | None, str | None]]  # texts that differ
    tensors: list[TensorPair]  # all tensors of both

    @property
    def is_equal(self) -> bool:
        """True where all tensors are equal. The metadata may differ."""
        return all(pair.is_equal for pair in self.tensors)


def compare(
    first: DumpFiles,
    second: DumpFiles,
    *,
    threads: int,
    rtol: float = 0.0,
    atol: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Read two dumps and compare them.

    With a tolerance, floating values are equal if |a - b| <= atol + rtol * max(|a|, |b|), and so
    are tensors of different floating dtypes. `progress` is called in this thread with the elements
    done and the elements in all.
    """
    dumps = (first, second)
    # Each of several shards has statistics of its own.
    left_out = (STATISTICS_PREFIX,) if any(len(each.files) > 1 for each in dumps) else ()
    ours, theirs = (
        {name: each for name, each in dump.tensors.items() if not name.startswith(left_out)}
        for dump in dumps
    )
    both = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    for dump in dumps:
        for name in both:
            if (dtype := dump.tensors[name].dtype) not in READABLE_DTYPES:
                raise OutputError(f"{dump.path}: {name} is {dtype}, which cannot be compared")

    def compare_chunk(name: str, start: int, stop: int) -> Difference:
        a, b = (_read(each, name, start, stop) for each in dumps)
        return _difference(a, b, start, ours[name].shape, (rtol, atol))

    lengths = {name: (math.prod(ours[name].shape), _CHUNK) for name in both}
    found = dict.fromkeys(both, Difference())
    found |= sum_in_parallel(compare_chunk, lengths, threads, progress)
    a, b = first.metadata, second.metadata
    return Comparison(
        {
            key: (a.get(key), b.get(key))
            for key in {**a, **b}
            if key not in _DERIVED and a.get(key) != b.get(key)
        },
        [
            TensorPair(name, ours.get(name), theirs.get(name), found.get(name), rtol + atol > 0)
            for name in {**ours, **theirs}
        ],
    )


def _read(dump: DumpFiles, name: str, start: int, stop: int) -> NDArray[Any]:
    """Read elements `start` to `stop`, counted through a tensor, (stop - start,)."""
    dtype = READABLE_DTYPES[dump.tensors[name].dtype]
    values = np.empty(stop - start, dtype.npy or "<u2")
    dump.read_span(name, start * dtype.nbytes, values.view(np.uint8))
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
    if first.dtype == second.dtype and first.dtype.kind in "iub":  # exact, and rounded once
        exact = np.maximum(first, second).astype(np.uint64)
        distances = (exact - np.minimum(first, second).astype(np.uint64)).astype(np.float64)
    else:
        distances = np.abs(first.astype(np.float64) - second.astype(np.float64))
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
