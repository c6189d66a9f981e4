"""Files with statistics: the same bytes whoever wrote what of them, in any order, at any time."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dump_activations.statistics import STATISTICS_PREFIX, statistics_specs
from dump_activations.storage.formats.layout import storage_order
from dump_activations.storage.reading.inspection import find_damage, inspect
from dump_activations.storage.writing import resume, writers
from dump_activations.storage.writing.output_file import OutputFile
from dump_activations.storage.writing.targets import partial_path
from output_support import (
    SUFFIXES,
    Dump,
    open_file,
    open_group,
    small_dump,
    write_batches,
    write_dump,
    write_ticket,
    write_whole_tensors,
)
from reference.dumps import read_dump
from reference.statistics import as_float64, numpy_statistics


def with_statistics(dump: Dump) -> Dump:
    """Ask for statistics of `hidden`, which is stacked, and of `pooled`."""
    hidden = statistics_specs("hidden", layers=3, width=5)
    return replace(
        dump, specs=[*dump.specs, *hidden, *statistics_specs("pooled", layers=None, width=7)]
    )


# Batches of about a page, so that processes have edges of pages in their journals.
DUMP = with_statistics(small_dump(rows=990, batch_rows=100))
BATCHES = len(DUMP.first_rows)


def unbroken_bytes(suffix: str = ".safetensors") -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        return write_dump(Path(directory) / f"x{suffix}", DUMP).read_bytes()


def finish(target: Path, ranks: int) -> None:
    """Do what is missing with so many processes, and commit."""
    with open_group(target, DUMP, ranks) as files:
        first, *others = files
        assert isinstance(first, OutputFile)
        write_whole_tensors(first, DUMP)
        missing = [batch for stretch in first.missing for batch in stretch]
        for batch in missing:
            write_ticket(files[batch % ranks], DUMP, range(batch, batch + 1))
        for other in others:
            other.leave()
        first.commit()


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
    assert find_damage(inspect(path), threads=1) == []


@settings(max_examples=8, deadline=None)
@given(
    order=st.permutations(DUMP.first_rows),
    threads=st.integers(1, 3),
    kept=st.integers(0, BATCHES - 1),
)
def test_order_threads_and_interruptions_leave_no_trace(order, threads, kept):
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "x.safetensors"
        with open_file(target, DUMP) as file:
            write_whole_tensors(file, DUMP)
            write_batches(file, DUMP, order[:kept], threads=threads)
        write_dump(target, DUMP, order=order, threads=threads)
        assert target.read_bytes() == unbroken_bytes()


def test_vectors_are_whole_however_short_the_spans(tmp_path, monkeypatch):
    expected = unbroken_bytes()
    monkeypatch.setattr(writers, "SPAN_NBYTES", 101)
    monkeypatch.setattr(resume, "READ_NBYTES", 101)
    target = tmp_path / "x.safetensors"
    with open_file(target, DUMP) as file:
        write_whole_tensors(file, DUMP)
        write_batches(file, DUMP, DUMP.first_rows[3:6])
    assert write_dump(target, DUMP).read_bytes() == expected


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("earlier", [0, 2, 3])
def test_processes_leave_no_trace(tmp_path, ranks, earlier):
    target = tmp_path / "x.safetensors"
    if earlier:
        with open_group(target, DUMP, earlier) as files:
            for number, file in enumerate(files):
                write_ticket(file, DUMP, range(number, number + 1))
                write_ticket(file, DUMP, range(6 + number, 7 + number))
    finish(target, ranks)
    assert target.read_bytes() == unbroken_bytes()
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def leave_and_commit(target: Path, tamper, of_first: int = 4) -> None:
    with open_group(target, DUMP, 2) as (first, other):
        assert isinstance(first, OutputFile)
        write_whole_tensors(first, DUMP)
        write_ticket(first, DUMP, range(of_first))
        write_ticket(other, DUMP, range(of_first, BATCHES))
        other.leave()
        (handed_over,) = target.parent.glob("*.statistics")
        assert handed_over.stat().st_mode & 0o777 == 0o600
        tamper(handed_over)
        first.commit()


def test_what_another_process_hands_over_need_not_arrive(tmp_path):
    target = tmp_path / "x.safetensors"
    stale = tmp_path / "stale"
    leave_and_commit(target, lambda path: stale.write_bytes(path.read_bytes()), of_first=2)
    for tamper in (
        Path.unlink,
        lambda path: damage(path, 100),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(stale.read_bytes()),  # of another token
        lambda path: path.chmod(0o666),
    ):
        leave_and_commit(target, tamper)
        assert target.read_bytes() == unbroken_bytes()


def test_what_was_handed_over_goes_when_a_run_is_given_up(tmp_path):
    target = tmp_path / "x.safetensors"
    with open_group(target, DUMP, 2) as (_first, other):
        write_ticket(other, DUMP, range(2))
        other.leave()
        assert list(tmp_path.glob("*.statistics"))
    finish(target, 1)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_batch_that_is_damaged_does_not_count(tmp_path):
    target = tmp_path / "x.safetensors"
    with open_file(target, DUMP) as file:
        write_whole_tensors(file, DUMP)
        write_batches(file, DUMP, DUMP.first_rows[:6])
    partial = partial_path(target)
    hidden = DUMP.batch(300)["hidden"].tobytes()
    damage(partial, partial.read_bytes().index(hidden) + 1000)
    with open_file(target, DUMP) as file:
        assert file.missing[0] == range(3, 4)
    write_dump(target, DUMP)
    assert target.read_bytes() == unbroken_bytes()


def places(specs: Sequence) -> list[tuple[str, int]]:
    offset, found = 0, []
    for spec in storage_order(specs):
        found.append((spec.name, offset))
        offset += spec.nbytes
    return found


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 50), st.booleans())
def test_statistics_move_no_other_tensor_and_are_aligned(rows, labelled):
    dump = small_dump(rows=rows)
    if not labelled:  # a tensor of single bytes that ends anywhere
        dump = replace(dump, specs=[spec for spec in dump.specs if spec.name != "pooled"])
    with_them = [*dump.specs, *statistics_specs("hidden", layers=3, width=5)]
    found = places(with_them)
    statistics = [each for each in found if each[0].startswith(STATISTICS_PREFIX)]
    assert all(offset % 8 == 0 for _, offset in statistics)
    before = found[: found.index(statistics[0])]
    assert before == places(dump.specs)[: len(before)]
    after = places(dump.specs)[len(before) :]
    assert not any(offset % 8 == 0 for _, offset in after[1:])
