"""The life of an output file: built next to its target, refused, committed or left."""

import ctypes
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dump_activations import _rust
from dump_activations.errors import InvalidArgumentError, OutputError
from dump_activations.storage.reading.inspection import inspect
from dump_activations.storage.writing.partial import is_at
from dump_activations.storage.writing.paths import check_output
from output_support import (
    SUFFIXES,
    finish,
    make_dump,
    names_in,
    no_new_descriptors,
    open_file,
    small_dump,
    write_batches,
    write_dump,
    write_whole_tensors,
)

DUMP = small_dump()


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "x.pt"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_target_appears_with_the_commit_and_nothing_else_is_left(tmp_path, suffix):
    target = tmp_path / f"x{suffix}"
    target.write_text("old")
    with no_new_descriptors(), open_file(target, DUMP, overwrite=True) as file:
        write_whole_tensors(file, DUMP)
        write_batches(file, DUMP, DUMP.first_rows)
        assert target.read_text() == "old"
        renamed = file.partial.rename(tmp_path / f"unfinished{suffix}")
        with pytest.raises(OutputError):
            inspect(renamed)
        renamed.rename(file.partial)
        file.commit()
        assert target.stat().st_size == file.size
    assert names_in(tmp_path) == [target.name]


@pytest.mark.parametrize("batches", [0, 2])
def test_a_file_without_a_batch_or_discarded_leaves_nothing(target, batches):
    target.write_text("old")
    with no_new_descriptors(), open_file(target, DUMP, overwrite=True) as file:
        write_whole_tensors(file, DUMP)
        write_batches(file, DUMP, DUMP.first_rows[:batches])
        assert file.suspend(discard=batches > 0) == 0
    assert names_in(target.parent) == ["x.pt"]
    assert target.read_text() == "old"


def test_links_are_followed_and_directories_made(tmp_path):
    link, real = tmp_path / "x.npz", tmp_path / "not" / "there" / "real.NPZ"
    link.symlink_to(real)
    check_output(link, ["float32"])
    assert names_in(tmp_path) == ["x.npz"]
    write_dump(link, DUMP)
    assert link.is_symlink()
    assert real.read_bytes() == write_dump(tmp_path / "other.npz", DUMP).read_bytes()


def protected(path: Path) -> None:
    path.touch(0o444)


REFUSED = {
    "directory": (Path.mkdir, "x.pt", r"x\.pt is a directory; name a file in it"),
    "pipe": (os.mkfifo, "x.pt", r"x\.pt is not an ordinary file"),
    "loop": (lambda path: path.symlink_to("x.pt"), "x.pt", "is not an ordinary file"),
    "protected": (protected, "x.pt", r"x\.pt is write-protected"),
    "below-a-file": (Path.touch, "x.pt/deep/y.pt", "Not a directory"),
    "long-part": (None, f"{'d' * 300}/x.pt", "File name too long"),
    "long-path": (None, f"{'d/' * 3000}x.pt", "File name too long"),
    **{
        # The names of the files next to it are longer.
        f"long-{length}": (None, f"{'x' * (length - 3)}.pt", r"x\.pt has too long a name")
        for length in (255, 239, 223)
    },
}


