"""ActivationArray: the values of a key, on disk until they are indexed.

Shape letters: N boards in all files, R rows asked for, L layers kept.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dump_activations.dtypes import READABLE_DTYPES
from dump_activations.errors import (
    InvalidArgumentError,
    RowIndexError,
    option,
    printable,
    ranges_text,
    shape_text,
    size_text,
    switch,
    whole_number,
)
from dump_activations.storage.reading.dump_files import DumpFiles
from dump_activations.storage.reading.keys import Key

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Rows = ArrayLike | slice | None
"""Row numbers in any order, with repeats; a slice; a mask, bool (N,); None for all. Negative
numbers count from the end."""


class ActivationArray:
    """The values of a key in a file: `acts["layer_outputs"]`. Each index reads from the file.

    The first index is rows: a number, a slice, numbers in any order, or a mask, bool (N,). Numbers
    and slices for further axes may follow. On the axis of layers they count the layers that are
    kept, and only these are read. The result is a tensor.

        acts["layer_outputs"][-1]  # (L, 16, H): the last board
        acts["layer_outputs"][10:20, 0]  # (10, 16, H): the first layer kept
        acts["layer_outputs"].layer(-1)[mask]  # (R, 16, H): the model's last layer
        np.asarray(acts["pooled"])  # (N, H)
    """

    def __init__(self, files: DumpFiles, key: Key) -> None:
        self._files = files
        self._key = key

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, L, *value)` with layers, stacked or split, or else `(N, *value)`."""
        return self._key.shape(self._files.boards)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        import torch

        found: torch.dtype = getattr(torch, self._key.dtype)
        return found

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the model's layers along the axis of layers; empty without that axis."""
        return self._key.layers or ()

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return math.prod(self.shape) * READABLE_DTYPES[self._key.dtype].nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return printable(f"ActivationArray({self._key.name}: {self.text})")

    @property
    def text(self) -> str:
        """Shape, dtype, size and layers in words."""
        layers = f", layers {ranges_text(self.layers)}" if self.layers else ""
        is_readable = self._key.dtype in READABLE_DTYPES
        size = size_text(self.nbytes) if is_readable else "which cannot be read"
        return f"{shape_text(self.shape)} {self._key.dtype}, {size}{layers}"

    def layer(self, number: int) -> ActivationArray:
        """Return one layer by its number in the model; negative numbers count from its last.

        Raises:
            InvalidArgumentError: The key does not have the layer.
        """
        return ActivationArray(self._files, self._key.layer(number))

    def __getitem__(self, index: Any) -> Tensor:
        """Read rows, and numbers or slices of further axes.

        Raises:
            InvalidArgumentError: The index is of another kind.
            RowIndexError: A number is out of range.
            OutputError: A row cannot be read, or a file was changed.
        """
        rows, *others = self._indices(index)
        key = self._key
        if not key.of_boards:
            return self.read()[(rows, *others)]
        if others and key.layers is not None:
            key = key.pick(others[0])
            others[0] = slice(None)
            others = others if key.layers is not None else others[1:]
        row = whole_number(rows)
        values = ActivationArray(self._files, key).read(rows if row is None else [row])
        return values[(slice(None) if row is None else 0, *others)]

    def _indices(self, index: Any) -> list[Any]:
        """Return the indices of axes, at least one. All but the rows are checked."""
        indices = list(index) if isinstance(index, tuple) else [index]
        for at, each in enumerate(indices):
            if each is ...:
                left = len(self.shape) + 1 - len(indices)
                indices[at : at + 1] = [slice(None)] * left
                break
        rows, others = indices[0] if indices else slice(None), indices[1:]
        for at, each in enumerate(others):
            if (number := whole_number(each)) is not None:
                others[at] = number
            elif not isinstance(each, slice) or (each.step is not None and each.step < 1):
                raise InvalidArgumentError(
                    "indices after the rows must be numbers, or slices with a positive step; got "
                    f"{each!r}; read the rows and index the tensor"
                )
        try:  # NumPy's rules, on an array without memory
            np.broadcast_to(np.uint8(0), self.shape)[(slice(None), *others)]
        except IndexError as error:
            raise RowIndexError(f"{self._key.name} {shape_text(self.shape)}: {error}") from None
        return [rows, *others]

    def read(self, rows: Rows = None, *, out: Tensor | None = None, verify: bool = False) -> Tensor:
        """Read rows as `ActivationsFile.read` does."""
        import torch

        numbers = self._row_numbers(rows)
        if verify and (rows is not None or any(part.of > 1 for part in self._key.parts)):
            raise InvalidArgumentError(
                f"{switch('verify')}: digests cover whole tensors; leave out "
                f"{option('layer' if rows is None else 'rows')}"
            )
        shape, dtype = self._key.shape(len(numbers)), self.dtype
        if out is None:
            out = torch.empty(shape, dtype=dtype, device="cpu")
        fits = (out.shape, out.dtype, out.device.type) == (shape, dtype, "cpu")
        if not fits or not out.is_contiguous():
            raise InvalidArgumentError(
                f"{option('out')} must be a contiguous tensor of {dtype} {shape} on the host; "
                f"got {out.dtype} {tuple(out.shape)} on {out.device}"
            )
        self._fill(numbers, out.detach().view(-1).view(torch.uint8).numpy(), verify=verify)
        return out

    def numpy(self, rows: Rows = None) -> NDArray[Any]:
        """Read rows without torch; NumPy has no bfloat16."""
        npy = READABLE_DTYPES[self._key.dtype].npy
        if npy is None:
            raise InvalidArgumentError(
                f"{self._key.name}: NumPy has no {self._key.dtype}; read a tensor and call .float()"
            )
        numbers = self._row_numbers(rows)
        out: NDArray[Any] = np.empty(self._key.shape(len(numbers)), npy)
        self._fill(numbers, out.reshape(-1).view(np.uint8), verify=False)
        return out

    def __array__(self, dtype: Any = None, copy: Any = None) -> NDArray[Any]:
        return np.asarray(self.numpy(), dtype)

    def _row_numbers(self, rows: Rows) -> NDArray[np.int64]:
        """Return the numbers of rows from 0 on, int64 (R,)."""
        boards = self._files.boards
        if not self._key.of_boards:
            if rows is None:
                return np.zeros(1, np.int64)
            raise InvalidArgumentError(
                f"{option('rows')} must be left out: {self._key.name} has no axis of boards"
            )
        if rows is None or isinstance(rows, slice):
            return np.arange(*(rows or slice(None)).indices(boards))
        numbers = np.asarray(rows)
        if numbers.shape == (0,):
            return np.empty(0, np.int64)
        if numbers.dtype == bool and numbers.shape == (boards,):
            return np.flatnonzero(numbers)
        if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
            got = f"{numbers.dtype} {numbers.shape}" if numbers.ndim else f"a scalar, {rows!r}"
            raise InvalidArgumentError(
                f"{option('rows')} must be a 1-D integer array or a boolean mask of length "
                f"{boards}; got {got}"
            )
        outside = (numbers < -boards) | (numbers >= boards)
        if outside.any():
            at = int(np.argmax(outside))
            raise RowIndexError(
                f"{option('rows')}: row {numbers[at]} at position {at} is not in {self._files}, "
                f"which has {boards} boards"
            )
        numbers = numbers.astype(np.int64)
        return np.where(numbers < 0, numbers + boards, numbers)

    def _fill(self, numbers: NDArray[np.int64], out: NDArray[np.uint8], *, verify: bool) -> None:
        parts = self._key.parts
        if not out.size:
            return
        rows = out.reshape(len(numbers), len(parts), -1)
        for at, part in enumerate(parts):
            into = rows[:, 0] if len(parts) == 1 else np.empty(rows[:, at].shape, np.uint8)
            self._files.read(part, numbers, into)
            if verify:
                self._files.check_digest(part.tensor, into.reshape(-1))
            if len(parts) > 1:
                rows[:, at] = into
