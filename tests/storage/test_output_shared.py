"""One file that several processes write: begun, joined, left, committed and resumed."""

import json
import os
import tempfile
import zlib
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dump_activations.errors import OutputError
from dump_activations.storage.writing import output_file as output_file_module
from dump_activations.storage.writing import writers as writers_module
from dump_activations.storage.writing.journal import sync_directory
from dump_activations.storage.writing.output_file import OutputFile
from dump_activations.storage.writing.partial import tidy
from dump_activations.storage.writing.records import (
    BatchRecord,
    batch_line,
    header_line,
    parse_record,
)
from dump_activations.storage.writing.targets import journal_path, partial_path
from output_support import (
    SUFFIXES,
    Dump,
    join_file,
    no_new_descriptors,
    open_file,
    open_group,
    small_dump,
    work_of,
    write_batches,
    write_dump,
    write_ticket,
    write_whole_tensors,
)

# Rows of no power of two, and batches of about a page of each tensor.
DUMP = small_dump(rows=1990, batch_rows=100)
BATCHES = len(DUMP.first_rows)

# What each of several processes does: a list of stretches of batches.
Shares = Sequence[Sequence[range]]


def unbroken_bytes(suffix: str, dump: Dump = DUMP) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        return write_dump(Path(directory) / f"x{suffix}", dump).read_bytes()


def interrupt(target: Path, shares: Shares) -> int:
    """Leave a file of which so many processes have done their shares; return the rows kept."""
    with open_group(target, DUMP, len(shares)) as files:
        for file, share in zip(files, shares, strict=True):
            for ticket in share:
                write_ticket(file, DUMP, ticket)
        return max(file.suspend() for file in reversed(files))


def finish(target: Path, ranks: int) -> None:
    """Do what is missing with so many processes, and commit."""
    with open_group(target, DUMP, ranks) as files:
        first, *others = files
        assert isinstance(first, OutputFile)
        write_whole_tensors(first, DUMP)
        for number, stretch in enumerate(first.missing):
            write_ticket(files[number % ranks], DUMP, stretch)
        for other in others:
            other.leave()
        first.commit()


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("span_nbytes", [writers_module.SPAN_NBYTES, 1000])
def test_the_file_is_that_of_one_process(tmp_path, monkeypatch, suffix, span_nbytes):
    monkeypatch.setattr(writers_module, "SPAN_NBYTES", span_nbytes)
    target = tmp_path / f"x{suffix}"
    with no_new_descriptors(), open_group(target, DUMP, 3) as (first, *others):
        write_whole_tensors(first, DUMP)
        for start, file in zip(range(0, BATCHES, 3), [first, *others] * 3, strict=False):
            write_ticket(file, DUMP, range(start, min(start + 3, BATCHES)))
        modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
        assert (len(names_in(tmp_path)), modes) == (4, {0o600})
        for other in others:
            other.leave()
        first.commit()
    assert contents(tmp_path) == {target.name: unbroken_bytes(suffix)}


@st.composite
def shares(draw: st.DrawFn) -> Shares:
    """Draw what up to four processes did: any of the batches, in tickets of any length."""
    ranks = draw(st.integers(1, 4))
    done: list[list[range]] = [[] for _ in range(ranks)]
    at = 0
    while at < BATCHES:
        stop = min(at + draw(st.integers(1, 7)), BATCHES)
        rank = draw(st.integers(-1, ranks - 1))
        if rank >= 0:
            done[rank].append(range(at, stop))
        at = stop
    return done


@settings(max_examples=25)
@given(shares(), st.integers(1, 4), st.sampled_from(SUFFIXES))
def test_any_processes_resume_what_any_others_left(shares, ranks, suffix):
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / f"x{suffix}"
        kept = {row for each in shares for ticket in each for row in rows_of(ticket)}
        assert interrupt(target, shares) == len(kept)
        with open_file(target, DUMP) as file:
            assert file.resumed_rows == len(kept)
            assert {row for each in file.missing for row in rows_of(each)} == {
                *range(DUMP.rows)
            } - kept
            assert names_in(target.parent) == {partial_path(target).name, journal_path(target).name}
        finish(target, ranks)
        assert contents(target.parent) == {target.name: unbroken_bytes(suffix)}


def rows_of(batches: range) -> range:
    return range(DUMP.rows)[batches.start * DUMP.batch_rows : batches.stop * DUMP.batch_rows]


