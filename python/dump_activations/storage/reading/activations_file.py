"""ActivationsFile: a finished dump, or several as one, read by rows.

Shape letters: N boards in all files, R rows asked for, L layers kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from dump_activations.dtypes import CELLS, LABEL_PREFIX, READABLE_DTYPES, STATISTICS_PREFIX
from dump_activations.errors import (
    InvalidArgumentError,
    MissingKeyError,
    option,
    printable,
    size_text,
    switch,
    warn,
)
from dump_activations.remote import input_path
from dump_activations.storage.reading.array import ActivationArray, Rows
from dump_activations.storage.reading.dump_files import inspect_dump
from dump_activations.storage.reading.keys import Key

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dump_activations.storage.reading.boards import BoardValues
    from dump_activations.storage.reading.cells import CellArguments, Cells
    from dump_activations.storage.statistics import TensorStatistics

# Rows of a representation, and names in one of them.
_MOST_KEYS, _MOST_NAMES = 15, 8
# Boards whose order tells if all are a random sample.
_ENOUGH_ORDER = 64


class ActivationsFile:
    """A finished dump, read by rows: `.safetensors`, `.pt` or `.npz`, one file or shards.

    Opening reads headers only, keeps no file open and imports no torch. Instances can be pickled,
    used from several threads and carried over a fork. A file that was replaced or cut short since
    is an error. A byte changed in place is not, because `touch` and network mounts renew times too:
    only `verify` finds it, in files with digests. `.safetensors` files of other programs can be
    read too, if all their tensors have a first axis of boards.

        acts = ActivationsFile("activations.safetensors")
        list(acts)  # its activation keys
        acts["layer_outputs"].layer(-1)[:1000]  # (1000, 16, H)
        acts["blocks.2.hook_resid_post"][mask]  # TransformerLens names too

    Every method that takes a key, layer or label raises InvalidArgumentError if the file does not
    have it. Layers are numbers in the model, and negative ones count from its last.

    Args:
        paths: One dump, by the name of its file, of the whole of its shards, or of one shard; or
            several dumps of one model and the same keys. Rows are counted through all files in the
            order given.

    Raises:
        InvalidArgumentError: A suffix names no format, or the files do not belong together.
        OutputError: A file cannot be read, is not of its format, or has no axis of boards; or a
            shard is missing.
    """

    def __init__(self, *paths: str | os.PathLike[str]) -> None:
        if not paths:
            raise InvalidArgumentError("paths: name a file")
        # Absolute, so that the program may change its directory before it reads.
        self.files = inspect_dump(*map(input_path, paths))
        len(self)  # which raises where a file has no axis of boards

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files; of a dump in shards, the shards in order."""
        return tuple(file.path for file in self.files.files)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The dump's metadata; of several dumps, the first's."""
        return self.files.metadata

    @property
    def n_samples(self) -> int | None:
        """Boards of the whole run, also in a shard; None in files of other programs."""
        return self._number("n_samples")

    @property
    def seed(self) -> int | None:
        """Seed of the sample; None in files of other programs."""
        return self._number("seed")

    @property
    def num_layers(self) -> int | None:
        """Layers of the model, kept or not; None in files of other programs."""
        return self._number("num_layers")

    @property
    def hidden_size(self) -> int | None:
        """Hidden size of the model; None in files of other programs."""
        return self._number("hidden_size")

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint as the caller named it; None in files of other programs."""
        return self.metadata.get("checkpoint")

    @property
    def dataset(self) -> str | None:
        """Path of the dataset; None in files of other programs."""
        return self.metadata.get("dataset")

    def _number(self, name: str) -> int | None:
        text = self.metadata.get(name, "")
        return int(text) if re.fullmatch("-?[0-9]{1,19}", text) else None

    def __len__(self) -> int:
        """Boards in all files."""
        return self.files.boards

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, key: object) -> bool:
        """Return whether `acts[key]` takes a name."""
        try:
            return isinstance(key, str) and self.files.catalog.find(key) is not None
        except InvalidArgumentError:
            return False

    def __getitem__(self, key: str) -> ActivationArray:
        """Return the values of a key, which are read where they are indexed.

        Args:
            key: An activation key, as `outputs` takes it: `layer_outputs`, `hook_resid_post`,
                `blocks.2.hook_resid_post`; or a tensor by its own name: `boards`.
        """
        return ActivationArray(self.files, self._find(key))

    def __repr__(self) -> str:
        rows = self._rows()
        width = max((len(name) for name, _ in rows), default=0)
        lines = [f"  {name:{width}}  {text}".rstrip() for name, text in rows]
        return "\n".join([self._title(), *lines])

    def _repr_html_(self) -> str:
        rows = [f"<tr><td>{escape(n)}</td><td>{escape(t)}</td></tr>" for n, t in self._rows()]
        return f"<p>{escape(self._title())}</p><table>{''.join(rows)}</table>"

    def _title(self) -> str:
        names = _brief(path.name for path in self.files.paths)
        size = size_text(self.files.size)
        return printable(f"ActivationsFile({names}): {len(self):,} boards, {size}")

    def _rows(self) -> list[tuple[str, str]]:
        """Describe the first keys, each in a row, and name all else."""
        keys, tensors = self.files.catalog.keys, self.files.catalog.tensors
        rows = {name: ActivationArray(self.files, keys[name]).text for name in [*keys][:_MOST_KEYS]}
        if len(keys) > _MOST_KEYS:
            rows[f"and {len(keys) - _MOST_KEYS:,} more keys"] = ""
        of_keys = {part.tensor for key in keys.values() for part in key.parts}
        counted = (LABEL_PREFIX, STATISTICS_PREFIX)
        others = [n for n in tensors if n not in of_keys and not n.startswith(counted)]
        named = {
            "labels": list(self.labels),
            "others": [name.partition("/")[0] for name in others],
            "statistics": [n.split("/")[1] for n in tensors if n.startswith(STATISTICS_PREFIX)],
        }
        rows |= {f"({what})": _brief(names) for what, names in named.items() if names}
        return [(printable(name), printable(text)) for name, text in rows.items()]

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files}

    def keys(self) -> list[str]:
        """Names of the activation keys with a value per board; a split key is one key."""
        return list(self.files.catalog.keys)

    def tensor_names(self) -> list[str]:
        """Names of all stored tensors, which `read` takes too."""
        return list(self.files.catalog.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a key: `(N, L, *value)` with layers, stacked or split, or else `(N, *value)`."""
        return self[key].shape

    def dtype(self, key: str) -> str:
        """Name the dtype of a key as NumPy and torch do: `float16`, `bfloat16`."""
        return self._find(key).dtype

    def layers(self, key: str) -> tuple[int, ...]:
        """Numbers of the model's layers stored for a key; empty without an axis of layers."""
        return self[key].layers

    @cached_property
    def indices(self) -> NDArray[np.int64]:
        """Global step index of each board, int64 (N,)."""
        return self.read_numpy("indices")

    @cached_property
    def labels(self) -> Mapping[str, NDArray[Any]]:
        """Labels by name, (N,) or (N, ...); each is read at its first use."""
        return _Labels(self)

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
            key: An activation key, or a tensor by its own name: `boards`, `labels/move_dir`. A
                tensor without a first axis of boards is read whole.
            rows: Row numbers in any order, with repeats; a slice; a mask, bool (N,); None for all.
                Negative numbers count from the end.
            layer: One layer by its number in the model, stacked or split.
            out: Receives the values and is returned: a contiguous tensor on the host, pinned or
                not, of their shape and dtype.
            verify: Compare the values with the file's digests. Digests cover whole tensors: all
                rows, and all layers where these are stacked.

        Raises:
            InvalidArgumentError: `rows` are not rows, or `out` does not fit.
            RowIndexError: A row is out of range.
            OutputError: A row cannot be read, a file was changed, or a digest differs.
        """
        return self._array(key, layer).read(rows, out=out, verify=verify)

    def read_numpy(self, key: str, rows: Rows = None, *, layer: int | None = None) -> NDArray[Any]:
        """Read as `read` does, without torch; NumPy has no bfloat16.

        Raises as `read` does.
        """
        return self._array(key, layer).numpy(rows)

    def _array(self, key: str, layer: int | None) -> ActivationArray:
        array = self[key]
        return array if layer is None else array.layer(layer)

    def boards(
        self, key: str, layer: int | None = None, labels: str | Sequence[str] = ()
    ) -> BoardValues:
        """Return a map-style dataset of `(activation, {label: value})`, one per board.

        A `DataLoader` takes it, with workers too, whole or through `random_split` and samplers, and
        reads each batch in one call. A batch sampler as `sampler` with `batch_size=None`, a slice
        or a list of rows give `(activations, {label: values})` of the whole batch.

        Args:
            key: An activation key.
            layer: One layer by its number in the model; None for all of them.
            labels: Names of labels of the file.
        """
        from dump_activations.storage.reading.boards import BoardValues

        array = self._array(key, layer)
        if not self._find(key).of_boards:
            raise InvalidArgumentError(f"{key} has no axis of boards")
        names = (labels,) if isinstance(labels, str) else labels
        if others := [name for name in names if name not in self.labels]:
            has = ", ".join(self.labels) or "none"
            raise InvalidArgumentError(
                f"{option('labels')} must be labels of the file, {has}; got {others[0]!r}"
            )
        return BoardValues(array, {name: self[LABEL_PREFIX + name] for name in names})

    @overload
    def cells(
        self, key: str, layer: int | None = None, **arguments: Unpack[CellArguments]
    ) -> Cells[Tensor]: ...
    @overload
    def cells(
        self,
        key: list[str] | tuple[str, ...],
        layer: int | None = None,
        **arguments: Unpack[CellArguments],
    ) -> Cells[dict[str, Tensor]]: ...
    def cells(
        self,
        key: str | Sequence[str],
        layer: int | None = None,
        *,
        batch_size: int = 8192,
        seed: int = 0,
        epoch: int = 0,
        epochs: int | None = 1,
        rank: int = 0,
        world_size: int = 1,
        window: int = 256 << 20,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        drop_last: bool = False,
        shuffle_boards: bool = False,
    ) -> Cells[Any]:
        """Return shuffled batches of cells, `CellBatch(values, rows, cells)`, as SAEs train on.

        Each cell of each board comes once per epoch, and each loop is the next epoch. The file is
        read in windows, spans of consecutive boards that come in a random order, and cells are
        shuffled within each; three windows are held in memory. Sampled boards are in a random order
        already, so only the cells of one board stay near one another: with the defaults and 1 KB
        per cell two of them are 11 batches apart on average, and 38 % of all cells share a batch
        with another cell of their board. A shuffle of 4 million cells leaves 3 %. The boards of a
        dump with `steps` are in the order of the games, so that a window holds few games:
        a warning says so, and `shuffle_boards` shuffles the whole file.

        The order depends on `seed`, `epoch`, `batch_size` and `window` alone; `cells.py` has it.
        Ranks take its batches in turns. `state_dict()` and `load_state_dict()` resume in the middle
        of an epoch. Reading ahead takes a thread and no `DataLoader`. A `DataLoader` with workers
        needs `batch_size=None`.

        Args:
            key: An activation key with an axis of cells; with several keys the same cells are read
                of each, and `values` is a dict.
            layer: The layer by its number in the model, of keys that have layers.
            batch_size: Cells per batch; the last of an epoch may have fewer.
            seed: Seed of the order, at least 0.
            epoch: Number of the first epoch, at least 0.
            epochs: Epochs per loop; None for a loop without an end.
            rank: Number of this process among `world_size`.
            world_size: Processes that share the batches.
            window: Bytes per window, at least one batch.
            device: Device of the values; batches reach a CUDA device through pinned memory, on a
                side stream.
            dtype: Dtype of the values; None for the stored one.
            drop_last: Leave out a short last batch, and batches that not every rank would have.
            shuffle_boards: Take the boards in a random order, 8 bytes each, before windows are cut.
                Boards are then read one by one, from all over the file.

        Raises:
            InvalidArgumentError: A key has no axis of cells, or a number is out of range.
            DeviceError: The machine does not have the device.
        """
        from dump_activations.storage.reading.cells import CellOrder, StoredCells, find_cells

        keys = (key,) if isinstance(key, str) else tuple(key)
        if not keys:
            raise InvalidArgumentError(f"{option('key')} must name a key; got none")
        values = {name: find_cells(self._find(name), layer) for name in keys}
        order = CellOrder(
            cells=len(self) * CELLS,
            nbytes=sum(each.nbytes for each in values.values()),
            window=window,
            batch_size=batch_size,
            seed=seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
            shuffle_boards=shuffle_boards,
        )
        if not shuffle_boards and self._is_in_file_order():
            warn(
                f"{self.files.path}: its boards are in the order of the dataset, not a random "
                f"sample, so that a window holds few games; {switch('shuffle_boards')} shuffles all"
            )
        loop = {"single": isinstance(key, str), "epochs": epochs, "dtype": dtype}
        return StoredCells(order, self.files, values, device, **loop)

    def _is_in_file_order(self) -> bool:
        """Return True if the first step indices ascend. One sample in 10^89 does."""
        indices = self.files.catalog.tensors.get("indices")
        if indices is None or indices.dtype != "int64" or len(self) < _ENOUGH_ORDER:
            return False
        return bool((np.diff(self.read_numpy("indices", slice(_ENOUGH_ORDER))) > 0).all())

    def stats(self, key: str, layer: int | None = None) -> dict[str, NDArray[np.float64]]:
        """Return the statistics stored with the dump (`stats=True`), float64, by name.

        Vectors lie along the last axis, F features each. `count`, `norm_mean` and
        `mean_squared_norm` are (L,), or () of one layer or a key without layers. `mean`,
        `variance`, `min`, `max` and `count_abs_gt_6` are (L, F) or (F,). Statistics of several
        files are merged in their order.

        Args:
            key: An activation key.
            layer: One layer by its number in the model; None for all of them.

        Raises:
            InvalidArgumentError: The file has no statistics of the key.
        """
        from dump_activations.storage.reading.stored_statistics import key_statistics

        found = self._find(key)
        return key_statistics(found if layer is None else found.layer(layer), self._statistics)

    @cached_property
    def _statistics(self) -> Mapping[str, TensorStatistics]:
        from dump_activations.storage.reading.stored_statistics import stored_statistics

        return stored_statistics(self.files)

    def _find(self, name: str) -> Key:
        """Find a key whose dtype can be read; InvalidArgumentError for any other."""
        found = self.files.catalog.find(name)
        if found.dtype not in READABLE_DTYPES:
            raise InvalidArgumentError(f"{name} is of {found.dtype}, which cannot be read")
        return found


class _Labels(Mapping[str, NDArray[Any]]):
    """Labels of a file; each is read at its first use."""

    def __init__(self, acts: ActivationsFile) -> None:
        self._acts = acts
        names = [name for name in acts.tensor_names() if name.startswith(LABEL_PREFIX)]
        self._names = [name.removeprefix(LABEL_PREFIX) for name in names]
        self._read: dict[str, NDArray[Any]] = {}

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            has = ", ".join(self) or "none"
            raise MissingKeyError(f"no label {name!r}; the labels are {has}")
        if name not in self._read:
            self._read[name] = self._acts.read_numpy(LABEL_PREFIX + name)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        names = list(self)[:_MOST_KEYS]
        rows = [printable(f"  {n}: {self._acts[LABEL_PREFIX + n].text}") for n in names]
        more = [f"  and {len(self) - len(names):,} more"] * (len(self) > len(names))
        return "\n".join([f"{len(self):,} labels", *rows, *more])


def _brief(names: Iterable[str]) -> str:
    """List each name once; of many, the first and how many more there are."""
    each = [*dict.fromkeys(names)]
    more = [f"and {len(each) - _MOST_NAMES:,} more"] * (len(each) > _MOST_NAMES)
    return ", ".join(each[:_MOST_NAMES] + more)
