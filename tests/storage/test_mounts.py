"""Habits of network mounts: each dump is interrupted, resumed and finished as on any disk.

A mount that cannot hold a dump is named before any board is computed.
"""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dump_activations.storage.writing.paths import check_output
from output_support import make_dump, names_in

# Large enough to be written past the page cache.
DUMP = make_dump(
    {"hidden": ("float32", (4, 200_000)), "boards": ("uint8", (4, 16))},
    batched=["hidden", "boards"],
    batch_rows=1,
)
SCRIPT = """
import os, sys
from pathlib import Path
from dump_activations.storage.writing.paths import check_output, check_space
from output_support import *
from storage.test_mounts import DUMP

target, other = map(Path, sys.argv[1:])
check_output(target, ["float32"])
check_space([target], 10_000)
interrupt(target, DUMP, [0, 1])
if "MOUNT_FLOCK" in os.environ:  # A journal of this minute is not taken over without locks.
    os.utime(f"{target}.partial.journal", (0, 0))
with open_file(target, DUMP) as file:
    assert file.resumed_rows == 2, file.restarted_because
    finish(file, DUMP)
assert target.read_bytes() == write_dump(other, DUMP).read_bytes()
check_output(target, ["float32"])
assert not open_output(target, DUMP).missing
write_dump(target, small_dump(), overwrite=True)
assert target.read_bytes() == write_dump(other, small_dump(), overwrite=True).read_bytes()
"""

NUMBERS = {
    "MOUNT_CHMOD": (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP),
    "MOUNT_FLOCK": (524, errno.EBADF, errno.EIO, errno.ENOSYS),
    "MOUNT_STATFS": (errno.ENOSYS, errno.EIO),
    "MOUNT_RESERVE": (errno.ENOSYS, errno.EINVAL, errno.EPERM),
    "MOUNT_DIRECT": (errno.EINVAL, errno.EOPNOTSUPP, errno.EIO),
    "MOUNT_DIRSYNC": (errno.EINVAL, errno.EBADF, errno.EIO, errno.ENOSYS),
}
HABITS = [
    {"MOUNT_OWNER": "65534"},
    {"MOUNT_MODE": "0777"},
    {"MOUNT_MODE": "0444"},
    {"MOUNT_INODES": "1"},
    {"MOUNT_STATFS": "zero"},
    *({name: str(number)} for name, numbers in NUMBERS.items() for number in numbers),
]
UNFIT = [
    ({"MOUNT_PWRITE": "ignored"}, "write at an offset (it appends)"),
    ({"MOUNT_PWRITE": str(errno.EOPNOTSUPP)}, "write at an offset (Operation not supported)"),
    ({"MOUNT_FSYNC": str(errno.ENOSYS)}, "flush a file to disk (Function not implemented)"),
    ({"MOUNT_FSYNC": str(errno.EINVAL)}, "flush a file to disk (Invalid argument)"),
    ({"MOUNT_RENAME": str(errno.ENOSYS)}, "rename a file (Function not implemented)"),
]


def name_of(habit: object) -> str:
    return " ".join(map("=".join, habit.items())) if isinstance(habit, dict) else ""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler: the habits of mounts cannot be shown")
    library = tmp_path_factory.mktemp("mount") / "mount.so"
    source = Path(__file__).parents[1] / "faults" / "mount.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture
def run(library, tmp_path):
    """Return what runs a script in a process that sees a habit in `tmp_path / "mount"`."""
    (tmp_path / "mount").mkdir()

    def run(habit: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
        preload = {"LD_PRELOAD": str(library), "MOUNT": str(tmp_path / "mount")}
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=Path(__file__).parents[1],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            | habit
            | preload,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize("habit", HABITS, ids=name_of)
def test_a_dump_is_interrupted_finished_and_replaced(run, tmp_path, habit):
    target = tmp_path / "mount" / "x.safetensors"
    result = run(habit, "-c", SCRIPT, target, tmp_path / "other.safetensors")
    assert result.returncode == 0, result.stderr
    assert names_in(target.parent) == [target.name]


@pytest.mark.parametrize(("habit", "lack"), UNFIT, ids=name_of)
def test_a_mount_that_cannot_hold_a_dump_is_named_before_any_board(run, tmp_path, habit, lack):
    target = tmp_path / "mount" / "x.safetensors"
    result = run(habit, "-c", SCRIPT, target, tmp_path / "other.safetensors")
    line = (
        f"{target.parent} cannot hold a dump, because its file system cannot {lack}; choose an "
        "output on another disk, and copy the finished file"
    )
    assert result.stderr.splitlines()[-1].endswith(f"OutputError: {line}")
    assert names_in(target.parent) == []


@pytest.mark.parametrize("limit", [0, OSError(errno.ENOSYS, "not here")], ids=["zero", "none"])
def test_a_mount_without_a_limit_on_names(tmp_path, monkeypatch, limit):
    def pathconf(*_):
        if limit:
            raise limit
        return 0

    monkeypatch.setattr(os, "pathconf", pathconf)
    check_output(tmp_path / "x.pt", [])