def test_all_processes_see_the_same_batches_missing(tmp_path):
    """Whatever the first has done since."""
    target = tmp_path / "x.pt"
    interrupt(target, [[range(2, 5)], [range(9, 11)]])
    with open_file(target, DUMP, shared=True) as first:
        assert first.missing == (range(2), range(5, 9), range(11, BATCHES))
        write_ticket(first, DUMP, range(2))
        first._stop_sync()
        with join_file(target, DUMP, first, 1) as other:
            assert (other.missing, other.resumed_rows) == (first.missing, first.resumed_rows)


def test_each_process_knows_how_much_is_kept(tmp_path):
    target = tmp_path / "x.npz"
    with open_group(target, DUMP, 3) as (first, second, third):
        write_ticket(second, DUMP, range(3))
        write_ticket(third, DUMP, range(10, 12))
        third.leave()
        assert second.suspend() == 500
        assert first.suspend() == 500
    with open_group(target, DUMP, 2) as (first, _):
        assert first.resumed_rows == 500


def test_with_no_batch_of_any_process_nothing_is_left(tmp_path):
    with open_group(tmp_path / "x.pt", DUMP, 3) as (_, *others):
        others[0].leave()
    assert names_in(tmp_path) == set()


def leave_foreign_partial(directory: Path) -> None:
    with open_group(directory / "x.pt", DUMP, 2) as (first, second):
        write_ticket(first, DUMP, range(3))
        write_ticket(second, DUMP, range(3, 6))


@pytest.mark.parametrize("there", ["nothing", "no-directory", "older", "other-work"])
def test_a_directory_that_is_not_shared_is_named_and_left_as_it_is(tmp_path, there):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    if there != "no-directory":
        elsewhere.mkdir()
    if there == "older":
        leave_foreign_partial(elsewhere)
    if there == "other-work":
        write_other_work(elsewhere / "x.pt")
    before = contents(elsewhere) if elsewhere.exists() else None
    with open_file(here / "x.pt", DUMP, shared=True) as first:
        with no_new_descriptors(), pytest.raises(OutputError) as caught:
            join_file(elsewhere / "x.pt", DUMP, first, 1)
        assert f"{elsewhere / 'x.pt.partial'} is not here as the first" in str(caught.value)
        assert f"{elsewhere} is not shared" in str(caught.value)
    assert (contents(elsewhere) if elsewhere.exists() else None) == before


def write_other_work(target: Path) -> None:
    dump = small_dump(rows=50)
    with open_file(target, dump) as file:
        write_batches(file, dump, dump.first_rows)


def test_two_processes_of_one_rank_are_refused(tmp_path):
    target = tmp_path / "x.pt"
    with open_group(target, DUMP, 2) as (first, second):
        write_ticket(second, DUMP, range(2))
        with pytest.raises(OutputError, match=r"x\.pt\.partial\.journal\.1: File exists"):
            join_file(target, DUMP, first, 1)
    assert journal_path(target, 1).exists()


def test_what_is_in_no_ticket_is_not_written(tmp_path):
    with open_group(tmp_path / "x.pt", DUMP, 2) as (_, second):
        second.begin_ticket(range(2))
        with pytest.raises(AssertionError, match="batch 2 is in no ticket"):
            second.write_span(200, "boards", 0, DUMP.data["boards"][:16])


def test_a_file_removed_meanwhile_is_an_error_of_every_process(tmp_path):
    with open_group(tmp_path / "x.pt", DUMP, 2) as (first, second):
        write_ticket(second, DUMP, range(2))
        first.partial.unlink()
        with pytest.raises(OutputError, match="nothing is kept"):
            second.leave()
        assert second.suspend() == 0
    assert names_in(tmp_path) == set()


def test_a_process_that_has_written_nothing_since_finds_the_file_removed(tmp_path):
    with open_group(tmp_path / "x.pt", DUMP, 2) as (first, second):
        write_ticket(second, DUMP, range(2))
        second._stop_sync()
        first.partial.unlink()
        with pytest.raises(OutputError, match="nothing is kept"):
            second.leave()


def group_without(target: Path, *, left_out: int):
    """Return a group that has written all but a batch, of which the others have left."""
    group = open_group(target, DUMP, 2)
    first, second = group.__enter__()
    write_whole_tensors(first, DUMP)
    write_ticket(first, DUMP, range(10))
    write_ticket(second, DUMP, range(10, left_out))
    write_ticket(second, DUMP, range(left_out + 1, BATCHES))
    second.leave()
    return group, first


