"""Files with statistics: the same bytes for any order of batches, threads and interruptions."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dump_activations.dtypes import DTYPES
from dump_activations.storage.formats.registry import FORMATS
from dump_activations.storage.reading.damage import find_damage
from dump_activations.storage.reading.dump_files import inspect_dump
from dump_activations.storage.statistics import statistics_specs
from dump_activations.storage.writing.paths import partial_path
from output_support import (
    SUFFIXES,
    Dump,
    finish,
    interrupt,
    open_file,
    small_dump,
    write_batches,
    write_dump,
)
from reference.dumps import read_dump
from reference.statistics import as_float64, numpy_statistics


def with_statistics(dump: Dump) -> Dump:
    """Ask for statistics of `hidden`, which is stacked, and of `pooled`."""
    hidden = statistics_specs("hidden", layers=3, width=5)
    return replace(
        dump, specs=[*dump.specs, *hidden, *statistics_specs("pooled", layers=None, width=7)]
    )


DUMP = with_statistics(small_dump(rows=990, batch_rows=100))
BATCHES = len(DUMP.first_rows)


def unbroken_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        return write_dump(Path(directory) / "x.safetensors", DUMP).read_bytes()


def damage(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_has_what_numpy_makes_of_its_tensors(tmp_path, suffix):
    path = write_dump(tmp_path / f"x{suffix}", DUMP)
    tensors = read_dump(path).tensors
    hidden, pooled = (as_float64(tensors[name].numpy()) for name in ("hidden", "pooled"))
    for layer in range(3):
        for name, expected in numpy_statistics(hidden[:, layer]).items():
            found = np.asarray(tensors[f"stats/hidden/{name}"])
            assert found.dtype == np.float64
            assert len(found) == 3
            if name != "variance":  # of random bits, of all magnitudes
                np.testing.assert_allclose(found[layer], expected, rtol=1e-9)
    for name, expected in numpy_statistics(pooled).items():
        found = np.asarray(tensors[f"stats/pooled/{name}"])
        np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=1e-9)
    assert find_damage(inspect_dump(path), threads=1) == {path: []}


@settings(max_examples=8, deadline=None)
@given(
    order=st.permutations(DUMP.first_rows),
    threads=st.integers(1, 3),
    kept=st.integers(0, BATCHES - 1),
)
def test_order_threads_and_interruptions_leave_no_trace(order, threads, kept):
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "x.safetensors"
        interrupt(target, DUMP, order[:kept], threads=threads)
        write_dump(target, DUMP, order=order, threads=threads)
        assert target.read_bytes() == unbroken_bytes()


def test_a_batch_that_is_damaged_does_not_count(tmp_path):
    target = tmp_path / "x.safetensors"
    interrupt(target, DUMP, DUMP.first_rows[:6])
    partial = partial_path(target)
    hidden = DUMP.batch(300)["hidden"].tobytes()
    damage(partial, partial.read_bytes().index(hidden) + 1000)
    with open_file(target, DUMP) as file:
        assert file.missing[0] == range(3, 4)
        finish(file, DUMP)  # An opening in between would drop the batch from the journal.
    assert target.read_bytes() == unbroken_bytes()


def test_resumed_batches_are_read_back_when_their_turn_comes(tmp_path):
    """Otherwise the statistics of all batches after a gap stay in memory until the end."""
    target = tmp_path / "x.safetensors"
    interrupt(target, DUMP, DUMP.first_rows[1:6])
    with open_file(target, DUMP) as file:
        write_batches(file, DUMP, DUMP.first_rows[:1])
        assert file.statistics.next_batch == 6


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 50), st.booleans())
def test_statistics_are_aligned(rows, labelled):
    dump = small_dump(rows=rows)
    if not labelled:  # a tensor of single bytes that ends anywhere
        dump = replace(dump, specs=[spec for spec in dump.specs if spec.name != "pooled"])
    specs = [*dump.specs, *statistics_specs("hidden", layers=3, width=5)]
    offsets = FORMATS[".safetensors"].layout(specs, {}, None).offsets
    assert all(offsets[spec.name] % DTYPES[spec.dtype].nbytes == 0 for spec in specs)