@pytest.mark.parametrize(("make", "name", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_target_that_cannot_be_written_is_refused(tmp_path, make, name, reason):
    if make is not None:
        make(tmp_path / "x.pt")
    before, target = names_in(tmp_path), tmp_path / name
    for use in (lambda: check_output(target, ["uint8"]), lambda: open_file(target, DUMP)):
        with no_new_descriptors(), pytest.raises(OutputError, match=reason) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == before


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_is_that_of_the_replaced_file_or_of_any_new_one(tmp_path, umask):
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    old.touch()
    old.chmod(0o640)
    before = os.umask(umask)
    try:
        for target in (old, new):
            write_dump(target, DUMP, overwrite=True)
    finally:
        os.umask(before)
    assert old.stat().st_mode & 0o777 == 0o640
    assert new.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("spelling", ["run.pt", "link.pt", "hard-link.pt", "dots/run.pt"])
def test_an_input_is_no_output(tmp_path, spelling):
    read = tmp_path / "run.pt"
    read.write_text("weights")
    (tmp_path / "link.pt").symlink_to(read)
    (tmp_path / "hard-link.pt").hardlink_to(read)
    (tmp_path / "dots").symlink_to(tmp_path)
    for inputs in ([tmp_path / "another.pt", read], [tmp_path / spelling]):
        with pytest.raises(InvalidArgumentError, match=r"this run reads"):
            check_output(tmp_path / spelling, ["uint8"], inputs=inputs)
    with pytest.raises(InvalidArgumentError, match="would read it next time"):
        check_output(tmp_path / "dots" / "new.pt", [], inputs=[tmp_path / "new.pt"])


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("discard", [False, True])
def test_a_partial_file_removed_meanwhile_is_an_error(target, discard, replaced):
    """And what has taken its name is neither published nor removed."""
    target.write_text("old")
    file = open_file(target, DUMP, overwrite=True)
    file.partial.unlink()
    if replaced:
        file.partial.write_text("another's")
    with pytest.raises(OutputError, match="nothing is kept"):
        finish(file, DUMP)
    assert file.suspend(discard=discard) == 0
    assert names_in(target.parent) == (["x.pt", "x.pt.partial"] if replaced else ["x.pt"])
    assert target.read_text() == "old"


def test_a_partial_file_removed_meanwhile_ends_the_run_with_the_next_flush(target):
    with open_file(target, DUMP) as file:
        file.partial.unlink()
        write_batches(file, DUMP, DUMP.first_rows[:1])
        while not (file._journal._error or file._journal.batches):
            time.sleep(0.001)
        with pytest.raises(OutputError, match="nothing is kept"):
            write_batches(file, DUMP, DUMP.first_rows[1:2])
    assert names_in(target.parent) == []


def test_a_partial_file_replaced_just_before_the_rename_is_not_published(target):
    with open_file(target, DUMP) as file:
        write_whole_tensors(file, DUMP)
        write_batches(file, DUMP, DUMP.first_rows)
        file._complete()
        file.partial.rename(target.with_name("aside"))
        file.partial.write_text("another's")
        with pytest.raises(OutputError, match="nothing is kept"):
            file.commit()
    assert names_in(target.parent) == ["aside", "x.pt.partial"]


LARGE = make_dump({"boards": ("uint8", (4 << 20, 1))}, batched=["boards"], batch_rows=4 << 20)


def test_direct_writes_go_to_the_file_that_was_opened(target, monkeypatch):
    """Whatever has taken its name when it is opened once more."""
    victim = target.with_name("victim")
    victim.write_bytes(bytes(1 << 20))
    supports_direct = _rust.supports_direct

    def exchange(fd: int) -> bool:
        partial = target.with_name("x.pt.partial")
        partial.rename(target.with_name("aside"))
        partial.symlink_to(victim)
        return supports_direct(fd)

    monkeypatch.setattr(_rust, "supports_direct", exchange)
    with open_file(target, LARGE) as file:
        if file._partial._direct is None:
            pytest.skip("no direct writes here")
        file.write_span(0, "boards", 0, LARGE.data["boards"])
    assert victim.read_bytes() == bytes(1 << 20)


def pages_in_cache(path: Path) -> int:
    mapped = np.memmap(path, np.uint8, "r")
    pages = np.empty(-(-mapped.size // mmap.PAGESIZE), np.uint8)
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    assert mincore(mapped.ctypes.data, mapped.size, pages.ctypes.data) == 0, ctypes.get_errno()
    return int((pages & 1).sum())


def test_a_large_span_goes_past_the_page_cache_with_the_same_bytes(target, monkeypatch):
    with open_file(target, LARGE) as file:
        if file._partial._direct is None:
            pytest.skip("the file system does not say that it takes direct writes")
        file.write_span(0, "boards", 0, LARGE.data["boards"])
        assert pages_in_cache(file.partial) <= 2  # the edges
    write_dump(target, LARGE)
    monkeypatch.setattr(_rust, "supports_direct", lambda _fd: False)
    other = write_dump(target.with_name("other.pt"), LARGE)
    assert target.read_bytes() == other.read_bytes()


def test_the_name_of_the_lock_goes_last(target, monkeypatch):
    """Otherwise another process makes its own files, and this one removes its journal."""
    removed, unlink = [], Path.unlink

    def noted(path: Path, **options: bool) -> None:
        removed.append(path.name)
        unlink(path, **options)

    with open_file(target, DUMP) as file:
        monkeypatch.setattr(Path, "unlink", noted)
        file.suspend(discard=True)
    assert removed[-1] == "x.pt.partial"
    assert names_in(target.parent) == []


SAME = {"st_dev": 1, "st_ino": 1, "st_nlink": 1, "st_size": 9, "st_mtime_ns": 5, "st_ctime_ns": 6}


@pytest.mark.parametrize(
    ("opened", "is_same"),
    [
        ({}, True),
        ({"st_size": 10}, True),
        ({"st_ino": 2}, True),
        *(
            ({"st_ino": 2, name: 0}, False)
            for name in ("st_nlink", "st_size", "st_mtime_ns", "st_ctime_ns")
        ),
    ],
    ids=str,
)
def test_a_file_is_the_same_by_its_inode_or_by_all_else(monkeypatch, opened, is_same):
    """Some network mounts renew the inode numbers of open files."""
    monkeypatch.setattr(os, "fstat", lambda _fd: SimpleNamespace(**SAME | opened))
    monkeypatch.setattr(Path, "lstat", lambda _path: SimpleNamespace(**SAME))
    assert is_at(0, Path("x")) is is_same


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_is_whole_is_kept_where_its_name_is_taken(target, overwrite):
    """The error says that the same call finishes the dump from the partial file."""
    write_dump(target, DUMP).rename(target.with_name("x.pt.partial"))
    with open_file(target, DUMP, overwrite=overwrite) as file:
        target.write_text("precious")
        with pytest.raises(OutputError, match="move it away, and the same call finishes"):
            file.commit()
        assert file.suspend() == DUMP.rows
    assert target.read_text() == "precious"
    target.unlink()
    assert write_dump(target, DUMP).stat().st_size == file.size


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
