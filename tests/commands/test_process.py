"""What the command changes about its own process."""

import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dump_activations.commands.process import uncollected_imports
from faults.commands import HANG

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


def test_a_reader_that_has_seen_enough_is_told_nothing_more():
    read, write = os.pipe()
    os.close(read)
    call = [sys.executable, "-c", "from dump_activations.commands.dump import run; run()"]
    done = subprocess.run(
        [*call, "--list-outputs"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


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


WAITS = """
import signal
import click
from dump_activations.commands.runner import be_process
@click.command()
def wait():
    print("waiting", flush=True)
    signal.pause()
be_process(wait)
"""


def in_a_shell(script):
    """Start a shell of its own process group that waits in the script's `$wait`."""
    environment = os.environ | {"wait": f"{sys.executable} -c '{WAITS}'"}
    shell = subprocess.Popen(
        ["bash", "-c", script], text=True, stdout=-1, stderr=-1, env=environment, process_group=0
    )
    assert shell.stdout.readline() == "waiting\n"
    return shell


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_ctrl_c_ends_a_shells_loop():
    shell = in_a_shell('for i in 1 2 3; do eval "$wait"; done; echo survived')
    os.killpg(shell.pid, signal.SIGINT)  # as a terminal does
    assert shell.communicate(timeout=60) == ("", "error: interrupted\n")
    assert shell.returncode == -signal.SIGINT


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_a_scheduler_sees_that_a_command_was_terminated():
    shell = in_a_shell('eval "exec $wait" & echo $! >&2; wait $!; echo $?')
    os.kill(int(shell.stderr.readline()), signal.SIGTERM)
    assert shell.communicate(timeout=60) == ("143\n", "error: interrupted\n")


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


CHILD = """
import os, time
from dump_activations.pipeline.interrupts import terminate_with_parent
terminate_with_parent(PARENT)
print("ready", flush=True)
time.sleep(100)
"""
LAUNCHER = """
import os, subprocess, sys
child = [sys.executable, "-c", sys.argv[1]]
started = subprocess.Popen(child, stdout=subprocess.PIPE)
assert started.stdout.readline() == b"ready\\n"
os.kill(os.getpid(), 9)
"""


def test_a_process_ends_with_its_parent():
    command = [sys.executable, "-c", LAUNCHER, CHILD.replace("PARENT", "os.getppid()")]
    # It holds the parent's stderr, so that the end of that is its own end.
    run = subprocess.run(command, stderr=subprocess.PIPE, timeout=HANG, check=False)
    assert (run.returncode, run.stderr) == (-signal.SIGKILL, b"")


def test_a_parent_that_has_ended_already():
    command = [sys.executable, "-c", CHILD.replace("PARENT", "os.getppid() + 1")]
    run = subprocess.run(command, capture_output=True, timeout=HANG, check=False)
    assert (run.returncode, run.stdout) == (-signal.SIGTERM, b"")