def test_a_batch_that_is_in_no_journal_is_not_committed(tmp_path):
    target = tmp_path / "x.pt"
    group, first = group_without(target, left_out=14)
    with pytest.raises(OutputError) as caught:
        first.commit()
    assert "is not complete: boards 1,400 to 1,499 are in no journal;" in str(caught.value)
    # When it is opened anew a network file system shows what others wrote.
    assert first._file._file is not first._file._locked
    assert first.suspend() == DUMP.rows - 100
    group.__exit__(None, None, None)
    finish(target, 1)
    assert target.read_bytes() == unbroken_bytes(".pt")


def test_a_file_of_another_size_is_not_committed(tmp_path):
    target = tmp_path / "x.pt"
    group, first = group_without(target, left_out=BATCHES - 1)
    write_ticket(first, DUMP, range(BATCHES - 1, BATCHES))
    os.truncate(first.partial, first.size + 1)
    with pytest.raises(OutputError, match="another size"):
        first.commit()
    group.__exit__(None, None, None)


def records_of(target: Path, rank: int) -> dict[int, bytes]:
    """Return the lines of a journal that are batches."""
    header = work_of(target, DUMP).header
    lines = journal_path(target, rank).read_bytes().splitlines(keepends=True)[1:]
    parsed = [(parse_record(header, line), line) for line in lines]
    return {record[0]: line for record, line in parsed if not isinstance(record, int)}


def test_a_batch_that_is_in_two_journals_is_not_committed_and_does_no_harm(tmp_path):
    target = tmp_path / "x.pt"
    group, first = group_without(target, left_out=BATCHES - 1)
    write_ticket(first, DUMP, range(BATCHES - 1, BATCHES))
    first._stop_sync()
    with journal_path(target, 1).open("ab") as journal:
        journal.write(records_of(target, 0)[5])
    with pytest.raises(OutputError, match="boards 500 to 599 are in 2 journals"):
        first.commit()
    group.__exit__(None, None, None)
    with open_file(target, DUMP) as file:
        assert file.resumed_rows == DUMP.rows
    finish(target, 2)
    assert target.read_bytes() == unbroken_bytes(".pt")


def test_a_batch_whose_record_has_another_length_is_not_committed(tmp_path):
    target = tmp_path / "x.pt"
    group, first = group_without(target, left_out=BATCHES - 1)
    header = work_of(target, DUMP).header
    record = parse_record(header, records_of(target, 1)[12])
    assert not isinstance(record, int)
    with journal_path(target, 1).open("ab") as journal:
        journal.write(batch_line(header, BATCHES - 1, record[1]))  # which is shorter
    with pytest.raises(OutputError, match="boards 1,900 to 1,989 are in no journal;"):
        first.commit()
    group.__exit__(None, None, None)


def test_a_batch_in_two_journals_is_kept_where_the_disk_has_one_of_them(tmp_path):
    target = tmp_path / "x.pt"
    interrupt(target, [[range(3)], [range(3, 6)]])
    header = work_of(target, DUMP).header
    journal_path(target, 3).touch(0o600)
    journal_path(target, 3).write_bytes(header_line(header))
    for batch, owner, other in ((1, 0, 3), (4, 1, 0)):
        record = parse_record(header, records_of(target, owner)[batch])
        assert not isinstance(record, int)
        wrong = {name: replace(digest, crc32=1) for name, digest in record[1].digests.items()}
        with journal_path(target, other).open("ab") as journal:
            journal.write(batch_line(header, batch, BatchRecord(wrong)))
    with open_file(target, DUMP) as file:
        assert file.resumed_rows == 600


def test_a_journal_that_is_left_over_from_other_work_is_not_believed(tmp_path):
    """Nor does what it has of the file come there."""
    target = tmp_path / "x.pt"
    other = replace(DUMP, metadata={"seed": "1"})
    with open_group(target, other, 3) as files:
        for rank, file in enumerate(files):
            write_ticket(file, other, range(5 * rank, 5 * rank + 5))
    stale = journal_path(target, 2).read_bytes()
    write_dump(target, DUMP, overwrite=True)
    assert contents(tmp_path) == {target.name: unbroken_bytes(".pt")}

    interrupt(target, [[range(3)], [range(3, 6)]])
    journal_path(target, 2).touch(0o600)
    journal_path(target, 2).write_bytes(stale)
    # The first journal says whose file it is.
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="left over from other work"):
        open_file(target, other)
    assert contents(tmp_path) == before
    with open_file(target, DUMP) as file:
        assert file.resumed_rows == 600
        assert len(names_in(tmp_path)) == 3


