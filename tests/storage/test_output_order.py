"""In which order a file comes to disk: at no moment is a record of it there before the thing."""

import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from faults.fixtures import fault_library  # noqa: F401
from output_support import SUFFIXES

SCRIPT = """
import sys
from pathlib import Path
from output_support import small_dump, write_dump
write_dump(Path(sys.argv[1]), small_dump(rows=4))
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
    assert [step for step, _ in groupby(steps)] == [
        ("write", new),
        ("fsync", new),
        ("rename", new),
        ("fsync", "out"),
        ("pwrite", partial),  # spans
        ("fdatasync", partial),
        ("write", journal),
        ("fsync", journal),
        ("pwrite", partial),  # the skeleton
        ("fsync", partial),
        ("rename", partial),
        ("fsync", "out"),
    ]
    # What a reader looks at first comes last.
    at, length = next((int(at), int(n)) for call, at, n, _ in reversed(calls) if call == "pwrite")
    assert (
        (at, length) == (0, 8) if suffix == ".safetensors" else at + length == target.stat().st_size
    )
