"""Compares two files, whatever their formats: metadata by its text, tensors by their values.

Values are read a piece at a time, so memory does not grow with the files.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dump_activations.errors import OutputError
from dump_activations.storage.digests import INTEGRITY_KEY
from dump_activations.storage.formats.contents import StoredTensor
from dump_activations.storage.reading.inspection import Inspection, open_again

# Elements of each file that a thread compares at a time.
_PIECE = 1 << 20

# Metadata that says of the rest what it is: where that is equal, these need not be.
_DERIVED = frozenset({"fingerprint", INTEGRITY_KEY})


@dataclass(frozen=True)
class Difference:
    """How the values of two tensors of one shape differ; NaN is equal to NaN.

    Attributes:
        elements: how many differ.
        nonfinite: how many of them are NaN or infinite in one file or both.
        largest: the largest absolute difference of the others; 0.0 if there are none.
        relative: the largest difference of an element, divided by its larger value.
        place: indices of the first element with the largest difference; None where none differs,
            or all that do are not finite.
    """

    elements: int = 0
    nonfinite: int = 0
    largest: float = 0.0
    relative: float = 0.0
    place: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TensorPair:
    """Tensors of one name; None where a file has none, or their shapes differ."""

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
    """Two files beside each other.

    Attributes:
        metadata: key -> its text in each file, None where there is none; only those that differ.
        tensors: all of both.
    """

    metadata: Mapping[str, tuple[str | None, str | None]]
    tensors: list[TensorPair]

    @property
    def is_equal(self) -> bool:
        """Whether all tensors are; the metadata may differ."""
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
    """Read two files and compare them.

    With a tolerance, floating values are equal if |a - b| <= atol + rtol * max(|a|, |b|), and so
    are tensors of different floating dtypes.

    Args:
        first: one file.
        second: the other.
        threads: how many compare values at once.
        rtol: tolerance relative to the larger value.
        atol: absolute tolerance.
        progress: called in this thread with the elements done and the elements in all.

    Raises:
        OutputError: a file cannot be read, or its values cannot be compared.
    """
    ours = {tensor.name: tensor for tensor in first.contents.tensors}
    theirs = {tensor.name: tensor for tensor in second.contents.tensors}
    both = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    with ExitStack() as exits:
        files = [exits.enter_context(open_again(each)).fileno() for each in (first, second)]
        pairs = {
            name: (_Values(first, files[0], ours[name]), _Values(second, files[1], theirs[name]))
            for name in both
        }
        differences = _compare_values(pairs, (rtol, atol), threads, progress)
    return Comparison(
        _differing(first.contents.metadata, second.contents.metadata),
        [
            TensorPair(
                name, ours.get(name), theirs.get(name), differences.get(name), rtol + atol > 0
            )
            for name in {**ours, **theirs}
        ],
    )


def _differing(
    first: Mapping[str, str], second: Mapping[str, str]
) -> dict[str, tuple[str | None, str | None]]:
    return {
        key: (first.get(key), second.get(key))
        for key in {**first, **second}
        if key not in _DERIVED and first.get(key) != second.get(key)
    }


class _Values:
    """The values of a stored tensor, read from any thread."""

    def __init__(self, inspection: Inspection, fd: int, tensor: StoredTensor) -> None:
        if tensor.offset is None:
            raise OutputError(
                f"{inspection.path}: {tensor.name} is compressed; only what is stored as it is "
                "can be compared"
            )
        self.tensor = tensor
        self._path, self._fd, self._offset = inspection.path, fd, tensor.offset
        self._dtype = np.dtype(np.uint16 if tensor.dtype == "bfloat16" else _dtype(tensor.dtype))
        if self._dtype.kind not in "biuf":
            raise OutputError(
                f"{self._path}: {tensor.name} is of {tensor.dtype}, which cannot be compared"
            )

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read elements `start` up to `stop`, counted through the tensor, (stop - start,)."""
        values = np.empty(stop - start, self._dtype)
        view, at = values.view(np.uint8).data, self._offset + start * self._dtype.itemsize
        while view:
            nbytes = os.preadv(self._fd, [view], at)
            if nbytes == 0:
                raise OutputError(f"{self._path} was cut short while it was read")
            view, at = view[nbytes:], at + nbytes
        if self.tensor.dtype == "bfloat16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values


def _dtype(name: str) -> "np.dtype[Any]":
    try:
        return np.dtype(name)
    except TypeError:  # The format's own name of one that NumPy does not have.
        return np.dtype(np.void)


_Pairs = Mapping[str, tuple[_Values, _Values]]


def _compare_values(
    pairs: _Pairs,
    tolerance: tuple[float, float],
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Difference]:
    found = dict.fromkeys(pairs, Difference())
    pieces = list(_pieces(pairs))
    in_all, done = sum(stop - start for _, start, stop in pieces), 0

    def compare_piece(piece: tuple[str, int, int]) -> Difference:
        name, start, stop = piece
        first, second = (values.read(start, stop) for values in pairs[name])
        return _difference(first, second, start, pairs[name][0].tensor.shape, tolerance)

    executor = ThreadPoolExecutor(threads, thread_name_prefix="compare")
    try:
        for piece, difference in zip(pieces, executor.map(compare_piece, pieces), strict=True):
            name, start, stop = piece
            found[name] = _joined(found[name], difference)
            done += stop - start
            if progress is not None:
                progress(done, in_all)
    finally:
        executor.shutdown(cancel_futures=True)
    return found


def _pieces(pairs: _Pairs) -> Iterator[tuple[str, int, int]]:
    for name, (values, _) in pairs.items():
        elements = int(np.prod(values.tensor.shape, dtype=object))
        for start in range(0, elements, _PIECE):
            yield name, start, min(start + _PIECE, elements)


def _difference(
    first: NDArray[Any],
    second: NDArray[Any],
    start: int,
    shape: tuple[int, ...],
    tolerance: tuple[float, float],
) -> Difference:
    """Compare elements (n,), the first of which is element `start` of a tensor."""
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
    if first.dtype == second.dtype and first.dtype.kind in "iu":
        exact: NDArray[np.uint64] = np.maximum(first, second).astype(np.uint64)
        exact -= np.minimum(first, second).astype(np.uint64)
        return exact.astype(np.float64)
    distances: NDArray[np.float64] = np.abs(first.astype(np.float64) - second.astype(np.float64))
    return distances


def _joined(first: Difference, second: Difference) -> Difference:
    """Join what was found in two pieces of a tensor, one after the other."""
    larger = second if second.largest > first.largest else first
    return Difference(
        elements=first.elements + second.elements,
        nonfinite=first.nonfinite + second.nonfinite,
        largest=larger.largest,
        relative=max(first.relative, second.relative),
        place=larger.place if larger.place is not None else second.place,
    )
