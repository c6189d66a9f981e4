"""Shards: their cut, and the rules of the lock, each with the failure that it prevents."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dump_activations import _rust
from dump_activations.errors import DumpActivationsNote, InvalidArgumentError, OutputError
from dump_activations.storage.shards import Shard, list_shards, parse_shard
from dump_activations.storage.writing import partial as partial_module
from dump_activations.storage.writing import shards as shards_module
from dump_activations.storage.writing.existing import choose_shards
from dump_activations.storage.writing.paths import journal_path, partial_path
from dump_activations.storage.writing.shards import Place
from output_support import (
    missing_rows,
    names_in,
    open_output,
    small_dump,
    work_of,
    write_batches,
    write_dump,
    write_shards,
    write_whole_tensors,
)

DUMP = small_dump(rows=23)  # 6 batches of 4
OTHER = replace(DUMP, metadata={"seed": "1"})


SHARDS = ["x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"]


def write(file) -> None:
    write_whole_tensors(file, DUMP)
    write_batches(file, DUMP, missing_rows(file))


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "x.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """Return the bytes of the first of two shards."""
    target = tmp_path_factory.mktemp("reference") / "x.safetensors"
    write_shards(target, DUMP, 2)
    return target.with_name(SHARDS[0]).read_bytes()


# The cut


@given(rows=st.integers(1, 500), batch_rows=st.integers(1, 40), size=st.integers(1, 60_000))
def test_the_cut_is_the_smallest_that_fits(rows, batch_rows, size):
    work = work_of(Path("/nowhere/x.pt"), small_dump(rows, batch_rows))
    row_nbytes = 7 * 2 + 3 * 5 * 4 + 16
    other_nbytes = rows * 8 + 9 * 4  # indices come whole here, with the gammas
    batches = -(-rows // batch_rows)

    def fits(shards: int) -> bool:
        largest = -(-batches // shards)
        return largest * batch_rows * row_nbytes + other_nbytes <= size

    naive = next((shards for shards in range(1, batches + 1) if fits(shards)), batches)
    assert work.count_shards(size) == naive
    files = work.files(naive)
    assert [batch for file in files for batch in file.run_batches] == list(range(batches))
    assert [row for file in files for row in file.run_rows] == list(range(rows))
    assert {file.batches for file in files} <= {batches // naive, -(-batches // naive)}
    for i, file in enumerate(files, 1):
        assert file.run_batches == range((i - 1) * batches // naive, i * batches // naive)


def test_more_than_99999_shards_are_refused():
    work = work_of(Path("/nowhere/x.pt"), small_dump(100_000, 1))
    with pytest.raises(InvalidArgumentError, match=r"100,000 shards; give a size .* 99,999"):
        work.count_shards(1)


def test_names_of_shards():
    shard = Shard(Path("/a/x.y.npz"), 3, 40)
    assert shard.path == Path("/a/x.y-00003-of-00040.npz")
    assert parse_shard(shard.path) == shard
    for name in ("x.npz", "x-00000-of-00002.npz", "x-00003-of-00002.npz", "x-1-of-2.npz"):
        assert parse_shard(Path(name)) is None


# Rule 1: after the lock, the name must lead to the open file, and the final name must be absent.


@pytest.mark.parametrize("moment", ["between the look and opening", "between opening and locking"])
def test_a_file_published_before_the_lock_is_neither_truncated_nor_written_again(
    target, whole, monkeypatch, moment
):
    """The first needs the listing after the lock, the second the look at the name."""
    first = open_output(target, DUMP, shards=2).take()
    write(first)
    second = open_output(target, DUMP, shards=2)
    second.files = second.files[:1]
    inode = first.partial.stat().st_ino
    create, open_own = partial_module.create, partial_module.open_own

    def early(path, flags):
        if first.partial.exists() and not first.work.target.exists():
            first.commit()
        return create(path, flags)

    def late(path, flags):
        opened = open_own(path, flags)
        first.commit()
        return opened

    if moment == "between opening and locking":
        monkeypatch.setattr(partial_module, "open_own", late)
    else:
        monkeypatch.setattr(partial_module, "create", early)
    assert second.take() is None
    assert first.work.target.stat().st_ino == inode
    assert first.work.target.read_bytes() == whole
    assert names_in(target.parent) == [first.work.target.name]


def test_a_file_is_not_at_its_name_once_one_of_equal_looks_replaced_it(tmp_path):
    paths = tmp_path / "first", tmp_path / "second"
    for path in paths:
        path.write_bytes(b"x")
        os.utime(path, ns=(0, 0))
    with paths[0].open("rb") as opened:
        assert partial_module.is_at(opened.fileno(), paths[0])
        paths[1].replace(paths[0])  # at one moment for the inodes of both
        assert not partial_module.is_at(opened.fileno(), paths[0])


def test_a_locked_shard_is_passed_over(target):
    first = open_output(target, DUMP, shards=2)
    second = open_output(target, DUMP, shards=2)
    assert first.take().work.shard.number == 1
    assert second.take().work.shard.number == 2
    assert first.take() is second.take() is None
    for output in (first, second):
        output.suspend()


def test_processes_start_at_their_own_shard_and_go_on_from_there(target):
    outputs = [open_output(target, DUMP, shards=6, place=Place(rank, 3)) for rank in range(3)]
    assert [output.take().work.shard.number for output in outputs] == [1, 3, 5]
    outputs[0].suspend()
    assert [outputs[1].take().work.shard.number for _ in range(3)] == [4, 6, 1]
    for output in outputs[1:]:
        output.suspend()


# Rule 2: the completion mark is written last. A partial file that has it is only renamed.


def test_a_partial_file_with_its_last_bytes_is_only_renamed(target, whole, monkeypatch):
    """Its journal may be gone, and a reader may have it open already."""
    with open_output(target, DUMP, shards=2) as output:
        file = output.take()
        write(file)
        file._complete()
    partial = partial_path(file.work.target)
    journal_path(file.work.target).unlink()
    inode = partial.stat().st_ino
    monkeypatch.setattr(_rust, "write_span", None)
    with open_output(target, DUMP, shards=2) as output:
        again = output.take()
        assert (again.missing, again.resumed_rows) == ([], 12)
        write_whole_tensors(again, DUMP)
        output.commit(again)
    assert file.work.target.read_bytes() == whole
    assert file.work.target.stat().st_ino == inode
    assert names_in(target.parent) == [file.work.target.name]


def test_the_mark_of_other_work_does_not_count(target):
    """A partial file that is whole, but of other work, is refused, and started over on demand."""
    write_shards(target, OTHER, 2)
    shard, second = (file.target for file in open_output(target, OTHER, shards=2).files)
    shard.rename(partial_path(shard))
    second.unlink()
    with open_output(target, DUMP, shards=2) as output:
        file = output.take()
        assert (file.resumed_rows, file.restarted_because) == (0, "it has no journal")


# Rule 4: of two processes of other work or another cut, one sees the other's journal.


@pytest.mark.parametrize(("dump", "shards"), [(DUMP, 3), (OTHER, 2)], ids=["cut", "work"])
def test_two_dumps_at_once_are_refused_and_the_late_one_leaves_nothing(target, dump, shards):
    second = open_output(target, dump, shards=shards)  # It looks before the first begins.
    second.files = second.files[1:]
    with open_output(target, DUMP, shards=2) as first:
        first.take()
        before = names_in(target.parent)
        with pytest.raises(OutputError, match=r"another cut|other work"):
            second.take()
        assert names_in(target.parent) == before


# Rule 5: what `overwrite` replaces.


def test_overwrite_replaces_other_work_that_was_there_and_keeps_the_same_work(target, whole):
    write_shards(target, OTHER, 2)
    first, second = (file.target for file in open_output(target, OTHER, shards=2).files)
    with pytest.raises(OutputError, match=r"00001-of-00002.safetensors is of other work, .*seed"):
        open_output(target, DUMP, shards=2)
    write_shards(target, DUMP, 2, overwrite=True)
    inodes = [first.stat().st_ino, second.stat().st_ino]
    write_shards(target, DUMP, 2, overwrite=True)
    assert [first.stat().st_ino, second.stat().st_ino] == inodes
    assert first.read_bytes() == whole


def test_overwrite_does_not_replace_what_comes_later(target):
    with open_output(target, DUMP, shards=2, overwrite=True) as output:
        file = output.take()
        write(file)
        file.work.target.write_text("precious")
        with pytest.raises(OutputError, match="appeared or changed while it was being written"):
            output.commit(file)
    assert file.work.target.read_text() == "precious"
    # Without its journal, another call would take the whole partial file for a broken one.
    assert journal_path(file.work.target).exists()


@pytest.mark.parametrize("is_changed", [False, True])
def test_overwrite_does_not_replace_what_comes_before_its_shard_is_taken(target, is_changed):
    if is_changed:
        write_shards(target, OTHER, 2)
    with open_output(target, DUMP, shards=2, overwrite=True) as output:
        output.files[0].target.write_text("precious")
        with pytest.raises(OutputError, match="is not a dump of this package"):
            output.take()


def test_a_shard_under_the_name_of_another_is_refused(target):
    write_shards(target, DUMP, 2)
    first, second = (file.target for file in open_output(target, DUMP, shards=2).files)
    second.replace(first)
    with pytest.raises(OutputError, match=f"{first.name} is of other work"):
        open_output(target, DUMP, shards=2)


def test_overwrite_does_not_start_over_what_is_being_written(target):
    with open_output(target, OTHER, shards=2) as theirs:
        file = theirs.take()
        with pytest.raises(OutputError, match="other work"):
            open_output(target, DUMP, shards=2, overwrite=True)
        write_batches(file, OTHER, [0])
    with open_output(target, DUMP, shards=2, overwrite=True) as output:
        assert output.take().resumed_rows == 0


# Rule 6: a forked child closes the lock, and neither unlocks nor cleans up.


def test_a_forked_child_neither_holds_nor_removes(target, whole):
    output = open_output(target, DUMP, shards=2)
    file = output.take()
    write_batches(file, DUMP, [0])
    gate_out, gate_in = os.pipe()
    child = os.fork()
    if child == 0:
        output.suspend(discard=True)
        os.read(gate_out, 1)
        os._exit(0)
    try:
        assert is_locked_for_others(partial_path(file.work.target))
        assert output.suspend() == 4
        with open_output(target, DUMP, shards=2) as again:
            resumed = again.take()  # although the child lives
            assert resumed.resumed_rows == 4
            write(resumed)
            again.commit(resumed)
    finally:
        os.write(gate_in, b".")
        assert os.waitpid(child, 0)[1] == 0
    assert file.work.target.read_bytes() == whole


def is_locked_for_others(path: Path) -> bool:
    script = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    return bool(
        subprocess.run(
            [sys.executable, "-c", script, path], stderr=subprocess.DEVNULL, check=False
        ).returncode
    )


def test_closing_the_direct_descriptor_keeps_the_lock(target):
    with open_output(target, DUMP, shards=2) as output:
        file = output.take()
        file._partial._direct = None
        assert is_locked_for_others(file.partial)
    assert names_in(target.parent) == []


# Rule 7: a process waits for those that are in progress, and takes over what is released.


def test_waiting_names_the_shard_and_its_process_and_ends_with_it(target, monkeypatch):
    monkeypatch.setattr(shards_module, "_FIRST_NOTE_SECONDS", 0.0)
    monkeypatch.setattr(shards_module, "POLL_SECONDS", 0.001)
    first = open_output(target, DUMP, shards=1)
    file = first.take()
    write(file)
    second = open_output(target, DUMP, shards=1)
    finishing = threading.Timer(0.2, lambda: first.commit(file))
    finishing.start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DumpActivationsNote)
        assert second.next() is None
    finishing.join()
    assert f"waiting for {file.work.target.name} (host {os.uname().nodename}, process" in str(
        caught[0].message
    )
    assert len(caught) == 1  # The next note comes after a minute.


def test_a_shard_of_a_process_that_ends_is_taken_over_where_it_stopped(target, monkeypatch):
    monkeypatch.setattr(shards_module, "POLL_SECONDS", 0.001)
    first = open_output(target, DUMP, shards=1)
    write_batches(first.take(), DUMP, [0, 4])
    leaving = threading.Timer(0.1, first.suspend)
    leaving.start()
    with open_output(target, DUMP, shards=1) as second:
        taken = second.next()
        assert taken.resumed_rows == 8
        write(taken)
        second.commit(taken)
        assert second.next() is None
    leaving.join()


def test_a_process_that_waits_can_be_interrupted(target, monkeypatch):
    monkeypatch.setattr(shards_module, "POLL_SECONDS", 0.001)
    asked = []

    def check():
        asked.append(True)
        raise KeyboardInterrupt

    first = open_output(target, DUMP, shards=1)
    first.take()
    leaving = threading.Timer(1, first.suspend)  # ends the wait that nobody interrupts
    leaving.start()
    second = open_output(target, DUMP, shards=1, check=check)
    with second, pytest.raises(KeyboardInterrupt):
        second.next()
    leaving.join()
    assert asked == [True]


# Rule 8: file systems without locks, or with locks that protect nothing.


def without_locks(number: int):
    def flock(_fd: int, _operation: int) -> None:
        raise OSError(number, os.strerror(number))

    return flock


def granted_to_all(_fd: int, _operation: int) -> None:
    pass


LOCKS = {
    **{
        f"errno {number}": without_locks(number)
        for number in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, 524)
    },
    "fake": granted_to_all,
}


@pytest.mark.parametrize("flock", LOCKS.values(), ids=LOCKS)
def test_without_locks_the_shards_are_split_by_rank(target, monkeypatch, flock):
    monkeypatch.setattr(fcntl, "flock", flock)
    assert write_shards(target, DUMP, 5, place=Place(0, 2)) == [1, 3, 5]
    assert write_shards(target, DUMP, 5, place=Place(1, 2)) == [2, 4]
    assert names_in(target.parent) == [path.name for path in list_shards(target).values()]


@pytest.mark.parametrize("flock", LOCKS.values(), ids=LOCKS)
def test_without_locks_a_journal_of_this_minute_is_not_taken_over(target, monkeypatch, flock):
    monkeypatch.setattr(fcntl, "flock", flock)
    with open_output(target, DUMP, shards=2) as output:
        file = output.take()
        write_batches(file, DUMP, [0])
    with pytest.raises(OutputError, match=r"written less than a minute ago.*shards"):
        open_output(target, DUMP, shards=2).take()
    an_hour_ago = time.time() - 3600
    os.utime(journal_path(file.work.target), (an_hour_ago, an_hour_ago))
    with open_output(target, DUMP, shards=2) as output:
        assert output.take().resumed_rows == 4


def test_the_age_of_a_journal_goes_by_the_clock_of_its_file_system(target, monkeypatch):
    with open_output(target, DUMP, shards=2) as output:
        file = output.take()
        write_batches(file, DUMP, [0])
    monkeypatch.setattr(fcntl, "flock", granted_to_all)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)  # That of the files is an hour ahead.
    with pytest.raises(OutputError, match="written less than a minute ago"):
        open_output(target, DUMP, shards=2).take()
    os.utime(journal_path(file.work.target), (now - 100, now - 100))
    with open_output(target, DUMP, shards=2) as output:
        assert output.take().resumed_rows == 4


# Rule 9: journals next to finished shards go.


def test_a_journal_next_to_a_finished_shard_is_removed(target):
    write_shards(target, DUMP, 2)
    output = open_output(target, DUMP, shards=2)
    first, second = (file.target for file in output.files)
    journal_path(first).write_text("left by a kill after the rename")
    for path_of in (partial_path, journal_path):
        path_of(second).write_text("of a process that may be at work")
    assert output.next() is None
    left = [first, second, partial_path(second), journal_path(second)]
    assert names_in(target.parent) == [path.name for path in left]


# The choice of the cut


def test_the_cut_that_is_there_is_continued(target):
    work = work_of(target, DUMP)
    assert choose_shards(work, None, share=False) is None
    assert choose_shards(work, None, share=True) == 6  # 128, but one batch per shard at least
    write_shards(target, DUMP, 2)
    assert choose_shards(work, None, share=False) == 2
    assert choose_shards(work, None, share=True) == 2
    with pytest.raises(OutputError, match=r"another cut, x-\*-of-00002.safetensors"):
        choose_shards(work, 1, share=True)


def test_a_whole_dump_next_to_shards_is_refused(target):
    work = work_of(target, DUMP)
    write_dump(target, DUMP)
    for size in (1, 10**9):
        with pytest.raises(OutputError, match="a whole dump and for shards"):
            choose_shards(work, size, share=False)
    assert choose_shards(work, None, share=True) is None  # already complete
    target.rename(partial_path(target))
    with pytest.raises(OutputError, match="let one process finish it"):
        choose_shards(work, None, share=True)
    partial_path(target).unlink()
    write_shards(target, DUMP, 2)
    target.touch()
    with pytest.raises(OutputError, match="a whole dump and for shards"):
        choose_shards(work, None, share=False)


@pytest.mark.parametrize("cuts", [(None, 2), (2, None)])
def test_a_whole_dump_and_shards_that_begin_at_once_see_each_other(target, cuts):
    second = open_output(target, DUMP, shards=cuts[1])
    with open_output(target, DUMP, shards=cuts[0]) as first:
        first.take()
        before = names_in(target.parent)
        with pytest.raises(OutputError, match="a whole dump and for shards"):
            second.take()
        assert names_in(target.parent) == before
