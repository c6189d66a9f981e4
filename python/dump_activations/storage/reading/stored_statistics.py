"""Statistics of a finished dump: those that its files store, or computed from its values."""

from collections.abc import Callable, Mapping

import numpy as np

from dump_activations.dtypes import STATISTICS_PREFIX
from dump_activations.errors import InvalidArgumentError, switch
from dump_activations.interrupts import sum_in_parallel
from dump_activations.storage.reading.dump_files import DumpFiles
from dump_activations.storage.reading.inspection import Inspection, read_span
from dump_activations.storage.reading.keys import Key, Part
from dump_activations.storage.statistics import (
    STATISTICS,
    Array,
    Moments,
    Statistic,
    TensorStatistics,
    Vectors,
    merge_stored,
    statistics_specs,
)

_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})

# Bytes that a thread reads and measures at a time. The bits of computed statistics depend on it.
_CHUNK_NBYTES = 8 << 20


def stored_statistics(dump: DumpFiles) -> dict[str, TensorStatistics]:
    """Return the statistics that files hold by tensor, merged in the order of the files.

    Tensors that lack a statistic in one of the files are left out.
    """
    first, *others = [_stored_in(file) for file in dump.files]
    return {
        tensor: merge_stored([of_first, *(of_file[tensor] for of_file in others)])
        for tensor, of_first in first.items()
        if all(tensor in of_file for of_file in others)
    }


def _stored_in(file: Inspection) -> dict[str, TensorStatistics]:
    tensors = file.tensors.values()
    there = {(each.name, each.dtype, each.shape) for each in tensors if each.offset is not None}
    found: dict[str, TensorStatistics] = {}
    for mean in tensors:
        tensor = mean.name.removeprefix(STATISTICS_PREFIX).removesuffix("/mean")
        if mean.name != f"{STATISTICS_PREFIX}{tensor}/mean" or len(mean.shape) not in (1, 2):
            continue
        *layers, width = mean.shape
        specs = statistics_specs(tensor, layers=layers[0] if layers else None, width=width)
        if not {(spec.name, spec.dtype, spec.shape) for spec in specs} <= there:
            continue
        found[tensor] = {}
        for each, spec in zip(STATISTICS, specs, strict=True):
            values = found[tensor][each.name] = np.empty(spec.shape)
            read_span(file, spec.name, 0, values.reshape(-1).view(np.uint8))
    return found


def compute_statistics(
    dump: DumpFiles, *, threads: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, TensorStatistics]:
    """Read a dump and return the statistics of its floating activations by tensor.

    They agree with `dump(stats=True)` to rounding, and do not depend on `threads` or shards.
    `progress` is called in this thread with bytes read and bytes in all, and may raise.
    """
    vectors, lengths = {}, {}
    for key in dump.catalog.keys.values():
        layers = None if key.layers is None or key.is_split else len(key.layers)
        for name, *_ in key.parts:
            stored = dump.tensors[name]
            if stored.dtype in _DTYPES and key.value and stored.nbytes:
                of = vectors[name] = Vectors(stored.dtype, layers, stored.shape)
                rows = max(_CHUNK_NBYTES // of.row_nbytes, 1)
                lengths[name] = stored.nbytes, rows * of.row_nbytes

    def measure(name: str, start: int, stop: int) -> Moments:
        data = np.empty(stop - start, np.uint8)
        dump.read_span(name, start, data)
        return vectors[name].measure(data)

    found = sum_in_parallel(measure, lengths, threads, progress)
    return {name: vectors[name].statistics(moments) for name, moments in found.items()}


def key_statistics(key: Key, stored: Mapping[str, TensorStatistics]) -> TensorStatistics:
    """Return the stored statistics of a key, of all its layers or of one."""
    found = [stored[part.tensor] for part in key.parts if part.tensor in stored]
    of_layers = (len(key.layers or ()) or key.parts[0].of, *key.value[-1:])
    shapes = {each["mean"].shape for each in found}
    if len(found) < len(key.parts) or not shapes <= {of_layers, key.value[-1:]}:
        raise InvalidArgumentError(
            f"{key.name} has no statistics in the file; dump with {switch('stats')}, "
            "or see inspect-activations --stats, which computes and shows them"
        )

    def of_part(part: Part, each: Statistic) -> Array:
        values = stored[part.tensor][each.name]
        if shapes == {of_layers}:  # stacked
            return values if key.layers is not None else values[part.at]
        return each.without_layers(values)

    found_of = {each.name: [of_part(part, each) for part in key.parts] for each in STATISTICS}
    return {name: np.stack(of) if key.is_split else of[0] for name, of in found_of.items()}
