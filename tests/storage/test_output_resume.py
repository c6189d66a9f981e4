"""Unfinished files: reported, resumed to the byte, or dropped."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dump_activations import _rust
from dump_activations.errors import OutputError
from dump_activations.storage.writing.paths import journal_path, partial_path
from output_support import (
    SUFFIXES,
    Dump,
    missing_rows,
    no_new_descriptors,
    open_file,
    small_dump,
    work_of,
    write_batches,
    write_dump,
    write_whole_tensors,
)

DUMP = small_dump(rows=95)


def interrupt(target: Path, first_rows: range, dump: Dump = DUMP) -> None:
    """Leave a dump of which these batches are written."""
    with open_file(target, dump) as file:
        write_whole_tensors(file, dump)
        write_batches(file, dump, first_rows)


def unbroken_bytes(suffix: str, dump: Dump = DUMP) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        return write_dump(Path(directory) / f"x{suffix}", dump).read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("batches", [1, 10, 24])
def test_a_resumed_file_is_that_of_an_unbroken_run(tmp_path, suffix, batches):
    target = tmp_path / f"x{suffix}"
    interrupt(target, DUMP.first_rows[:batches])
    assert not target.exists()
    written = min(batches * DUMP.batch_rows, DUMP.rows)
    with no_new_descriptors(), open_file(target, DUMP) as file:
        assert file.resumed_rows == written
        write_whole_tensors(file, DUMP)
        write_batches(file, DUMP, range(written, DUMP.rows, DUMP.batch_rows))
        file.commit()
    assert target.read_bytes() == unbroken_bytes(suffix)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_run_may_be_interrupted_and_resumed_many_times(tmp_path):
    target = tmp_path / "x.pt"
    interrupt(target, DUMP.first_rows[:1])
    for batch in range(1, len(DUMP.first_rows)):
        with open_file(target, DUMP) as file:
            assert file.resumed_rows == DUMP.first_rows[batch]
            write_batches(file, DUMP, DUMP.first_rows[batch : batch + 1])
            assert file.suspend() == min(DUMP.rows, (batch + 1) * DUMP.batch_rows)
    write_dump(target, DUMP)
    assert target.read_bytes() == unbroken_bytes(".pt")


@settings(max_examples=40)
@given(st.data())
def test_any_set_of_batches_is_resumed(data):
    kept = data.draw(st.sets(st.sampled_from(DUMP.first_rows), min_size=1))
    rows = sum(len(range(DUMP.rows)[row : row + DUMP.batch_rows]) for row in kept)
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "x.npz"
        with open_file(target, DUMP) as file:
            write_batches(file, DUMP, data.draw(st.permutations(sorted(kept))))
            assert file.suspend() == rows
        with open_file(target, DUMP) as file:
            assert file.resumed_rows == rows
            assert missing_rows(file) == sorted({*DUMP.first_rows} - kept)
        write_dump(target, DUMP)
        assert target.read_bytes() == unbroken_bytes(".npz")


def test_a_journal_without_its_file_counts_for_nothing(tmp_path):
    target = tmp_path / "x.npz"
    interrupt(target, DUMP.first_rows[:5])
    partial_path(target).unlink()
    for dump in (DUMP, small_dump(rows=7)):
        with open_file(target, dump) as file:
            assert file.resumed_rows == 0
        assert not partial_path(target).exists()


def test_a_leftover_without_a_journal_is_started_anew(tmp_path):
    target = tmp_path / "x.safetensors"
    partial_path(target).write_bytes(bytes(1 << 20))  # larger than the file will be
    with open_file(target, DUMP) as file:
        assert (file.resumed_rows, file.restarted_because) == (0, "it has no journal")
    partial_path(target).write_bytes(bytes(1 << 20))
    assert write_dump(target, DUMP).read_bytes() == unbroken_bytes(".safetensors")


def test_a_leftover_without_a_whole_batch_is_started_anew(tmp_path):
    target = tmp_path / "x.npz"
    interrupt(target, DUMP.first_rows[:5])
    size = partial_path(target).stat().st_size
    partial_path(target).write_bytes(b"\xff" * size)
    with open_file(target, DUMP) as file:
        assert (file.resumed_rows, file.restarted_because) == (0, "no batch of it is whole")
        assert partial_path(target).read_bytes() == bytes(size)


def test_overwrite_drops_a_leftover(tmp_path):
    target = tmp_path / "x.safetensors"
    interrupt(target, DUMP.first_rows[:5])
    other = small_dump(rows=12, batch_rows=5)
    write_dump(target, other, overwrite=True)
    assert target.read_bytes() == unbroken_bytes(".safetensors", other)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_other_work_is_not_resumed_and_named(tmp_path):
    target = tmp_path / "x.pt"
    interrupt(target, DUMP.first_rows[:5])
    partial = partial_path(target).read_bytes()
    journal = journal_path(target).read_bytes()
    seed = replace(DUMP, metadata=DUMP.metadata | {"seed": "7"})
    for dump, identity, named in [
        (DUMP, "other", "work (work there, other here);"),
        (seed, "work", "seed (0 there, 7 here);"),
        (small_dump(rows=95, batch_rows=5), "work", "batch_size (4 there, 5 here);"),
        (small_dump(rows=96), "work", "the tensors (split_layers);"),
    ]:
        with no_new_descriptors(), pytest.raises(OutputError) as caught:
            open_file(target, dump, identity=identity)
        assert f"x.pt.partial is of other work, which differs in {named}" in str(caught.value)
        assert "--overwrite" in caught.value.flags_text
    assert partial_path(target).read_bytes() == partial
    assert journal_path(target).read_bytes() == journal


def test_the_same_tensors_in_another_format_are_other_work(tmp_path):
    works = [work_of(tmp_path / f"x{suffix}", DUMP) for suffix in SUFFIXES]
    assert len({work.fingerprint for work in works}) == len(SUFFIXES)


@settings(max_examples=40)
@given(st.data())
def test_a_journal_cut_short_or_damaged_anywhere_costs_no_more_than_batches(data):
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "x.npz"
        interrupt(target, DUMP.first_rows[:9])
        journal = bytearray(journal_path(target).read_bytes())
        place = data.draw(st.integers(0, len(journal) - 1))
        if data.draw(st.booleans()):
            journal[place] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del journal[place:]
        journal_path(target).write_bytes(journal)
        with open_file(target, DUMP) as file:
            assert file.resumed_rows <= 9 * DUMP.batch_rows
        write_dump(target, DUMP)
        assert target.read_bytes() == unbroken_bytes(".npz")


@pytest.mark.parametrize(
    "record",
    [
        b"null",
        b"[]",
        b"{}",
        b'"x"',
        b'{"work": 1, "tensors": 2}',
        b"[[[[[[",
        b"[" * 500_000,
        b"\xff",
    ],
    ids=range(8),
)
def test_a_journal_of_something_else_counts_for_nothing(tmp_path, record):
    target = tmp_path / "x.pt"
    interrupt(target, DUMP.first_rows[:5])
    journal_path(target).write_bytes(record + b" %08x\n" % zlib.crc32(record))
    with open_file(target, DUMP) as file:
        assert (file.resumed_rows, file.restarted_because) == (0, "its journal is damaged")


@pytest.mark.parametrize(("field", "value"), [(0, -1), (0, 10**30), (1, "x"), (2, None), (3, 1.5)])
def test_digests_that_cannot_be_are_those_of_a_damaged_batch(tmp_path, field, value):
    target = tmp_path / "x.pt"
    with open_file(target, DUMP) as file:
        write_batches(file, DUMP, DUMP.first_rows[:5], threads=1)
    lines = journal_path(target).read_bytes().split(b"\n")
    record = json.loads(lines[3].rpartition(b" ")[0])
    assert record[0] == 2
    record[1][field] = value
    text = json.dumps(record).encode()
    lines[3] = text + b" %08x" % zlib.crc32(text)
    journal_path(target).write_bytes(b"\n".join(lines))
    with open_file(target, DUMP) as file:
        assert file.resumed_rows == 2 * DUMP.batch_rows


def test_a_journal_longer_than_its_batches_is_not_read(tmp_path, monkeypatch):
    target = tmp_path / "x.pt"
    interrupt(target, DUMP.first_rows[:5])
    os.truncate(journal_path(target), 60 << 30)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, limit[1]))
    try:
        with open_file(target, DUMP) as file:
            assert (file.resumed_rows, file.restarted_because) == (0, "its journal is damaged")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


@settings(max_examples=40)
@given(st.data())
def test_damage_in_any_batch_is_found_and_made_good(data):
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "x.pt"
        interrupt(target, DUMP.first_rows[:20])
        with open_file(target, DUMP) as file:
            offsets = dict(file.work.empty_layout.offsets)
        spec = data.draw(st.sampled_from([s for s in DUMP.specs if s.name in DUMP.batched]))
        row = data.draw(st.integers(0, 20 * DUMP.batch_rows - 1))
        place = offsets[spec.name] + row * spec.row_nbytes
        with partial_path(target).open("r+b") as partial:
            partial.seek(place + data.draw(st.integers(0, spec.row_nbytes - 1)))
            (byte,) = partial.read(1)
            partial.seek(-1, os.SEEK_CUR)
            partial.write(bytes([byte ^ 1]))
        with open_file(target, DUMP) as file:
            damaged = row // DUMP.batch_rows
            assert file.missing[0].start == damaged
            assert file.resumed_rows == 19 * DUMP.batch_rows
        write_dump(target, DUMP)
        assert target.read_bytes() == unbroken_bytes(".pt")


def test_the_cache_is_dropped_before_batches_are_read_back(tmp_path, monkeypatch):
    """It may hold what never came to the disk."""
    target = tmp_path / "x.pt"
    interrupt(target, DUMP.first_rows[:5])
    calls = []
    fadvise, digest_span = os.posix_fadvise, _rust.digest_span

    def noted_fadvise(fd, offset, length, advice):
        calls.append(("fadvise", os.fstat(fd).st_ino, offset, length, advice))
        fadvise(fd, offset, length, advice)

    def noted_digest(fd, *arguments):
        calls.append(("read", os.fstat(fd).st_ino))
        return digest_span(fd, *arguments)

    monkeypatch.setattr(os, "posix_fadvise", noted_fadvise)
    monkeypatch.setattr(_rust, "digest_span", noted_digest)
    with open_file(target, DUMP):
        inode = partial_path(target).stat().st_ino
    assert calls[0] == ("fadvise", inode, 0, 0, os.POSIX_FADV_DONTNEED)
    assert calls[1:] == [("read", inode)] * (5 * len(DUMP.batched))


def test_an_interruption_ends_the_reading_back(tmp_path, monkeypatch):
    dump = small_dump(rows=400)
    target = tmp_path / "x.pt"
    interrupt(target, dump.first_rows, dump)
    reads = []
    digest_span = _rust.digest_span

    def noted_digest(*arguments):
        reads.append(1)
        return digest_span(*arguments)

    def check():
        if reads:
            raise KeyboardInterrupt

    monkeypatch.setattr(_rust, "digest_span", noted_digest)
    with no_new_descriptors(), pytest.raises(KeyboardInterrupt):
        open_file(target, dump, check=check)
    assert len(reads) < len(dump.first_rows)
    with open_file(target, dump) as file:
        assert file.resumed_rows == dump.rows


@pytest.mark.parametrize("change", [-1, 1, 1 << 20])
def test_a_partial_file_of_another_size_counts_for_nothing(tmp_path, change):
    target = tmp_path / "x.pt"
    interrupt(target, DUMP.first_rows[:5])
    os.truncate(partial_path(target), partial_path(target).stat().st_size + change)
    with open_file(target, DUMP) as file:
        assert file.resumed_rows == 0
    assert not partial_path(target).exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_killed_run_is_resumed_from_its_journal(tmp_path, suffix):
    target = tmp_path / f"x{suffix}"
    script = """
import os, signal, sys, time
from pathlib import Path
from dump_activations.storage.writing import output as output_module
from dump_activations.storage.writing.writers import Writers
from output_support import open_file, small_dump, write_whole_tensors
output_module.SYNC_INTERVAL = 0
target = Path(sys.argv[1])
dump = small_dump(rows=95)
with open_file(target, dump) as file:
    write_whole_tensors(file, dump)
    with Writers(lambda _: None, threads=2) as writers:
        for first_row in dump.first_rows[:15]:
            batch = first_row // dump.batch_rows
            writers.submit(file, batch, dump.batch(first_row), done=lambda: None)
        # Two writers: the first batch may reach the journal after others, which count for nothing.
        while 0 not in file._journal.batches:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run(
        [sys.executable, "-c", script, str(target)], cwd=Path(__file__).parents[1], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    with open_file(target, DUMP) as file:
        assert 0 < file.resumed_rows <= 15 * DUMP.batch_rows
    write_dump(target, DUMP)
    assert target.read_bytes() == unbroken_bytes(suffix)
