"""ActivationsFile: a finished file, or several as one, read by rows.

Shape letters: N boards in all files, R rows that are asked for, L layers kept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dump_activations.dtypes import DTYPES, LABEL_PREFIX
from dump_activations.errors import InvalidArgumentError, option, switch
from dump_activations.storage.reading.catalog import Key
from dump_activations.storage.reading.rows import Rows, row_numbers
from dump_activations.storage.reading.tensor_files import TensorFiles

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dump_activations.storage.reading.board_values import BoardValues
    from dump_activations.storage.reading.cells import Cells


class ActivationsFile:
    """A finished dump, read by rows: `.safetensors`, `.pt` or `.npz`.

    Opening reads headers only, keeps no file open and imports no torch. Instances can be pickled,
    used from several threads and carried over a fork. That a file was replaced or changed since is
    an error. Other `.safetensors` files can be read too, if the first axis of all their tensors is
    that of the boards.

        acts = ActivationsFile("activations.safetensors")
        hidden = acts.read("layer_outputs", range(1000), layer=3)  # (1000, 16, H)

    Args:
        paths: One file; or several dumps of one model and the same keys, whose rows are counted
            through all of them in the order given.

    Raises:
        InvalidArgumentError: A suffix names no format, or the files do not belong together.
        OutputError: A file cannot be read, is not of its format, or has no axis of boards.
    """

    def __init__(self, *paths: str | os.PathLike[str]) -> None:
        if not paths:
            raise InvalidArgumentError("paths: name a file")
        self._files = TensorFiles([Path(path) for path in paths])

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files."""
        return tuple(self._files.paths)

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the file says of itself; of several, the first."""
        return self._files.metadata

    def __len__(self) -> int:
        """Boards in all files."""
        return self._files.boards

    def __repr__(self) -> str:
        return f"ActivationsFile({', '.join(repr(os.fspath(path)) for path in self.paths)})"

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": self._files}

    def keys(self) -> list[str]:
        """Names of the activation keys that have a value a board; one that is split is one key."""
        return list(self._files.catalog.keys)

    def tensor_names(self) -> list[str]:
        """Names of all tensors as they are stored, which `read` takes too."""
        return list(self._files.catalog.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a key: `(N, L, *value)` where it has layers, stacked or split, or `(N, *value)`.

        Raises:
            InvalidArgumentError: There is no such key.
        """
        return self._find(key).shape(len(self))

    def dtype(self, key: str) -> str:
        """Name the dtype of a key as NumPy and torch do: `float16`, `bfloat16`.

        Raises:
            InvalidArgumentError: There is no such key.
        """
        return self._find(key).dtype

    def layers(self, key: str) -> tuple[int, ...]:
        """Numbers of the model's layers that the file has of a key; none where it has no such axis.

        Raises:
            InvalidArgumentError: There is no such key.
        """
        return self._find(key).layers or ()

    @cached_property
    def indices(self) -> NDArray[np.int64]:
        """Global step index of each board, int64 (N,)."""
        return self.read_numpy("indices")

    @cached_property
    def labels(self) -> Mapping[str, NDArray[Any]]:
        """Labels by name, (N,) or (N, ...); each is read when it is first asked for."""
        return _Stored(self, self._files.catalog.labels, LABEL_PREFIX)

    def read(
        self,
        key: str,
        rows: Rows = None,
        *,
        layer: int | None = None,
        out: Tensor | None = None,
        verify: bool = False,
    ) -> Tensor:
        """Read the values of boards as they are stored: `(R, *value)`, or `(R, L, *value)`.

        All cores read, with the interpreter released; of one layer, only its bytes.

        Args:
            key: An activation key, or a tensor by its own name: `boards`, `labels/move_dir`. What
                has no first axis of boards is read whole.
            rows: Numbers of rows in any order, with repeats; a slice; a mask, bool (N,); None for
                all.
            layer: One layer by its number in the model, whether the file has them stacked or split.
            out: Where to put the values, which is also returned: a contiguous tensor on the host,
                in pinned memory too, of their shape and dtype.
            verify: Compare what is read with the file's digests. They are of whole tensors: of all
                `rows`, and of all layers where these are stacked.

        Raises:
            InvalidArgumentError: There is no such key or layer, or `out` does not fit.
            RowIndexError: A row is negative or past the end.
            OutputError: A row cannot be read, a file was changed, or a digest differs.
        """
        import torch

        if verify and rows is not None:
            raise _not_whole("rows")
        found = self._find(key)
        numbers = self._numbers(found, rows)
        shape, dtype = found.shape(len(numbers), layer), getattr(torch, found.dtype)
        if out is None:
            out = torch.empty(shape, dtype=dtype, device="cpu")
        elif (out.shape, out.dtype, out.device.type) != (shape, dtype, "cpu") or not (
            out.is_contiguous()
        ):
            raise InvalidArgumentError(
                f"{option('out')}: a contiguous tensor of {dtype} {shape} on the host is wanted"
            )
        data = out.detach().view(-1).view(torch.uint8).numpy()
        self._fill(found, numbers, layer, data, verify=verify)
        return out

    def read_numpy(self, key: str, rows: Rows = None, *, layer: int | None = None) -> NDArray[Any]:
        """Read as `read` does, without torch; NumPy has no bfloat16.

        Raises as `read` does.
        """
        found = self._find(key)
        npy = DTYPES[found.dtype].npy
        if npy is None:
            raise InvalidArgumentError(f"{key}: NumPy has no {found.dtype}; `read` has")
        numbers = self._numbers(found, rows)
        out: NDArray[Any] = np.empty(found.shape(len(numbers), layer), npy)
        self._fill(found, numbers, layer, out.reshape(-1).view(np.uint8))
        return out

    def boards(
        self, key: str, layer: int | None = None, labels: str | Sequence[str] = ()
    ) -> BoardValues:
        """Return a map-style dataset of `(activation, {label: value})`, a board each.

        A `DataLoader` takes it, with workers too, whole or through `random_split` and samplers; it
        reads each batch in one call.

        Args:
            key: An activation key.
            layer: One layer by its number in the model; None for all of them.
            labels: Names of labels of the file.

        Raises:
            InvalidArgumentError: There is no such key, layer or label.
        """
        from dump_activations.storage.reading.board_values import BoardValues

        found = self._find(key)
        found.parts(layer)
        if not found.of_boards:
            raise InvalidArgumentError(f"{key} has no axis of boards")
        names = (labels,) if isinstance(labels, str) else labels
        for name in names:
            if name not in self.labels:
                has = ", ".join(self.labels) or "none"
                raise InvalidArgumentError(f"{option('labels')}: no {name!r} in it; it has {has}")
        return BoardValues(
            len(self),
            partial(self.read, key, layer=layer),
            {name: partial(self.read_numpy, LABEL_PREFIX + name) for name in names},
        )

    def cells(
        self,
        key: str | Sequence[str],
        layer: int | None = None,
        *,
        batch_size: int = 8192,
        seed: int = 0,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window: int = 256 << 20,
        device: str | torch.device | None = None,
        drop_last: bool = False,
    ) -> Cells:
        """Return shuffled batches of cells, `CellBatch(values, rows, cells)`, as SAEs train on.

        Each cell of each board comes once an epoch. The file is read in windows, stretches of
        consecutive boards that come in a drawn order, and cells are shuffled within each; three
        windows are held in memory. Boards that were drawn are in a drawn order already, so only the
        cells of one board stay near one another: with the defaults and 1 KB a cell two of them are
        11 batches apart on average, and 38 % of all cells share a batch with another one of their
        board, where a shuffle of 4 million cells as one leaves 3 %.

        The order depends on `seed`, `epoch`, `batch_size` and `window` alone; `cell_order` has it.
        Ranks take its batches in turns. `state_dict()` and `load_state_dict()` leave off and go on
        in the middle. Reading goes on in the background, without a `DataLoader`; one with workers
        needs `batch_size=None`, and `persistent_workers=True` for the epochs after the first.

        Args:
            key: An activation key with an axis of cells; of several the same cells are read, and
                `values` is a dict.
            layer: The layer by its number in the model, of keys that have layers.
            batch_size: Cells a batch; the last of an epoch may have fewer.
            seed: Seed of the order.
            epoch: The first epoch; the others follow, an iteration each.
            rank: Which of `world_size` processes this is.
            world_size: Processes that share the batches.
            window: Bytes of a window, at least those of a batch.
            device: Where the values go; to a CUDA device through pinned memory, on a side stream.
            drop_last: Leave out a short last batch, and those that not every rank would have.

        Raises:
            InvalidArgumentError: There is no such key or layer, a key has no axis of cells, or a
                number is out of range.
            DeviceError: There is no such device.
        """
        from dump_activations.storage.reading.cell_values import CellValues
        from dump_activations.storage.reading.cells import Cells

        keys = (key,) if isinstance(key, str) else tuple(key)
        if not keys:
            raise InvalidArgumentError(f"{option('key')}: no keys")
        return Cells(
            self._files,
            {name: CellValues.of(self._find(name), layer) for name in keys},
            single=isinstance(key, str),
            batch_size=batch_size,
            seed=seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            window=window,
            device=device,
            drop_last=drop_last,
        )

    def stats(self, key: str, layer: int | None = None) -> dict[str, NDArray[np.float64]]:
        """Return the statistics that were stored with the file (`stats=True`), float64, by name.

        Vectors lie along the last axis, F features each. `count`, `norm_mean` and
        `mean_squared_norm` are (L,), or () of one layer or a key without layers. `mean`,
        `variance`, `min`, `max` and `count_abs_gt_6` are (L, F) or (F,).

        Args:
            key: An activation key.
            layer: One layer by its number in the model; None for all of them.

        Raises:
            InvalidArgumentError: There is no such key or layer, or there are no statistics.
        """
        from dump_activations.storage.statistics import key_statistics

        if len(self.paths) > 1:
            raise InvalidArgumentError(f"{self}: statistics are of one file; open each by itself")
        return key_statistics(self._find(key), layer, _Stored(self, self.tensor_names()))

    def _find(self, name: str) -> Key:
        """Find a key; InvalidArgumentError where there is none, or of a dtype that dumps lack."""
        found = self._files.catalog.find(name)
        if found.dtype not in DTYPES:
            raise InvalidArgumentError(f"{name} is of {found.dtype}, which cannot be read")
        return found

    def _numbers(self, key: Key, rows: Rows) -> NDArray[np.int64]:
        if key.of_boards:
            return row_numbers(rows, len(self), self)
        if rows is not None:
            raise InvalidArgumentError(
                f"{option('rows')}: {key.name} has no axis of boards; it is read whole"
            )
        return np.zeros(1, np.int64)

    def _fill(
        self,
        key: Key,
        numbers: NDArray[np.int64],
        layer: int | None,
        out: NDArray[np.uint8],
        *,
        verify: bool = False,
    ) -> None:
        """Read into the bytes `out`."""
        parts = key.parts(layer)
        if verify and parts[0].of > 1:
            raise _not_whole("layer")
        nbytes = math.prod(key.shape(1, layer)) * DTYPES[key.dtype].nbytes
        rows = out.reshape(len(numbers), len(parts), nbytes // len(parts))
        for at, part in enumerate(parts):
            into = rows[:, 0] if len(parts) == 1 else np.empty(rows[:, at].shape, np.uint8)
            self._files.read(part.tensor, numbers * part.of + part.at, into, parts=part.of)
            if verify:
                self._files.check_digest(part.tensor, into.reshape(-1))
            if len(parts) > 1:
                rows[:, at] = into


def _not_whole(name: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{switch('verify')}: digests are of whole tensors; leave out {option(name)}"
    )


class _Stored(Mapping[str, NDArray[Any]]):
    """Tensors of a file, by names without a prefix; each is read when it is first asked for."""

    def __init__(self, acts: ActivationsFile, names: list[str], prefix: str = "") -> None:
        self._acts = acts
        self._names = names
        self._prefix = prefix
        self._read: dict[str, NDArray[Any]] = {}

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._read:
            self._read[name] = self._acts.read_numpy(self._prefix + name)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
