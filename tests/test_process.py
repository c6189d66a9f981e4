"""What the command changes about its own process."""

import gc
import subprocess
import sys

import pytest

from dump_activations.process import uncollected_imports

FAULTS = """
import resource
from dump_activations.process import keep_freed_memory
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
