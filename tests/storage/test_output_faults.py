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
from dump_activations.storage.writing import output as output_module
from output_support import (
    no_new_descriptors,
    open_file,
    small_dump,
    write_batches,
    write_dump,
    write_whole_tensors,
)

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


def test_a_full_disk_is_found_before_any_batch(small_disk):
    target = small_disk / "x.safetensors"
    target.write_text("old")
    with no_new_descriptors(), pytest.raises(OutputError, match="No space left") as caught:
        open_file(target, LARGE, overwrite=True)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in small_disk.iterdir()] == [target.name]
    assert target.read_text() == "old"


def make_sparse(fd: int, size: int) -> bool:
    """Stand for `_rust.reserve` on a file system that cannot reserve space."""
    os.ftruncate(fd, size)
    return False


def test_a_full_disk_is_found_where_no_space_can_be_reserved(small_disk, monkeypatch):
    monkeypatch.setattr(_rust, "reserve", make_sparse)
    with no_new_descriptors(), pytest.raises(OutputError, match="No space left on device"):
        open_file(small_disk / "x.npz", LARGE)
    assert list(small_disk.iterdir()) == []


def test_a_resumed_file_needs_no_second_space_where_none_can_be_reserved(small_disk, monkeypatch):
    monkeypatch.setattr(_rust, "reserve", make_sparse)
    dump = small_dump(rows=8000, batch_rows=1000)  # three quarters of the disk
    target = small_disk / "x.npz"
    with open_file(target, dump) as file:
        write_batches(file, dump, dump.first_rows[:7])
    with open_file(target, dump) as file:
        assert file.resumed_rows == 7000
        write_whole_tensors(file, dump)
        write_batches(file, dump, dump.first_rows[7:])
        file.commit()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
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
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert target.read_text() == "old"


def test_a_disk_that_cannot_flush_at_the_end(tmp_path, monkeypatch):
    dump = small_dump()
    target = tmp_path / "x.pt"
    target.write_text("old")
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    monkeypatch.setattr(output_module, "SYNC_INTERVAL", 3600)
    with (
        no_new_descriptors(),
        pytest.raises(OutputError, match=r"cannot write .*: Input/output error") as caught,
    ):
        write_dump(target, dump, overwrite=True)
    assert caught.value.errno == errno.EIO
    assert target.read_text() == "old"


def test_a_disk_that_cannot_flush_on_the_way(tmp_path, monkeypatch):
    dump = small_dump(rows=4000)
    target = tmp_path / "x.pt"
    monkeypatch.setattr(output_module, "SYNC_INTERVAL", 0)
    monkeypatch.setattr(os, "fdatasync", refuse(errno.EIO))
    with no_new_descriptors(), pytest.raises(OutputError, match="Input/output error") as caught:
        write_dump(target, dump)
    assert caught.value.errno == errno.EIO
    assert not target.exists()


def test_a_failed_run_can_be_resumed(tmp_path, monkeypatch):
    dump = small_dump(rows=400)
    target = tmp_path / "x.npz"
    write_span = _rust.write_span

    writes = 0

    def failing_write(*arguments):
        nonlocal writes
        writes += 1
        if writes > 50:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write_span(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(_rust, "write_span", failing_write)
        with pytest.raises(OutputError, match="Input/output error"):
            write_dump(target, dump, threads=1)
    assert not target.exists()
    with open_file(target, dump) as file:
        assert 0 < file.resumed_rows < dump.rows
        write_whole_tensors(file, dump)
        write_batches(file, dump, range(file.resumed_rows, dump.rows, dump.batch_rows))
        file.commit()
    assert target.read_bytes() == write_dump(tmp_path / "other.npz", dump).read_bytes()
