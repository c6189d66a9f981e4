"""Unfinished files: reported, resumed to the byte, or dropped."""

import json
import os
import resource
import tempfile
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dump_activations import _rust
from dump_activations.storage.reading.inspection import inspect
from dump_activations.storage.writing.paths import journal_path, partial_path
from dump_activations.storage.writing.shards import Output
from output_support import (
    SUFFIXES,
    Dump,
    finish,
    interrupt,
    missing_rows,
    names_in,
    no_new_descriptors,
    open_file,
    small_dump,
    work_of,
    write_batches,
    write_dump,
)

DUMP = small_dump(rows=95)


def unbroken_bytes(suffix: str, dump: Dump = DUMP) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        return write_dump(Path(directory) / f"x{suffix}", dump).read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_resumed_file_is_that_of_an_unbroken_run_however_often_it_was_interrupted(
    tmp_path, suffix
):
    target = tmp_path / f"x{suffix}"
    for batches in range(1, 25, 3):
        interrupt(target, DUMP, missing(target)[:3])
        assert not target.exists()
        with no_new_descriptors(), open_file(target, DUMP) as file:
            assert file.resumed_rows == min((batches + 2) * DUMP.batch_rows, DUMP.rows)
            assert file.suspend() == file.resumed_rows
    assert write_dump(target, DUMP).read_bytes() == unbroken_bytes(suffix)
    assert names_in(tmp_path) == [target.name]


def missing(target: Path) -> list[int]:
    with open_file(target, DUMP) as file:
        return missing_rows(file)


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
    interrupt(target, DUMP, DUMP.first_rows[:5])
    partial_path(target).unlink()
    for dump in (DUMP, small_dump(rows=7)):
        with open_file(target, dump) as file:
            assert file.resumed_rows == 0
        assert not partial_path(target).exists()


def test_every_device_that_computed_batches_is_named(tmp_path):
    target = tmp_path / "x.pt"
    interrupt(target, DUMP, DUMP.first_rows[:5])
    work = replace(work_of(target, DUMP), computed_by={"device": "slide rule"})
    with Output(work.files(None)) as output:
        finish(output.take(), DUMP)
    computed_by = json.loads(inspect(target).metadata["computed_by"])
    assert [each["device"] for each in computed_by] == ["abacus", "slide rule"]


def test_as_many_devices_are_named_as_fit(tmp_path):
    target = tmp_path / "x.pt"
    interrupt(target, DUMP, DUMP.first_rows[:2])
    for number in range(1, 8):
        work = replace(work_of(target, DUMP), computed_by={"device": f"{number}" * 200})
        with Output(work.files(None)) as output:
            write_batches(output.take(), DUMP, DUMP.first_rows[2 * number : 2 * number + 2])
    assert write_dump(target, DUMP) == target
    text = inspect(target).metadata["computed_by"]
    assert (len(text), len(json.loads(text))) == (1024, 4)


def test_a_journal_that_takes_few_bytes_at_a_time_is_whole(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    interrupt(tmp_path / "x.npz", DUMP, DUMP.first_rows[:5])
    with open_file(tmp_path / "x.npz", DUMP) as file:
        assert file.resumed_rows == 5 * DUMP.batch_rows


def no_journal(target: Path) -> None:
    journal_path(target).unlink()


def no_batch(target: Path) -> None:
    partial_path(target).write_bytes(b"\xff" * partial_path(target).stat().st_size)


def other_size(target: Path, change: int) -> None:
    os.truncate(partial_path(target), partial_path(target).stat().st_size + change)


def other_journal(target: Path, record: bytes) -> None:
    journal_path(target).write_bytes(record + b" %08x\n" % zlib.crc32(record))


def endless_journal(target: Path) -> None:
    os.truncate(journal_path(target), 60 << 30)


RECORDS = [
    *(b"null", b"[]", b"{}", b'"x"', b'{"work": 1, "tensors": 2}'),
    *(b"[[[[[[", b"[" * 500_000, b"\xff"),
]
USELESS = {
    "no journal": (no_journal, "it has no journal"),
    "no batch": (no_batch, "no batch of it is whole"),
    **{
        f"size {change}": (partial(other_size, change=change), "its size differs")
        for change in (-1, 1, 1 << 20)
    },
    **{
        f"record {i}": (partial(other_journal, record=record), "its journal is damaged")
        for i, record in enumerate(RECORDS)
    },
    "endless journal": (endless_journal, "its journal is damaged"),
}


@pytest.mark.parametrize(("spoil", "reason"), USELESS.values(), ids=USELESS)
def test_a_partial_file_that_cannot_be_resumed_is_started_over(tmp_path, spoil, reason):
    target = tmp_path / "x.npz"
    interrupt(target, DUMP, DUMP.first_rows[:5])
    spoil(target)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, limit[1]))
    try:
        with open_file(target, DUMP) as file:
            assert file.resumed_rows == 0
            assert file.restarted_because.startswith(reason)
            assert partial_path(target).read_bytes() == bytes(file.size)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert names_in(tmp_path) == []


