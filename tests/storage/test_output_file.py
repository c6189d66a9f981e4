"""The life of an output file: built beside its target, refused, committed or left; its writers."""

import ctypes
import errno
import mmap
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from dump_activations import _rust
from dump_activations.errors import InvalidArgumentError, OutputError
from dump_activations.storage.writing import writers as writers_module
from dump_activations.storage.writing.output import OutputFile
from dump_activations.storage.writing.paths import check_output
from dump_activations.storage.writing.writers import Writers
from dump_activations.timing import Chunk
from output_support import (
    SUFFIXES,
    make_dump,
    no_new_descriptors,
    open_file,
    open_output,
    small_dump,
    write_batches,
    write_dump,
    write_whole_tensors,
)


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_target_appears_with_the_commit_and_nothing_else_is_left(tmp_path, suffix):
    dump = small_dump()
    target = tmp_path / f"x{suffix}"
    target.write_text("old")
    with no_new_descriptors(), open_file(target, dump, overwrite=True) as file:
        write_whole_tensors(file, dump)
        write_batches(file, dump, dump.first_rows)
        assert target.read_text() == "old"
        digests = file.commit()
        assert target.stat().st_size == file.size
    assert digests.keys() == dump.data.keys()
    assert names_in(tmp_path) == {target.name}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_unfinished_file_cannot_be_taken_for_a_finished_one(tmp_path, suffix):
    from dump_activations.storage.reading.inspection import inspect

    dump = small_dump()
    target = tmp_path / f"x{suffix}"
    with open_file(target, dump) as file:
        write_whole_tensors(file, dump)
        write_batches(file, dump, dump.first_rows)
        renamed = file.partial.rename(tmp_path / f"stolen{suffix}")
        with pytest.raises(OutputError):
            inspect(renamed)
        renamed.rename(file.partial)


def test_leaving_without_a_batch_leaves_nothing(tmp_path):
    dump = small_dump()
    with no_new_descriptors(), open_file(tmp_path / "x.pt", dump) as file:
        write_whole_tensors(file, dump)
    assert names_in(tmp_path) == set()


def test_discard_removes_all_and_keeps_the_target(tmp_path):
    dump = small_dump()
    target = tmp_path / "x.npz"
    target.write_text("old")
    with no_new_descriptors(), open_file(target, dump, overwrite=True) as file:
        write_batches(file, dump, dump.first_rows[:2])
        file.discard()
    assert names_in(tmp_path) == {"x.npz"}
    assert target.read_text() == "old"


def test_a_second_dump_to_one_target_is_refused(tmp_path):
    dump = small_dump()
    target = tmp_path / "x.safetensors"
    with open_file(target, dump) as file:
        for options in ({}, {"overwrite": True}):
            with (
                no_new_descriptors(),
                pytest.raises(OutputError, match=r"another dump to .*x\.safetensors is running"),
            ):
                open_file(target, dump, **options)
        write_whole_tensors(file, dump)
        write_batches(file, dump, dump.first_rows)
        file.commit()
    assert open_output(target, dump).missing == []


def test_an_incomplete_file_is_not_committed(tmp_path):
    dump = small_dump()
    with open_file(tmp_path / "x.pt", dump) as file:
        write_whole_tensors(file, dump)
        write_batches(file, dump, dump.first_rows[:-1])
        with pytest.raises(AssertionError, match="was not written whole"):
            file.commit()


def test_a_target_that_is_a_link_is_written_through_it(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    real = tmp_path / "elsewhere" / "real.npz"
    link = tmp_path / "x.npz"
    link.symlink_to(real)
    write_dump(link, small_dump())
    assert link.is_symlink()
    assert real.is_file()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.mkdir, "is a directory"),
        (os.mkfifo, "is not an ordinary file"),
    ],
)
def test_a_target_that_is_something_else_is_refused(tmp_path, make, reason):
    path = tmp_path / "x.pt"
    make(path)
    with no_new_descriptors(), pytest.raises(OutputError, match=rf"x\.pt {reason}"):
        open_file(path, small_dump())
    assert names_in(tmp_path) == {"x.pt"}


def test_missing_directories_are_made_with_the_file(tmp_path):
    target = tmp_path / "not" / "there" / "x.SafeTensors"
    check_output(target, ["float32"])
    assert names_in(tmp_path) == set()
    write_dump(target, small_dump())
    other = write_dump(tmp_path / "x.safetensors", small_dump())
    assert target.read_bytes() == other.read_bytes()


def in_a_loop(directory: Path) -> Path:
    (directory / "x.pt").symlink_to("x.pt")
    return directory / "x.pt"


