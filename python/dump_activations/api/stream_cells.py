"""`stream_cells`: shuffled cells straight from a model, without a file.

Shape letters: B cells in a batch, M cells of a window, D width of a cell's value.
"""

import math
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from itertools import cycle, islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from dump_activations.api.step_indices import with_step_indices
from dump_activations.api.stream import Batch, batches_of
from dump_activations.dataset.dataset import StepsDataset
from dump_activations.dataset.expressions import Expression
from dump_activations.dtypes import CELLS, STORAGE_DTYPES
from dump_activations.errors import InvalidArgumentError, option, whole_number
from dump_activations.model.encoder import Encoder
from dump_activations.pipeline.device import DeviceAdvice, current
from dump_activations.pipeline.options import StreamOptions
from dump_activations.pipeline.plan import Plan, fingerprint, make_plan
from dump_activations.storage.reading.cells import (
    CellOrder,
    Cells,
    CellValues,
    KeyedCells,
    Values,
    find_cells,
    rows_and_cells,
)
from dump_activations.storage.reading.keys import Key, Part
from dump_activations.storage.statistics import STATISTICS, Moments, Vectors

Buffers = dict[str, Tensor]
"""Values by key, (M, D)."""


def stream_cells(
    init: str | os.PathLike[str] | Encoder,
    dataset: str | os.PathLike[str] | StepsDataset,
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
    drop_last: bool = False,
    n_samples: int = 1024,
    indices: ArrayLike | os.PathLike[str] | None = None,
    steps: slice | str | None = None,
    where: str | Expression | None = None,
    boards_per_pass: int = 1024,
    dtype: Literal["fp32", "fp16", "bf16"] | torch.dtype = "fp32",
    device: str | torch.device = "cuda",
    allow_cpu: bool = False,
    random_init: bool = False,
    precision: Literal["fp32", "tf32", "bf16", "bf16-true"] = "fp32",
    compile: bool = False,  # noqa: A002 -- the command's flag
) -> "StreamedCells[Any]":
    """Return shuffled batches of cells, `CellBatch(values, rows, cells)`, straight from a model.

    `ActivationsFile.cells` gives the same cells for a dump of the same boards, and in the same
    order if `batch_size` is a multiple of 16. Each loop is the next epoch, and computes its cells
    again. A window of boards goes through the model while the window before it is taken, so
    that two windows are in the device's memory. Each window belongs to one rank.

    `state_dict()` and `load_state_dict()` resume in the middle of an epoch, with the same number of
    ranks. A `DataLoader` needs `batch_size=None` and `num_workers=0`. `stats()` returns statistics
    to scale by.

    Args:
        init: a checkpoint directory, `.pt` bundle or `hf://org/repo[/subdir][@revision]`;
            or a loaded Encoder.
        dataset: a dataset of steps, or its directory.
        key: an activation key with an axis of cells; with several keys `values` is a dict.
        layer: the layer by its number, of keys that have layers.
        batch_size: cells per batch; the last of an epoch may have fewer.
        seed: seed of the sample and of the order, at least 0.
        epoch: number of the first epoch, at least 0.
        epochs: epochs per loop; None for a loop without an end.
        rank: number of this process among `world_size`.
        world_size: processes that share the windows.
        window: bytes per window, at least one batch.
        drop_last: leave out a short last batch, and windows that not every rank would have.
        n_samples: steps to sample, unless `indices` or `steps` are given.
        indices: global step indices to use instead of a sample, as `stream` takes them.
        steps: steps to take in their order instead of a sample. A window then holds few games.
        where: take only steps that match this expression, such as "max_exponent >= 11".
        boards_per_pass: boards per forward pass.
        dtype: dtype of the values, by its name or torch's dtype.
        device: compute device, where the values are: cuda, cuda:N, or cpu with `allow_cpu`.
        allow_cpu: run on the CPU where there is no GPU.
        random_init: give the checkpoint's architecture untrained weights, as a control.
        precision: arithmetic of the forward pass; tf32 on CUDA only.
        compile: run the model through torch.compile.

    Raises:
        DumpActivationsError: one line that names what is wrong and the way out.
    """
    given = locals()
    keys = (key,) if isinstance(key, str) else tuple(key)
    of_run = {"outputs": keys, "batch_size": boards_per_pass, "tensors": "device"}
    options = StreamOptions.of(given | of_run | {"layers": None if layer is None else [layer]})
    with DeviceAdvice(batch_size=boards_per_pass):
        dataset, options = with_step_indices(dataset, options)
        plan = make_plan(init, dataset, options)
    values = _find_values(plan, keys, layer)
    order = CellOrder(
        cells=len(plan.indices) * CELLS,
        nbytes=sum(each.nbytes for each in values.values()),
        window=window,
        batch_size=batch_size,
        seed=seed,
        epoch=epoch,
        rank=rank,
        world_size=world_size,
        drop_last=drop_last,
    )
    # Windows of whole boards, so that no board is computed twice.
    least = CELLS // math.gcd(CELLS, batch_size) * order.batch_nbytes
    order = replace(order, window=max(window // least, 1) * least)
    return StreamedCells(
        order, plan, values, single=isinstance(key, str), epochs=epochs, dtype=None
    )


def _find_values(plan: Plan, keys: Sequence[str], layer: int | None) -> dict[str, CellValues]:
    """Find the values of the keys' cells in a run's batches; InvalidArgumentError as `cells`."""
    if plan.weights or len(plan.board_tensors) != len(keys):
        raise InvalidArgumentError(
            f"{option('key')} must name keys with an axis of cells; got {', '.join(keys)}"
        )
    dtype, in_model = STORAGE_DTYPES[plan.options.dtype].name, plan.model.config.num_hidden_layers
    found = {}
    for tensor in plan.board_tensors:
        shape, layers = (tensor.shape[1:], plan.layers) if tensor.stacked else (tensor.shape, None)
        key = Key(tensor.name, dtype, shape, (Part(tensor.name),), layers, in_model)
        found[tensor.name] = find_cells(key, layer)
    return found


class StreamedCells(Cells[Values]):
    """Cells of a plan's run. Each window belongs to one rank."""

    def __init__(
        self, order: CellOrder, plan: Plan, values: Mapping[str, CellValues], **loop: Any
    ) -> None:
        super().__init__(order, repr(fingerprint(plan)), **loop)
        self._plan = plan
        self._values = values
        windows = -(-order.cells // (order.window_batches * order.batch_size))
        if windows < order.world_size:
            raise InvalidArgumentError(
                f"{option('world_size')} must be at most the {windows} windows; got "
                f"{order.world_size}; take a smaller {option('window')}"
            )

    def stats(self, windows: int = 1) -> dict[str, Any]:
        """Run the first windows of the sample, and return statistics of their cells' values.

        They are named as those of `ActivationsFile.stats`, float64, (F,) or (), for values of F
        features; with several keys a dict of them by key. All ranks and epochs get the same.

        Args:
            windows: windows to run, at least 1.
        """
        if isinstance(windows, bool) or (count := whole_number(windows) or 0) < 1:
            raise InvalidArgumentError(f"{option('windows')} must be at least 1; got {windows!r}")
        boards = count * self._order.window_batches * self._order.batch_size // CELLS
        rows = range(min(boards, len(self._plan.indices)))
        dtype = STORAGE_DTYPES[self._plan.options.dtype].name
        vectors = {key: Vectors(dtype, None, (CELLS, of.width)) for key, of in self._values.items()}
        moments: dict[str, Moments] = {}
        for batch in batches_of(self._plan, [rows], tensors="view"):
            for key, of in vectors.items():
                more = of.measure(_bytes(batch.tensors[key]).reshape(-1))
                moments[key] = moments[key] + more if key in moments else more
        found = {}
        for key, of in vectors.items():
            values = of.statistics(moments[key])
            found[key] = {each.name: each.without_layers(values[each.name]) for each in STATISTICS}
        [single, *_] = found.values()
        return single if self._single else found

    def _fixed(self) -> dict[str, Any]:
        return {**super()._fixed(), "world_size": self._order.world_size}

    def _share(self, start: int, rank: int, step: int) -> Sequence[int]:
        if get_worker_info() is not None:
            raise InvalidArgumentError(
                "stream_cells runs the model in the process that takes its cells; use num_workers=0"
            )
        order, length = self._order, self._order.window_batches
        stop = -(-order.cells // order.batch_size)
        if order.drop_last:  # whole batches, and equally many for each rank
            stop = order.cells // order.batch_size
            if step > 1:
                stop -= stop % (step * length)
        firsts = range(rank * length, stop, step * length)
        mine = [batch for first in firsts for batch in range(first, min(first + length, stop))]
        return mine[start // step :]

    def _read(self, order: CellOrder, batches: Sequence[int]) -> Generator[KeyedCells, None, None]:
        if not batches:
            return
        windows = list(order.windows(batches))
        boards = order.window_batches * order.batch_size // CELLS
        rows = [range(len(self._plan.indices))[i * boards : (i + 1) * boards] for i, _ in windows]
        passes: list[int] = [-(-len(each) // self._plan.options.batch_size) for each in rows]
        device = self._plan.device
        # The caller may be in another stream at each batch. All but its values stays in this one.
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        with closing(batches_of(self._plan, rows, tensors="device", computes_ahead=True)) as run:
            computed = self._compute(run, rows)
            values: Buffers | None = None
            for (window, inside), ahead in zip(windows, [*passes[1:], 0], strict=True):
                cells_M = order.read(window, inside)
                with _working_in(stream, device):
                    values = values or next(filter(None, computed))
                    places_M = torch.from_numpy(cells_M - window * boards * CELLS).to(device)
                upcoming: Buffers | None = None
                for i in range(len(inside)):
                    # The next window is computed at the pace at which this one is taken.
                    now = ahead * (i + 1) // len(inside) - ahead * i // len(inside)
                    with _working_in(stream, device):
                        for upcoming in islice(computed, now):  # noqa: B007 -- the last of them
                            pass
                    cut = slice(i * order.batch_size, (i + 1) * order.batch_size)
                    rows_B, cells_B = rows_and_cells(cells_M[cut])
                    yield _choose(values, places_M[cut], stream), rows_B, cells_B
                values = upcoming

    def _compute(self, run: Iterator[Batch], rows: Sequence[range]) -> Iterator[Buffers | None]:
        """Compute windows one after the other: yield None per pass, or a window that is complete.

        Two windows have memory: one is complete when the other is begun again.
        """
        most = max(map(len, rows)) * CELLS
        dtype, device = self._plan.storage_dtype, self._plan.device
        copy = Tensor.copy_ if device.type == "cuda" else _copy
        memory = [
            {
                name: torch.empty((most, of.width), dtype=dtype, device=device)
                for name, of in self._values.items()
            }
            for _ in range(2)
        ]
        windows = zip(rows, cycle(memory), strict=False)
        window, buffers = next(windows)
        for batch in run:
            first = (batch.first_row - window.start) * CELLS
            for name, buffer in buffers.items():
                values = batch.tensors[name].view(-1, buffer.shape[1])
                copy(buffer[first : first + len(values)], values)
            is_last = batch.first_row + len(batch.indices) == window.stop
            yield buffers if is_last else None
            if is_last:
                window, buffers = next(windows, (window, buffers))


@contextmanager
def _working_in(stream: torch.cuda.Stream | None, device: torch.device) -> Iterator[None]:
    """Make a stream and its device the current ones.

    Without the device, torch would set up a context on the current one when it leaves the stream.
    """
    with current(device), nullcontext() if stream is None else torch.cuda.stream(stream):
        yield


def _choose(values: Buffers, places: Tensor, stream: torch.cuda.Stream | None) -> Buffers:
    """Copy the cells at some places of a window, to memory of the caller's current stream."""
    if stream is None:
        return {
            name: torch.from_numpy(_bytes(each)[places.numpy()]).view(each.dtype)
            for name, each in values.items()
        }
    caller = torch.cuda.current_stream(places.device)
    chosen = {name: each.new_empty((len(places), each.shape[1])) for name, each in values.items()}
    stream.wait_stream(caller)  # which may still use that memory for something else
    with _working_in(stream, places.device):
        for name, each in values.items():
            chosen[name].copy_(each.index_select(0, places))
    caller.wait_stream(stream)
    return chosen


def _copy(target: Tensor, source: Tensor) -> None:
    np.copyto(_bytes(target), _bytes(source))


def _bytes(host: Tensor) -> NDArray[np.uint8]:
    """View values on the host for NumPy, which copies on this thread alone.

    torch would copy on several, and wait for one while the forward pass has its core.
    """
    return host.view(torch.uint8).numpy()