def test_the_same_tensors_in_another_format_are_other_work(tmp_path):
    works = [work_of(tmp_path / f"x{suffix}", DUMP) for suffix in SUFFIXES]
    assert len({work.fingerprint for work in works}) == len(SUFFIXES)


@settings(max_examples=40)
@given(st.data())
def test_a_journal_cut_short_or_damaged_anywhere_costs_no_more_than_batches(data):
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "x.npz"
        interrupt(target, DUMP, DUMP.first_rows[:9])
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
    ("field", "value", "resumed"),
    [
        *(
            (field, value, 2)
            for field, value in [(0, -1), (0, 10**30), (1, "x"), (2, None), (3, 1.5)]
        ),
        (1, 1 << 32, 4),  # The record can be read, and no data has that checksum.
    ],
)
def test_digests_that_cannot_be_are_those_of_a_damaged_batch(tmp_path, field, value, resumed):
    target = tmp_path / "x.pt"
    interrupt(target, DUMP, DUMP.first_rows[:5], threads=1)
    lines = journal_path(target).read_bytes().split(b"\n")
    record = json.loads(lines[3].rpartition(b" ")[0])
    assert record[0] == 2
    record[1][field] = value
    text = json.dumps(record).encode()
    lines[3] = text + b" %08x" % zlib.crc32(text)
    journal_path(target).write_bytes(b"\n".join(lines))
    with open_file(target, DUMP) as file:
        assert file.resumed_rows == resumed * DUMP.batch_rows


def test_a_record_of_a_batch_behind_the_last_is_damaged(tmp_path):
    target = tmp_path / "x.pt"
    interrupt(target, DUMP, DUMP.first_rows)
    record = json.dumps([len(DUMP.first_rows), *([0, 0, 0, 0] for _ in DUMP.batched)]).encode()
    with journal_path(target).open("ab") as journal:
        journal.write(record + b" %08x\n" % zlib.crc32(record))
    with open_file(target, DUMP) as file:
        assert file.resumed_rows == DUMP.rows


@settings(max_examples=40)
@given(st.data())
def test_damage_in_any_batch_is_found_and_made_good(data):
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "x.pt"
        interrupt(target, DUMP, DUMP.first_rows[:20])
        with open_file(target, DUMP) as file:
            offsets = dict(file.work.empty_layout.offsets)
        spec = data.draw(st.sampled_from([s for s in DUMP.specs if s.name in DUMP.batched]))
        row = data.draw(st.integers(0, 20 * DUMP.batch_rows - 1))
        place = offsets[spec.name] + row * spec.row_nbytes
        with partial_path(target).open("r+b") as opened:
            opened.seek(place + data.draw(st.integers(0, spec.row_nbytes - 1)))
            (byte,) = opened.read(1)
            opened.seek(-1, os.SEEK_CUR)
            opened.write(bytes([byte ^ 1]))
        with open_file(target, DUMP) as file:
            damaged = row // DUMP.batch_rows
            assert file.missing[0].start == damaged
            assert file.resumed_rows == 19 * DUMP.batch_rows
        write_dump(target, DUMP)
        assert target.read_bytes() == unbroken_bytes(".pt")


def test_the_cache_is_flushed_and_dropped_before_batches_are_read_back(tmp_path, monkeypatch):
    """It may hold what never came to the disk. Only pages that were flushed are dropped."""
    target = tmp_path / "x.pt"
    interrupt(target, DUMP, DUMP.first_rows[:5])
    calls = []
    fdatasync, fadvise, digest_span = os.fdatasync, os.posix_fadvise, _rust.digest_span

    def noted_sync(fd):
        calls.append(("sync", os.fstat(fd).st_ino))
        fdatasync(fd)

    def noted_fadvise(fd, offset, length, advice):
        calls.append(("fadvise", os.fstat(fd).st_ino, offset, length, advice))
        fadvise(fd, offset, length, advice)

    def noted_digest(fd, *arguments):
        calls.append(("read", os.fstat(fd).st_ino))
        return digest_span(fd, *arguments)

    monkeypatch.setattr(os, "fdatasync", noted_sync)
    monkeypatch.setattr(os, "posix_fadvise", noted_fadvise)
    monkeypatch.setattr(_rust, "digest_span", noted_digest)
    with open_file(target, DUMP):
        inode = partial_path(target).stat().st_ino
    calls = [call for call in calls if call[1] == inode]  # without the trial of the file system
    assert calls[:2] == [("sync", inode), ("fadvise", inode, 0, 0, os.POSIX_FADV_DONTNEED)]
    assert calls[2:] == [("read", inode)] * (5 * len(DUMP.batched))


def test_an_interruption_ends_the_reading_back(tmp_path, monkeypatch):
    dump = small_dump(rows=400)
    target = tmp_path / "x.pt"
    interrupt(target, dump, dump.first_rows)
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
    assert len(reads) < len(dump.first_rows) * len(dump.batched)
    with open_file(target, dump) as file:
        assert file.resumed_rows == dump.rows
