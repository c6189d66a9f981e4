"""Takes the statistics of a file's tensors, exactly: see the registry in `statistics`.

Shape letters: L layers, F features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dump_activations import _rust
from dump_activations.dtypes import DTYPES, TensorSpec
from dump_activations.statistics import STATISTICS_PREFIX, Totals, values_of
from dump_activations.storage.digests import Digest

TensorStatistics = dict[str, NDArray[np.float64]]
"""Statistics of a tensor by name: (L, F) and (L,), or (F,) and (1,) of one without layers."""

_SUM = 88
"""Bytes of an exact sum, a little-endian number."""


@dataclass(frozen=True)
class Vectors:
    """A tensor (N, ..., F) whose statistics are taken.

    Attributes:
        name: in the file.
        dtype: float32, float16 or bfloat16.
        layers: length of its second axis where layers are stacked in it; else None.
        per_board: vectors of a board.
        width: F.
    """

    name: str
    dtype: str
    layers: int | None
    per_board: int
    width: int

    @property
    def nbytes(self) -> int:
        """Bytes of a vector."""
        return self.width * DTYPES[self.dtype].nbytes

    def new(self) -> _rust.Statistics:
        """Begin statistics of no vectors."""
        layers = self.layers or 1
        return _rust.Statistics(self.dtype, layers, self.per_board // layers, self.width)

    @property
    def state_nbytes(self) -> int:
        """Bytes of a state."""
        return self._record.itemsize * (self.layers or 1)

    def values(self, state: bytes) -> TensorStatistics:
        """Return the statistics of all vectors, from their state."""
        found = values_of(map(_totals, np.frombuffer(state, self._record)))
        if self.layers is None:
            return {name: values.reshape(-1) for name, values in found.items()}
        return found

    @property
    def _record(self) -> np.dtype[np.void]:
        """What a state has of each layer."""
        return np.dtype(
            [
                ("count", "<u8"),
                ("special_norms", "<f8"),
                ("norms", f"V{_SUM}"),
                ("sums", f"V{_SUM}", self.width),
                ("squares", f"V{_SUM}", self.width),
                ("special", "<f8", self.width),
                ("min", "<f4", self.width),
                ("max", "<f4", self.width),
                ("outliers", "<u8", self.width),
            ]
        )


def _totals(layer: np.void) -> Totals:
    return Totals(
        count=int(layer["count"]),
        sums=_numbers(layer["sums"]),
        squares=_numbers(layer["squares"]),
        norms=_number(layer["norms"].tobytes()),
        special=layer["special"],
        special_norms=float(layer["special_norms"]),
        min=layer["min"],
        max=layer["max"],
        outliers=layer["outliers"],
    )


def _numbers(sums: NDArray[np.void]) -> list[int]:
    data = sums.tobytes()
    return [_number(data[at : at + _SUM]) for at in range(0, len(data), _SUM)]


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def vectors_of(specs: Sequence[TensorSpec]) -> list[Vectors]:
    """List the tensors that have statistics among a file's tensors."""
    shapes = {spec.name: spec.shape for spec in specs}
    found = []
    for spec in specs:
        mean = shapes.get(f"{STATISTICS_PREFIX}{spec.name}/mean")
        if mean is not None:
            layers = mean[0] if len(mean) > 1 else None
            per_board = math.prod(spec.shape[1:-1])
            found.append(Vectors(spec.name, spec.dtype, layers, per_board, spec.shape[-1]))
    return found


class RunningStatistics:
    """Statistics of tensors whose vectors come in any order, from any thread.

    What they are in the end depends on the vectors alone.
    """

    def __init__(self, vectors: Sequence[Vectors]) -> None:
        self._vectors = {each.name: each for each in vectors}
        self._running = {each.name: each.new() for each in vectors}

    def __len__(self) -> int:
        return len(self._vectors)

    def new(self) -> "RunningStatistics":
        """Begin statistics of no vectors of the same tensors."""
        return RunningStatistics([*self._vectors.values()])

    def whole_vectors(self, name: str, nbytes: int) -> int:
        """Return so many bytes of a tensor, or what makes them whole vectors of one of these."""
        if name not in self._vectors:
            return nbytes
        vector = self._vectors[name].nbytes
        return max(nbytes // vector, 1) * vector

    def add(self, name: str, start: int, data: NDArray[np.uint8]) -> None:
        """Add the vectors that begin `start` bytes into a tensor, if it is one of these."""
        if name in self._running:
            self._running[name].add(start // self._vectors[name].nbytes, data)

    def read(
        self, name: str, dtype: str, fd: int, *, offset: int, nbytes: int, start: int
    ) -> Digest:
        """Digest part of a tensor from a file, and add the vectors in it if it is one of these.

        Args:
            name: of the tensor.
            dtype: of its elements.
            fd: descriptor of the file.
            offset: where in the file the part begins.
            nbytes: bytes of it: whole vectors.
            start: where in the tensor it begins, in bytes.

        Raises:
            OSError: it cannot be read.
        """
        if name not in self._running:
            return Digest(nbytes, *_rust.digest_span(fd, offset, nbytes, dtype))
        vector = self._vectors[name].nbytes
        found = self._running[name].read(fd, offset, start // vector, nbytes // vector)
        return Digest(nbytes, *found)

    def state(self) -> bytes:
        """Return all that is known, for `merge`."""
        return b"".join(each.state() for each in self._running.values())

    def merge(self, state: bytes) -> None:
        """Add what others saw of the same tensors.

        Raises:
            ValueError: they were other tensors.
        """
        if len(state) != sum(each.state_nbytes for each in self._vectors.values()):
            raise ValueError("statistics of other tensors")
        for name, each in self._vectors.items():
            self._running[name].merge(state[: each.state_nbytes])
            state = state[each.state_nbytes :]

    def values(self) -> dict[str, TensorStatistics]:
        """Return the statistics of each tensor."""
        return {n: each.values(self._running[n].state()) for n, each in self._vectors.items()}

    def tensors(self) -> dict[str, NDArray[np.float64]]:
        """Return the statistics of all tensors by their names in a file."""
        return {
            f"{STATISTICS_PREFIX}{tensor}/{name}": values
            for tensor, statistics in self.values().items()
            for name, values in statistics.items()
        }
