"""The order on disk: no record, mark or name of a thing is there before the thing itself."""

import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from faults.fixtures import fault_library  # noqa: F401
from output_support import SUFFIXES

SCRIPT = """
import sys, time
from pathlib import Path
from dump_activations.storage.writing import journal
from output_support import *
journal.SYNC_INTERVAL = 0
dump = small_dump(rows=8)
with open_file(Path(sys.argv[1]), dump) as file:
    write_batches(file, dump, [0])
    while not file._journal.batches:
        time.sleep(0.001)
    write_batches(file, dump, [4])
    write_whole_tensors(file, dump)
    file.commit()
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_data_then_journal_and_all_of_the_file_then_its_name(fault_library, tmp_path, suffix):  # noqa: F811
    directory = tmp_path / "out"
    directory.mkdir()
    target, log = directory / f"x{suffix}", tmp_path / "log"
    trace = {"LD_PRELOAD": str(fault_library), "TRACE": f"{log}:{directory}"}
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(target)],
        cwd=Path(__file__).parents[1],
        env=os.environ | trace,
        check=True,
    )
    partial, journal, new = (
        f"{target.name}.partial{more}" for more in ("", ".journal", ".journal.new")
    )
    calls = [line.split(" ", 3) for line in log.read_text().splitlines()]
    ordering = {"write", "pwrite", "fsync", "fdatasync", "rename"}
    steps = [(call, Path(path).name) for call, _, _, path in calls if call in ordering]
    # Before them, the file system is tried with a file without a name.
    steps = steps[steps.index(("write", new)) :]
    assert [step for step, _ in groupby(steps)] == [
        ("write", new),
        ("fsync", new),
        ("rename", new),
        ("fsync", "out"),
        ("pwrite", partial),  # spans of the first batches
        ("fdatasync", partial),
        ("write", journal),
        ("fsync", journal),
        ("pwrite", partial),  # the last batch, and the skeleton without its last bytes
        ("fdatasync", partial),
        ("pwrite", partial),  # the last bytes
        ("fsync", partial),
        ("rename", partial),
        ("fsync", "out"),
    ]
    # What a reader looks at first comes last.
    at, length = next((int(at), int(n)) for call, at, n, _ in reversed(calls) if call == "pwrite")
    assert (
        (at, length) == (0, 8) if suffix == ".safetensors" else at + length == target.stat().st_size
    )
