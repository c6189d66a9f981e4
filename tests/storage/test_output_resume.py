"""Unfinished files: reported, resumed to the byte, or dropped."""

import os
import signal
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dump_activations.errors import OutputError
from dump_activations.storage.writing import resume
from dump_activations.storage.writing.journal import read_journal
from dump_activations.storage.writing.targets import journal_path, partial_path
from output_support import (
    SUFFIXES,
    Dump,
    no_new_descriptors,
    open_file,
    small_dump,
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


def test_batches_past_a_gap_are_written_again(tmp_path):
    target = tmp_path / "x.npz"
    order = [*DUMP.first_rows[:3], *DUMP.first_rows[5:9]]
    with open_file(target, DUMP) as file:
        write_batches(file, DUMP, order)
        assert file.suspend() == 3 * DUMP.batch_rows
    with open_file(target, DUMP) as file:
        assert file.resumed_rows == 3 * DUMP.batch_rows
    write_dump(target, DUMP)
    assert target.read_bytes() == unbroken_bytes(".npz")


def test_resume_without_anything_left_is_a_fresh_run(tmp_path):
    assert write_dump(tmp_path / "x.pt", DUMP).read_bytes() == unbroken_bytes(".pt")


def test_a_journal_without_its_file_counts_for_nothing(tmp_path):
    target = tmp_path / "x.npz"
    interrupt(target, DUMP.first_rows[:5])
    partial_path(target).unlink()
    for dump in (DUMP, small_dump(rows=7)):
        with open_file(target, dump) as file:
            assert file.resumed_rows == 0
        assert not partial_path(target).exists()


def test_a_leftover_is_reported_and_kept(tmp_path):
    target = tmp_path / "x.safetensors"
    interrupt(target, DUMP.first_rows[:5])
    with no_new_descriptors(), pytest.raises(OutputError) as caught:
        open_file(target, DUMP)
    assert "20 of 95 boards" in str(caught.value)
    assert "--resume" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert "\n" not in str(caught.value)
    write_dump(target, DUMP)


def test_a_leftover_without_a_journal_is_reported(tmp_path):
    target = tmp_path / "x.safetensors"
    partial_path(target).write_text("someone's")
    with pytest.raises(OutputError, match="left over"):
        open_file(target, DUMP)
    assert partial_path(target).read_text() == "someone's"


def test_overwrite_drops_a_leftover(tmp_path):
    target = tmp_path / "x.safetensors"
    interrupt(target, DUMP.first_rows[:5])
    other = small_dump(rows=12, batch_rows=5)
    write_dump(target, other, overwrite=True)
    assert target.read_bytes() == unbroken_bytes(".safetensors", other)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_other_work_is_not_resumed(tmp_path):
    target = tmp_path / "x.pt"
    interrupt(target, DUMP.first_rows[:5])
    partial = partial_path(target).read_bytes()
    journal = journal_path(target).read_bytes()
    for dump, fingerprint in [
        (DUMP, "other weights"),
        (small_dump(rows=95, batch_rows=5), "work"),
        (small_dump(rows=96), "work"),
    ]:
        with (
            no_new_descriptors(),
            pytest.raises(OutputError, match=r"x\.pt\.partial is left over from another dump"),
        ):
            open_file(target, dump, fingerprint=fingerprint)
    assert partial_path(target).read_bytes() == partial
    assert journal_path(target).read_bytes() == journal


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
        left = read_journal(journal_path(target))
        if left is not None:
            assert len(left[1]) <= 9
        write_dump(target, DUMP)
        assert target.read_bytes() == unbroken_bytes(".npz")


@pytest.mark.parametrize(
    "record", [b"null", b"[]", b"{}", b'"x"', b'{"work": 1, "tensors": 2}', b"[[[[[[", b"\xff"]
)
def test_a_journal_of_something_else_counts_for_nothing(tmp_path, record):
    target = tmp_path / "x.pt"
    interrupt(target, DUMP.first_rows[:5])
    journal_path(target).write_bytes(record + b" %08x\n" % zlib.crc32(record))
    with open_file(target, DUMP) as file:
        assert file.resumed_rows == 0


@settings(max_examples=40)
@given(st.data())
def test_damage_in_the_last_batches_is_found_and_made_good(data):
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "x.pt"
        interrupt(target, DUMP.first_rows[:20])
        with open_file(target, DUMP) as file:
            offsets = dict(file._layout.offsets)
        spec = data.draw(st.sampled_from([s for s in DUMP.specs if s.name in DUMP.batched]))
        first_row = DUMP.first_rows[20 - resume.CHECKED]
        row = data.draw(st.integers(first_row, 20 * DUMP.batch_rows - 1))
        place = offsets[spec.name] + row * spec.row_nbytes
        partial = bytearray(partial_path(target).read_bytes())
        partial[place + data.draw(st.integers(0, spec.row_nbytes - 1))] ^= 1
        partial_path(target).write_bytes(partial)
        with open_file(target, DUMP) as file:
            assert file.resumed_rows == row // DUMP.batch_rows * DUMP.batch_rows
        write_dump(target, DUMP)
        assert target.read_bytes() == unbroken_bytes(".pt")


def test_a_partial_file_of_another_size_counts_for_nothing(tmp_path):
    target = tmp_path / "x.pt"
    interrupt(target, DUMP.first_rows[:5])
    os.truncate(partial_path(target), partial_path(target).stat().st_size - 1)
    with open_file(target, DUMP) as file:
        assert file.resumed_rows == 0
    assert not partial_path(target).exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_killed_run_is_resumed_from_its_journal(tmp_path, suffix):
    target = tmp_path / f"x{suffix}"
    script = """
import os, signal, sys, time
from pathlib import Path
from dump_activations.storage.writing import durability
from dump_activations.storage.writing.journal import read_journal
from dump_activations.storage.writing.partial import journal_path
from dump_activations.storage.writing.writers import WriterPool
from output_support import open_file, small_dump, write_whole_tensors
durability.SYNC_INTERVAL = 0
target = Path(sys.argv[1])
dump = small_dump(rows=95)
with open_file(target, dump) as file:
    write_whole_tensors(file, dump)
    with WriterPool(file, threads=2) as writers:
        for first_row in dump.first_rows[:15]:
            writers.submit(first_row, dump.batch(first_row), done=lambda: None)
        # Two writers: the first batch may reach the journal after others, which count for nothing.
        while not ((left := read_journal(journal_path(target))) and left[1]):
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
