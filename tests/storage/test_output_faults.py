"""Faults of a machine while a file is written: a full, broken or forbidden disk, a quota."""

import errno
import os
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


@pytest.fixture
def mounted(request, tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "mount"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", request.param, "none", str(directory)]
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


@pytest.mark.parametrize("mounted", ["size=1m"], indirect=True)
def test_the_space_of_a_partial_file_counts_where_none_can_be_reserved(mounted, monkeypatch):
    monkeypatch.setattr(_rust, "reserve", lambda fd, size: bool(os.ftruncate(fd, size)))
    dump = small_dump(rows=8000, batch_rows=1000)  # three quarters of the disk
    target = mounted / "x.npz"
    with pytest.raises(OutputError, match=r"cannot reserve 2,000,000 .*No space left on device"):
        check_space([target], 2_000_000)
    interrupt(target, dump, dump.first_rows[:7])
    check_space([target], 793_600)
    with open_file(target, dump) as file:
        assert file.resumed_rows == 7000
        finish(file, dump)


@pytest.mark.parametrize("mounted", ["ro"], indirect=True)
def test_a_read_only_disk(mounted):
    with no_new_descriptors(), pytest.raises(OutputError, match="choose another output"):
        open_file(mounted / "x.pt", DUMP)


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
