"""Habits of network mounts: each dump is interrupted, resumed and finished as on any disk."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from output_support import small_dump, write_dump

SCRIPT = """
import sys
from pathlib import Path
from dump_activations.storage.writing.paths import check_output, check_space
from output_support import *

target, step = Path(sys.argv[1]), sys.argv[2]
dump = small_dump()
check_output(target, ["float32"])
check_space([target], 10_000)
if step == "begin":
    with open_file(target, dump) as file:
        write_batches(file, dump, [0, 4])
else:
    with open_file(target, dump) as file:
        assert file.resumed_rows == 8, file.restarted_because
        write_whole_tensors(file, dump)
        write_batches(file, dump, missing_rows(file))
        file.commit()
"""

HABITS = {
    "fixed owner": {"MOUNT_OWNER": "65534"},
    "fixed mode": {"MOUNT_MODE": "0777"},
    **{
        f"chmod {errno.errorcode[number]}": {"MOUNT_CHMOD": str(number)}
        for number in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)
    },
    "inodes": {"MOUNT_INODES": "1"},
    "no size": {"MOUNT_STATFS": "zero"},
    "no statfs": {"MOUNT_STATFS": str(errno.ENOSYS)},
    "no locks": {"MOUNT_FLOCK": "524"},
}


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler: the habits of mounts cannot be shown")
    library = tmp_path_factory.mktemp("mount") / "mount.so"
    source = Path(__file__).parents[1] / "faults" / "mount.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.mark.parametrize("habit", HABITS.values(), ids=HABITS)
def test_a_dump_is_interrupted_and_finished(library, tmp_path, habit):
    mount = tmp_path / "mount"
    mount.mkdir()
    target = mount / "x.safetensors"

    def run(step: str) -> None:
        subprocess.run(
            [sys.executable, "-c", SCRIPT, str(target), step],
            cwd=Path(__file__).parents[1],
            env=os.environ | habit | {"LD_PRELOAD": str(library), "MOUNT": str(mount)},
            check=True,
        )

    run("begin")
    if "MOUNT_FLOCK" in habit:  # A journal of this minute is not taken over without locks.
        os.utime(mount / "x.safetensors.partial.journal", (0, 0))
    run("finish")
    assert [path.name for path in mount.iterdir()] == [target.name]
    other = write_dump(tmp_path / "other.safetensors", small_dump())
    assert target.read_bytes() == other.read_bytes()


def test_new_files_get_the_mode_of_any_new_file(tmp_path):
    for umask in (0o022, 0o077, 0o002):
        before = os.umask(umask)
        try:
            write_dump(tmp_path / f"{umask}.npz", small_dump())
        finally:
            os.umask(before)
        assert (tmp_path / f"{umask}.npz").stat().st_mode & 0o777 == 0o666 & ~umask
