"""Statistics of a finished file: those that it has, and what reading it gives."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from math import prod

import numpy as np
from numpy.typing import NDArray

from dump_activations.errors import InvalidArgumentError, OutputError, switch
from dump_activations.statistics import STATISTICS, STATISTICS_PREFIX
from dump_activations.storage.formats.contents import read_exactly
from dump_activations.storage.reading.inspection import READ_NBYTES, Inspection, open_again
from dump_activations.storage.reading.keys import Catalog, Key
from dump_activations.storage.statistics import RunningStatistics, TensorStatistics, Vectors

_DTYPES = frozenset({"float32", "float16", "bfloat16"})


def stored_statistics(inspection: Inspection) -> dict[str, TensorStatistics]:
    """Return the statistics that a file has, by the names of its tensors; none where it has none.

    Tensors of which it does not have all are left out.

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
    return {tensor: statistics for tensor, statistics in found.items() if _are_all(statistics)}


def _are_all(found: TensorStatistics) -> bool:
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
    """Read a file and return statistics of its activations, as `dump(stats=True)` would store them.

    Args:
        inspection: of the file.
        threads: how many read at once.
        progress: called now and then with bytes read and bytes in all; may raise.

    Raises:
        OutputError: the file cannot be read, or its tensors have no axis of boards.
    """
    vectors = _vectors_in(inspection)
    places = {tensor.name: tensor for tensor in inspection.contents.tensors}
    statistics = RunningStatistics(vectors)
    spans = [
        (each, start, min(at_once, places[each.name].nbytes - start))
        for each in vectors
        for at_once in [statistics.whole_vectors(each.name, READ_NBYTES)]
        for start in range(0, places[each.name].nbytes, at_once)
    ]
    whole = sum(nbytes for _, _, nbytes in spans)

    with open_again(inspection) as file, ThreadPoolExecutor(threads) as executor:

        def read(span: tuple[Vectors, int, int]) -> int:
            of, start, nbytes = span
            offset = places[of.name].offset
            assert offset is not None
            statistics.read(
                of.name, of.dtype, file.fileno(), offset=offset + start, nbytes=nbytes, start=start
            )
            return nbytes

        try:
            for done in accumulate(executor.map(read, spans)):
                if progress is not None:
                    progress(done, whole)
        except BaseException:
            executor.shutdown(cancel_futures=True)
            raise
    return statistics.values()


def key_statistics(
    key: Key, layer: int | None, stored: Mapping[str, NDArray[np.float64]]
) -> TensorStatistics:
    """Return the statistics of a key, of all its layers or of one.

    Args:
        key: the key.
        layer: the layer by its number in the model; None for all.
        stored: the tensors of statistics in a file by name.

    Raises:
        InvalidArgumentError: there are none, or not that layer.
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


def _vectors_in(inspection: Inspection) -> list[Vectors]:
    """List the tensors that have vectors: activations, as the file's own metadata names layers."""
    catalog = Catalog(inspection.path, inspection.contents)
    found = []
    for key in catalog.keys.values():
        for part in key.parts(None):
            stored = catalog.tensors[part.tensor]
            if stored.dtype not in _DTYPES or not key.value or not stored.nbytes:
                continue
            if stored.offset is None:
                raise OutputError(
                    f"{inspection.path}: {stored.name} is compressed or not in C order, and has no "
                    "statistics"
                )
            *axes, width = stored.shape[1:]
            found.append(Vectors(stored.name, stored.dtype, key.stacked, prod(axes), width))
    return found
