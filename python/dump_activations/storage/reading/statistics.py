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
from dump_activations.storage.reading.catalog import Catalog, Key
from dump_activations.storage.reading.inspection import READ_NBYTES, Inspection, open_again
from dump_activations.storage.statistics import RunningStatistics, TensorStatistics, Vectors

_DTYPES = frozenset({"float32", "float16", "bfloat16"})


def stored_statistics(inspection: Inspection) -> dict[str, TensorStatistics]:
    """Return the statistics that a file has, by the names of its tensors; none where it has none.

    Raises:
        OutputError: they cannot be read.
    """
    found: dict[str, TensorStatistics] = {}
    with open_again(inspection) as file:
        for stored in inspection.contents.tensors:
            tensor, _, name = stored.name.removeprefix(STATISTICS_PREFIX).rpartition("/")
            if f"{STATISTICS_PREFIX}{tensor}/{name}" != stored.name or stored.dtype != "float64":
                continue
            try:
                assert stored.offset is not None
                data = np.frombuffer(read_exactly(file, stored.offset, stored.nbytes), "<f8")
            except ValueError as error:
                raise OutputError(f"{inspection.path}: {stored.name}: {error}") from None
            found.setdefault(tensor, {})[name] = data.reshape(stored.shape)
    return found


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
        if not all(name in stored for name in names):
            continue
        values = np.stack([stored[name] for name in names])
        if not each.per_feature and (key.is_split or key.layers is None):
            values = values[:, 0]
        # Tensors of one layer are stacked here, layers of one tensor are so already.
        if len(parts) == 1 and not (key.is_split and layer is None):
            values = values[0]
        one_of_stacked = layer is not None and key.layers is not None and not key.is_split
        found[each.name] = values[parts[0].at] if one_of_stacked else values
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
            if stored.dtype not in _DTYPES or len(stored.shape) < 2 or not stored.nbytes:
                continue
            layers = None if key.is_split or key.layers is None else len(key.layers)
            *axes, width = stored.shape[1:]
            found.append(Vectors(stored.name, stored.dtype, layers, prod(axes), width))
    return found
