"""What the command changes about its own process."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dump_activations.commands.process import uncollected_imports

FAULTS = """
import resource
from dump_activations.commands.process import keep_freed_memory
PREPARE
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use_and_free():
    blocks = [bytearray(b"x") * (8 << 20) for _ in range(6)]
use_and_free()
before = faults()
for _ in range(10):
    use_and_free()
print((faults() - before) * resource.getpagesize() // (8 << 20))
"""


def blocks_faulted_in(prepare):
    script = FAULTS.replace("PREPARE", prepare)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_used_again():
    assert blocks_faulted_in("keep_freed_memory()") <= 2
    assert blocks_faulted_in("") >= 30


def test_what_is_imported_is_left_to_itself_and_nothing_else():
    try:
        with uncollected_imports():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_the_collector_is_back_after_a_failed_import():
    try:
        with pytest.raises(ImportError), uncollected_imports():
            raise ImportError
        assert gc.isenabled()
    finally:
        gc.unfreeze()


LEAVES = """
import atexit, sys
from dump_activations.commands.process import leave
atexit.register(print, "at exit", end=" ")
sys.stdout.write("written ")
sys.stderr.write("to both")
leave(3)
"""


def test_leaving_runs_what_is_registered_and_loses_no_output():
    run = subprocess.run(
        [sys.executable, "-c", LEAVES], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (3, "written at exit ", "to both")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_is_lost_on_leaving_shows():
    script = "from dump_activations.commands.process import leave; print('lost'); leave(0)"
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [sys.executable, "-c", script],
            stdout=full,
            stderr=subprocess.PIPE,
            env=buffered,
            check=False,
        )
    assert run.returncode == 120  # Python's own
    assert b"No space left" in run.stderr


def test_leaving_takes_nothing_apart():
    script = """
from dump_activations.commands.process import leave
class Large:
    def __del__(self):
        print("taken apart")
large = Large()
leave(0)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == ""