def test_without_the_first_journal_the_next_says_whose_file_it_is(tmp_path):
    target = tmp_path / "x.pt"
    interrupt(target, [[range(3)], [range(3, 6)]])
    journal_path(target).unlink()
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="left over from other work"):
        open_file(target, replace(DUMP, metadata={"seed": "1"}))
    assert contents(tmp_path) == before
    with open_file(target, DUMP) as file:
        assert file.resumed_rows == 300


@pytest.mark.parametrize("end", ["overwrite", "discard", "tidy", "new"])
def test_the_journals_of_all_processes_are_removed(tmp_path, end):
    target = tmp_path / "x.pt"
    interrupt(target, [[range(3)], [range(3, 6)], [range(6, 12)]])
    kept = {"x.pt.partial.journal.old", "x.pt.partial.journal.01", "y.pt.partial.journal.1"}
    for name in kept:
        (tmp_path / name).touch()
    match end:
        case "overwrite":
            open_file(target, DUMP, overwrite=True).suspend()
        case "discard":
            with open_group(target, DUMP, 3) as (first, *others):
                for other in others:
                    other.leave()
                first.discard()
        case "tidy":
            partial_path(target).unlink()
            tidy(target)
        case "new":
            partial_path(target).unlink()
            open_file(target, DUMP).suspend()
    assert names_in(tmp_path) == kept


def test_journals_of_who_has_taken_the_name_meanwhile_are_left(tmp_path):
    with open_group(tmp_path / "x.pt", DUMP, 2) as (first, second):
        second.leave()
        for path in (first.partial, journal_path(first.target, 1)):
            path.unlink()
            path.write_text("another's")
        first.discard()
    assert names_in(tmp_path) == {"x.pt.partial", "x.pt.partial.journal.1"}


def test_journals_of_who_begins_anew_during_a_commit_are_left(tmp_path, monkeypatch):
    target = tmp_path / "x.pt"

    def begin_anew(directory: Path) -> None:
        if target.exists():
            journal_path(target, 1).unlink()
            journal_path(target, 1).write_text("another's")
        sync_directory(directory)

    monkeypatch.setattr(output_file_module, "sync_directory", begin_anew)
    finish(target, 2)
    assert names_in(tmp_path) == {"x.pt", "x.pt.partial.journal.1"}


def resumed_with(target: Path, record: list[object]) -> None:
    """Check that a record does nothing that is last in a journal, with the right CRC-32."""
    interrupt(target, [[range(3)], [range(3, 6)]])
    open_file(target, DUMP).suspend()  # writes the edges
    before = partial_path(target).read_bytes()
    text = json.dumps(record).encode()
    with journal_path(target).open("ab") as journal:
        journal.write(text + b" %08x\n" % zlib.crc32(text))
    with open_file(target, DUMP) as file:
        assert file.resumed_rows == 600
        assert partial_path(target).read_bytes() == before


POOLED, HIDDEN, BOARDS = ([nbytes, 0, 0, 0] for nbytes in (1400, 6000, 1600))
PAGE = b64encode(bytes([255]) * 4096).decode()


@pytest.mark.parametrize(
    "pooled",
    [
        [*POOLED, [-1, "AAAA"]],
        [*POOLED, [0.5, "AAAA"]],
        [*POOLED, [1 << 70, "AAAA"]],
        [*POOLED, ["0", "AAAA"]],
        [*POOLED, [0, PAGE]],
        [*POOLED, [0, "?"]],
        [*POOLED, [0, 7]],
        [*POOLED, [0]],
        [*POOLED, "edge"],
        [*POOLED, None],
        [*POOLED, [0, "/w==", 1, "/w=="]],
        [6000, 0, 0, 0, [0, PAGE]],
        [1 << 50, 0, 0, 0, [1 << 40, "/w=="]],
        [1400, 0, 0],
        [1400, 1 << 40, 0, 0, [0, "/w=="]],
    ],
    ids=range(15),
)
def test_edges_that_cannot_be_are_not_written(tmp_path, pooled):
    resumed_with(tmp_path / "x.pt", [7, pooled, HIDDEN, BOARDS])


@pytest.mark.parametrize("batch", [-1, BATCHES, 1 << 80, "1", None, [1]])
def test_batches_that_cannot_be_are_not_believed(tmp_path, batch):
    resumed_with(tmp_path / "x.pt", [batch, [*POOLED, [0, "/w=="]], HIDDEN, BOARDS])


def test_a_line_too_long_is_not_read(tmp_path):
    digests = [[*POOLED, *[[0, "/w=="]] * 10_000], HIDDEN, BOARDS]
    resumed_with(tmp_path / "x.pt", [7, *digests])
