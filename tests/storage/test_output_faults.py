"""Faults of a machine while a file is written: a full, broken or forbidden disk, a quota."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dump_activations import _rust
from dump_activations.errors import OutputError
from dump_activations.storage.writing import journal
from dump_activations.storage.writing.paths import check_space
from output_support import (
    SUFFIXES,
    finish,
    interrupt,
    names_in,
    no_new_descriptors,
    open_file,
    small_dump,
    write_batches,
    write_dump,
    write_whole_tensors,
)

DUMP = small_dump(rows=400)
LARGE = small_dump(rows=20_000, batch_rows=1000)  # 2.7 MB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path, "size=1m")


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path, "ro")


def mounted(tmp_path: Path, options: str) -> Iterator[Path]:
    directory = tmp_path / "mount"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(directory)]
    try:
        mount = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if mount.returncode != 0:
        pytest.skip(f"file systems cannot be mounted here: {mount.stderr.strip()}")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def refuse(number: int):
    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def make_sparse(fd: int, size: int) -> bool:
    """Stand for `_rust.reserve` on a file system that cannot reserve space."""
    os.ftruncate(fd, size)
    return False


def test_a_full_disk_is_found_before_any_batch(small_disk):
    target = small_disk / "x.safetensors"
    target.write_text("old")
    with no_new_descriptors(), pytest.raises(OutputError, match="No space left") as caught:
        open_file(target, LARGE, overwrite=True)
    assert caught.value.errno == errno.ENOSPC
    assert names_in(small_disk) == [target.name]
    assert target.read_text() == "old"


def test_the_space_of_a_partial_file_counts_where_none_can_be_reserved(small_disk, monkeypatch):
    monkeypatch.setattr(_rust, "reserve", make_sparse)
    dump = small_dump(rows=8000, batch_rows=1000)  # three quarters of the disk
    target = small_disk / "x.npz"
    with pytest.raises(OutputError, match=r"cannot reserve 2,000,000 .*No space left on device"):
        check_space([target], 2_000_000)
    interrupt(target, dump, dump.first_rows[:7])
    check_space([target], 793_600)
    with open_file(target, dump) as file:
        assert file.resumed_rows == 7000
        finish(file, dump)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_fills_up_meanwhile(small_disk, monkeypatch, suffix):
    monkeypatch.setattr(_rust, "reserve", lambda fd, size: make_sparse(fd, size) or True)
    target = small_disk / f"x{suffix}"
    target.write_text("old")
    with (
        no_new_descriptors(),
        pytest.raises(OutputError, match=r"cannot write .*: No space left on device") as caught,
    ):
        write_dump(target, LARGE, overwrite=True)
    assert caught.value.errno == errno.ENOSPC
    assert target.read_text() == "old"


def test_a_read_only_disk(read_only_disk):
    with no_new_descriptors(), pytest.raises(OutputError, match="choose another output"):
        open_file(read_only_disk / "x.pt", LARGE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="is not writable"):
            open_file(tmp_path / "x.pt", LARGE)
    finally:
        tmp_path.chmod(0o755)


def test_a_quota_on_file_sizes(tmp_path):
    script = """
import sys
from pathlib import Path
from output_support import small_dump, write_dump
try:
    write_dump(Path(sys.argv[1]), small_dump(rows=20_000, batch_rows=1000), overwrite=True)
except OSError as error:
    sys.exit(str(error))
"""
    target = tmp_path / "x.npz"
    target.write_text("old")
    limited = subprocess.run(
        [sys.executable, "-c", script, str(target)],
        cwd=Path(__file__).parents[1],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert limited.returncode == 1
    assert limited.stderr == f"cannot reserve 1,983,590 bytes for {target}: File too large\n"
    assert names_in(tmp_path) == [target.name]
    assert target.read_text() == "old"


@pytest.mark.parametrize(("call", "interval"), [("fsync", 3600), ("fdatasync", 0)])
def test_a_disk_that_cannot_flush(tmp_path, monkeypatch, call, interval):
    """At the end, and on the way."""
    target = tmp_path / "x.pt"
    target.write_text("old")
    with no_new_descriptors(), open_file(target, DUMP, overwrite=True) as file:
        monkeypatch.setattr(os, call, refuse(errno.EIO))
        monkeypatch.setattr(journal, "SYNC_INTERVAL", interval)
        with pytest.raises(OutputError, match=r"cannot write .*: Input/output error") as caught:
            finish(file, DUMP)
        assert caught.value.errno == errno.EIO
    assert target.read_text() == "old"


def test_a_flush_that_failed_in_the_background_is_never_taken_for_done(tmp_path):
    """The next flush may succeed although pages are lost."""
    with open_file(tmp_path / "x.pt", DUMP) as file:
        write_whole_tensors(file, DUMP)
        write_batches(file, DUMP, DUMP.first_rows)
        file._journal._error = OSError(errno.EIO, os.strerror(errno.EIO))
        with pytest.raises(OutputError, match="Input/output error"):
            file.commit()


INTERRUPTED = """
import sys
from pathlib import Path
from output_support import make_dump, write_dump
dump = make_dump({"boards": ("uint8", (4 << 20, 1))}, batched=["boards"], batch_rows=4 << 20)
write_dump(Path(sys.argv[1]), dump)
"""


@pytest.mark.parametrize(
    ("call", "nth"), [*(("pwrite", nth) for nth in range(1, 7)), ("allocate", 1), ("allocate", 2)]
)
def test_a_call_that_a_signal_interrupts_is_repeated(fault_library, tmp_path, call, nth):
    fault = {"FAULT": f"{call}:{nth}:{errno.EINTR}:{tmp_path}/", "LD_PRELOAD": str(fault_library)}
    subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "x.pt")],
        cwd=Path(__file__).parents[1],
        env=os.environ | fault,
        check=True,
    )
    assert names_in(tmp_path) == ["x.pt"]


def test_a_failed_run_can_be_resumed(tmp_path, monkeypatch):
    target = tmp_path / "x.npz"
    write_span, writes = _rust.write_span, iter(range(10**6))

    def failing_write(*arguments):
        return (refuse(errno.EIO) if next(writes) > 50 else write_span)(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(_rust, "write_span", failing_write)
        with pytest.raises(OutputError, match="Input/output error"):
            write_dump(target, DUMP, threads=1)
    assert not target.exists()
    with open_file(target, DUMP) as file:
        assert 0 < file.resumed_rows < DUMP.rows
        finish(file, DUMP)
    assert target.read_bytes() == write_dump(tmp_path / "other.npz", DUMP).read_bytes()