def below_a_file(directory: Path) -> Path:
    (directory / "file").touch()
    return directory / "file" / "deep" / "x.pt"


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (lambda directory: directory / ("d" * 300) / "x.pt", "File name too long"),
        (lambda directory: Path(f"{directory}{'/d' * 3000}/x.pt"), "File name too long"),
        (in_a_loop, "is not an ordinary file"),
        (below_a_file, "Not a directory"),
    ],
    ids=["long-name", "long-path", "loop", "below-a-file"],
)
def test_a_path_that_leads_nowhere_is_refused(tmp_path, place, reason):
    target = place(tmp_path)
    for use in (lambda: check_output(target, ["uint8"]), lambda: open_file(target, small_dump())):
        with pytest.raises(OutputError, match=reason) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_write_protected_target_is_refused(tmp_path):
    target = tmp_path / "x.pt"
    target.write_text("old")
    target.chmod(0o444)
    with pytest.raises(OutputError, match=r"x\.pt is write-protected"):
        open_file(target, small_dump())
    assert names_in(tmp_path) == {"x.pt"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_is_that_of_the_replaced_file_or_of_any_new_one(tmp_path, umask):
    dump = small_dump()
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    old.touch()
    old.chmod(0o640)
    before = os.umask(umask)
    try:
        for target in (old, new):
            write_dump(target, dump, overwrite=True)
    finally:
        os.umask(before)
    assert old.stat().st_mode & 0o777 == 0o640
    assert new.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("spelling", ["itself", "link", "hard-link", "dots"])
def test_an_input_is_no_output(tmp_path, spelling):
    read = tmp_path / "run.pt"
    read.write_text("weights")
    target = tmp_path / "x.pt"
    match spelling:
        case "itself":
            target = read
        case "link":
            target.symlink_to(read)
        case "hard-link":
            target.hardlink_to(read)
        case "dots":
            target = tmp_path / ".." / tmp_path.name / "run.pt"
    with pytest.raises(InvalidArgumentError, match=r"this run reads"):
        open_file(target, small_dump(), inputs=[tmp_path / "another.pt", read])
    assert read.read_text() == "weights"


def test_a_name_that_must_not_appear_is_no_output(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(InvalidArgumentError, match="would read it next time"):
        check_output(tmp_path / "link" / "x.pt", [], inputs=[tmp_path / "x.pt"])


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("ending", ["commit", "suspend"])
def test_a_partial_file_removed_meanwhile_is_an_error(tmp_path, ending, replaced):
    """And what has taken its name is neither published nor removed."""
    dump = small_dump()
    target = tmp_path / "x.pt"
    target.write_text("old")
    file = open_file(target, dump, overwrite=True)
    write_whole_tensors(file, dump)
    file.partial.unlink()
    if replaced:
        file.partial.write_text("another's")

    def finish() -> None:
        write_batches(file, dump, dump.first_rows)
        file.commit()

    with pytest.raises(OutputError, match="nothing is kept"):
        finish()
    if ending == "suspend":
        assert file.suspend() == 0
    else:
        file.discard()
    left = {"x.pt", "x.pt.partial"} if replaced else {"x.pt"}
    assert names_in(tmp_path) == left
    assert target.read_text() == "old"


def test_a_partial_file_removed_meanwhile_ends_the_run_with_the_next_flush(tmp_path):
    dump = small_dump()
    with open_file(tmp_path / "x.pt", dump) as file:
        file.partial.unlink()
        write_batches(file, dump, dump.first_rows[:1])
        while not (file._sync._error or file._journal.batches):
            time.sleep(0.001)
        with pytest.raises(OutputError, match="nothing is kept"):
            write_batches(file, dump, dump.first_rows[1:2])
    assert names_in(tmp_path) == set()


def test_a_partial_file_replaced_just_before_the_rename_is_not_published(tmp_path):
    dump = small_dump()
    target = tmp_path / "x.pt"
    with open_file(target, dump) as file:
        write_whole_tensors(file, dump)
        write_batches(file, dump, dump.first_rows)
        file._complete()
        file.partial.rename(tmp_path / "aside")
        file.partial.write_text("another's")
        with pytest.raises(OutputError, match="nothing is kept"):
            file.commit()
    assert names_in(tmp_path) == {"aside", "x.pt.partial"}


def test_direct_writes_go_to_the_file_that_was_opened(tmp_path, monkeypatch):
    """Whatever has taken its name when it is opened once more."""
    victim = tmp_path / "victim"
    victim.write_bytes(bytes(1 << 20))
    supports_direct = _rust.supports_direct

    def exchange(fd: int) -> bool:
        partial = tmp_path / "x.safetensors.partial"
        partial.rename(tmp_path / "aside")
        partial.symlink_to(victim)
        return supports_direct(fd)

    monkeypatch.setattr(_rust, "supports_direct", exchange)
    dump = make_dump({"boards": ("uint8", (1 << 20, 1))}, batched=["boards"], batch_rows=1 << 20)
    with open_file(tmp_path / "x.safetensors", dump) as file:
        if file._partial._direct is None:
            pytest.skip("no direct writes here")
        file.write_span(0, "boards", 0, dump.data["boards"])
    assert victim.read_bytes() == bytes(1 << 20)


def pages_in_cache(path: Path) -> int:
    mapped = np.memmap(path, np.uint8, "r")
    pages = np.empty(-(-mapped.size // mmap.PAGESIZE), np.uint8)
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    assert mincore(mapped.ctypes.data, mapped.size, pages.ctypes.data) == 0, ctypes.get_errno()
    return int((pages & 1).sum())


def test_a_large_span_goes_past_the_page_cache(tmp_path):
    dump = make_dump({"boards": ("uint8", (4 << 20, 1))}, batched=["boards"], batch_rows=4 << 20)
    with open_file(tmp_path / "x.safetensors", dump) as file:
        with file.partial.open("rb") as opened:
            if not _rust.supports_direct(opened.fileno()):
                pytest.skip("the file system does not say that it takes direct writes")
        file.write_span(0, "boards", 0, dump.data["boards"])
        assert pages_in_cache(file.partial) <= 2  # the edges


@pytest.mark.parametrize("length", [255, 239, 223])
def test_a_name_too_long_is_refused(tmp_path, length):
    """Too long it is already with what is added to it for the files beside it."""
    name = "x" * (length - 3) + ".pt"
    with no_new_descriptors(), pytest.raises(OutputError, match=r"x\.pt has too long a name"):
        open_file(tmp_path / name, small_dump())
    assert names_in(tmp_path) == set()


def test_an_error_is_one_line_with_the_systems_reason(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_rust, "reserve", refuse)
    with no_new_descriptors(), pytest.raises(OutputError) as caught:
        open_file(tmp_path / "x.pt", small_dump())
    assert str(caught.value).endswith("x.pt: No space left on device")
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value, OSError)
    assert names_in(tmp_path) == set()


def test_the_page_cache_makes_no_difference_to_the_bytes(tmp_path, monkeypatch):
    dump = make_dump(
        {"hidden": ("float16", (50, 33, 1000)), "boards": ("uint8", (50, 16))},
        batched=["hidden", "boards"],
        batch_rows=7,
    )
    one = write_dump(tmp_path / "one.safetensors", dump)
    monkeypatch.setattr(_rust, "supports_direct", lambda _fd: False)
    other = write_dump(tmp_path / "other.safetensors", dump)
    assert one.read_bytes() == other.read_bytes()


def test_writing_needs_no_torch(tmp_path):
    script = f"""
import sys
from pathlib import Path
from output_support import small_dump, write_dump
for suffix in (".safetensors", ".pt", ".npz"):
    write_dump(Path({str(tmp_path)!r}) / f"x{{suffix}}", small_dump())
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


class InjectedError(Exception):
    pass


def fail() -> None:
    raise InjectedError


class Slots:
    """Counts how often each batch's memory was given back."""

    def __init__(self) -> None:
        self.given_back: dict[int, int] = {}

    def submit(self, writers: Writers, file, dump, first_row: int, **options) -> None:
        self.given_back[first_row] = 0

        def done() -> None:
            self.given_back[first_row] += 1

        writers.submit(
            file, first_row // dump.batch_rows, dump.batch(first_row), done=done, **options
        )


@pytest.mark.parametrize("least", [1, 1 << 20])
def test_each_part_is_read_after_its_wait(tmp_path, monkeypatch, least):
    monkeypatch.setattr(writers_module, "MIN_CHUNK_NBYTES", least)
    dump = small_dump()
    waits = []
    with open_file(tmp_path / "x.npz", dump) as file:
        write_whole_tensors(file, dump)
        with Writers(lambda _: None, threads=4) as writers:
            for first_row in dump.first_rows:
                slices = dump.batch(first_row)
                memory = {name: np.zeros_like(data) for name, data in slices.items()}
                rows = len(slices["boards"]) // 16

                def fill(start, stop, rows=rows, memory=memory, slices=slices) -> None:
                    waits.append((start, stop))
                    for name, data in slices.items():
                        row = len(data) // rows
                        memory[name][start * row : stop * row] = data[start * row : stop * row]

                parts = [
                    Chunk(start, min(start + 3, rows), partial(fill, start, min(start + 3, rows)))
                    for start in range(0, rows, 3)
                ]

                def wipe(memory=memory) -> None:
                    for data in memory.values():
                        data[:] = 255

                writers.submit(file, first_row // dump.batch_rows, memory, chunks=parts, done=wipe)
        assert writers.busy_seconds > 0
        file.commit()
    assert set(waits) == {(0, 3), (3, 4)}
    other = write_dump(tmp_path / "other.npz", dump)
    assert (tmp_path / "x.npz").read_bytes() == other.read_bytes()


@pytest.mark.parametrize("where", ["write", "wait", "done"])
def test_the_first_error_surfaces_as_itself_with_all_memory_given_back(
    tmp_path, monkeypatch, where
):
    dump = small_dump(rows=400)
    target = tmp_path / "x.safetensors"
    target.write_text("old")
    slots = Slots()
    writes = 0
    write_span = _rust.write_span

    def failing_write(*arguments):
        nonlocal writes
        writes += 1
        if where == "write" and writes > 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write_span(*arguments)

    monkeypatch.setattr(_rust, "write_span", failing_write)
    threads_before = threading.active_count()

    def write_all(file: OutputFile) -> None:
        with Writers(lambda _: None, threads=3) as writers:
            for first_row in dump.first_rows:
                fails = where == "wait" and first_row == 40
                options = {"chunks": [Chunk(0, 4, fail)]} if fails else {}
                slots.submit(writers, file, dump, first_row, **options)
                if where == "done" and first_row == 40:
                    writers.submit(
                        file,
                        (first_row + 4) // dump.batch_rows,
                        dump.batch(first_row + 4),
                        done=fail,
                    )
                    break

    with no_new_descriptors(), open_file(target, dump, overwrite=True) as file:
        with pytest.raises(OutputError if where == "write" else InjectedError) as caught:
            write_all(file)
        if where == "write":
            assert caught.value.errno == errno.EIO
            assert str(caught.value) == f"cannot write {file.partial}: Input/output error"
    assert set(slots.given_back.values()) == {1}
    assert threading.active_count() == threads_before
    assert target.read_text() == "old"


def test_a_writers_error_stops_the_next_submit(tmp_path, monkeypatch):
    """A caller that never runs out of memory to hand over would go on to the end otherwise."""
    dump = small_dump(rows=400)
    failed = threading.Event()

    def failing_write(*_):
        failed.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def submit_all(writers: Writers) -> None:
        for first_row in dump.first_rows:
            submitted.append(first_row)
            writers.submit(
                file, first_row // dump.batch_rows, dump.batch(first_row), done=lambda: None
            )
            failed.wait()
            while writers._error is None:
                time.sleep(0.001)

    submitted: list[int] = []
    monkeypatch.setattr(_rust, "write_span", failing_write)
    with (
        pytest.raises(OutputError, match="Input/output error"),
        open_file(tmp_path / "x.pt", dump) as file,
        Writers(lambda _: None, threads=1) as writers,
    ):
        submit_all(writers)
    assert submitted == [0, 4]


def test_an_error_of_the_caller_is_not_covered_up(tmp_path):
    dump = small_dump()
    slots = Slots()

    def write_and_fail(file: OutputFile) -> None:
        with Writers(lambda _: None, threads=2) as writers:
            slots.submit(writers, file, dump, 0, chunks=[Chunk(0, 4, fail)])
            raise KeyError("the caller's own")

    with open_file(tmp_path / "x.pt", dump) as file, pytest.raises(KeyError):
        write_and_fail(file)
    assert slots.given_back == {0: 1}


def test_writing_holds_nothing_that_grows(tmp_path):
    """10^4 batches: no descriptor, thread or note is left over from the ones before."""
    dump = small_dump(rows=10_000, batch_rows=1)
    with open_file(tmp_path / "x.safetensors", dump) as file:
        write_whole_tensors(file, dump)
        with Writers(lambda _: None, threads=2) as writers:
            first_is_done = threading.Event()
            writers.submit(file, 0, dump.batch(0), done=first_is_done.set)
            first_is_done.wait()
            descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208
            for first_row in dump.first_rows[1:]:
                writers.submit(
                    file, first_row // dump.batch_rows, dump.batch(first_row), done=lambda: None
                )
            assert threading.active_count() == threads
            assert len(os.listdir("/proc/self/fd")) <= descriptors + 2  # noqa: PTH208 - the journal
        assert all(not running._waiting for running in file._digests.values())
        file.commit()


def test_unknown_dtype_is_refused_before_any_file(tmp_path):
    with pytest.raises(InvalidArgumentError, match="bfloat16"):
        check_output(tmp_path / "x.npz", ["bfloat16"])
