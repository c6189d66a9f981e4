"""The processes of a command: memory, imports, signals, exit codes, last output, a launcher."""

import gc
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from dump_activations import Summary, demo
from dump_activations.commands.console import mode
from dump_activations.commands.dump import main
from dump_activations.commands.process import uncollected_imports
from dump_activations.storage.writing.shards import Place
from faults.commands import HANG


def run_script(script, *, check=True, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    call = [sys.executable, "-c", script]
    return subprocess.run(call, check=check, timeout=HANG, **options)


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


def test_freed_memory_is_used_again():
    assert int(run_script(FAULTS.replace("PREPARE", "keep_freed_memory()")).stdout) <= 2
    assert int(run_script(FAULTS.replace("PREPARE", "")).stdout) >= 30


def test_imports_are_not_collected_and_the_collector_returns_after_an_error():
    try:
        with suppress(ImportError), uncollected_imports():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


EARLY = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == "MODULE":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.NUMBER)
from dump_activations.__main__ import run_dump
sys.meta_path.insert(0, Interrupt())
sys.argv = ["dump-activations", "--demo", "--device=cpu", "--no-write"]
run_dump()
"""


@pytest.mark.parametrize(
    ("module", "number"),
    [
        *(("dump_activations.commands", "SIGINT"), ("click", "SIGINT"), ("numpy", "SIGTERM")),
        *(("dump_activations.pipeline.options", "SIGINT"), ("torch", "SIGINT")),
        ("torch", "SIGTERM"),
    ],
)
def test_a_signal_in_the_first_second_is_one_line(module, number):
    script = EARLY.replace("MODULE", module).replace("NUMBER", number)
    done = run_script(script, check=False)
    lines = [line for line in done.stderr.splitlines() if " progress: " not in line]
    assert (done.returncode, done.stdout) == (-signal.Signals[number], "")
    assert lines == ["error: interrupted"]


LEAVES = """
import atexit, sys
from dump_activations.commands.process import leave
class Large:
    def __del__(self):
        print("freed")
large = Large()
atexit.register(print, "at exit", end=" ")
sys.stdout.write("written ")
sys.stderr.write("to both")
leave(3)
"""


def test_leaving_runs_exit_functions_loses_no_output_and_frees_nothing():
    run = run_script(LEAVES, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (3, "written at exit ", "to both")


def test_a_reader_that_closed_stdout_gets_no_error():
    read, write = os.pipe()
    os.close(read)
    call = [sys.executable, "-m", "dump_activations", "--list-outputs"]
    done = subprocess.run(call, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, b"")


def test_output_that_is_lost_on_leaving_is_one_line():
    script = "from dump_activations.commands.process import leave; print('lost'); leave(0)"
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        run = run_script(script, check=False, stdout=full, env=buffered)
    assert (run.returncode, run.stderr) == (
        *(1, "error: cannot write to stdout: No space left on device\n"),
    )


WAITS = """
import signal
import click
from dump_activations.commands.process import leave, run_command
@click.command()
def wait():
    print("waiting", flush=True)
    signal.pause()
leave(run_command(wait, None))
"""


def in_a_shell(script):
    """Start a shell of its own process group that waits in the script's `$wait`."""
    environment = os.environ | {"wait": f"{sys.executable} -c '{WAITS}'"}
    shell = subprocess.Popen(
        ["bash", "-c", script], text=True, stdout=-1, stderr=-1, env=environment, process_group=0
    )
    assert shell.stdout.readline() == "waiting\n"
    return shell


def test_ctrl_c_ends_a_shells_loop():
    shell = in_a_shell('for i in 1 2 3; do eval "$wait"; done; echo survived')
    os.killpg(shell.pid, signal.SIGINT)  # As a terminal does.
    assert shell.communicate(timeout=60) == ("", "error: interrupted\n")
    assert shell.returncode == -signal.SIGINT


def test_a_scheduler_sees_that_a_command_was_terminated():
    shell = in_a_shell('eval "exec $wait" & echo $! >&2; wait $!; echo $?')
    os.kill(int(shell.stderr.readline()), signal.SIGTERM)
    assert shell.communicate(timeout=60) == ("143\n", "error: interrupted\n")


ORPHAN = """
import os, time
from dump_activations.interrupts import terminate_with_parent
terminate_with_parent(os.getppid() + 1)
time.sleep(100)
"""


def test_a_process_whose_parent_has_ended_ends_at_once():
    assert run_script(ORPHAN, check=False).returncode == -signal.SIGTERM


# --- `--nproc-per-node`: processes end together, and never outlive their launcher.

TWO = [sys.executable, "-m", "dump_activations", "--demo", "--nproc-per-node=2"]


@pytest.fixture
def endless(tmp_path):
    """Start two processes with hours of work; return the launcher and their process ids.

    Both are loading torch: Python itself ends in other ways where a signal meets its own start.
    """
    call = [*TWO, "--n-samples=100000000", "--batch-size=64", "--no-write"]
    launcher = subprocess.Popen(call, stdout=-1, stderr=-1, text=True, cwd=tmp_path)
    listing = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    while len(children := listing.read_text().split()) < 2:
        assert launcher.poll() is None
        time.sleep(0.01)
    while any("libtorch_cpu" not in Path(f"/proc/{child}/maps").read_text() for child in children):
        time.sleep(0.01)
    return launcher, [*map(int, children)]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda each: each.name
)
def test_processes_end_with_their_launcher(number, endless):
    launcher, _ = endless
    launcher.send_signal(number)
    _, shown = launcher.communicate(timeout=HANG)  # Both streams end with the last process.
    assert launcher.returncode == -number
    assert "was ended by signal" not in shown


def test_the_first_error_ends_the_other_process_and_is_the_launchers(endless):
    launcher, children = endless
    os.kill(children[1], signal.SIGKILL)
    _, shown = launcher.communicate(timeout=HANG)
    assert launcher.returncode == -signal.SIGKILL
    assert "error: process 1 was ended by signal 9\n" in shown
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.parametrize(("asked", "device"), [([], "cuda:1"), (["--device", "cuda:0"], "cuda:0")])
def test_a_process_takes_the_device_and_the_cores_of_its_place(
    monkeypatch, tmp_path, asked, device
):
    """Ranks count through all machines, and devices through one."""
    taken = {}

    def dumped(*arguments, place, local_processes):
        taken["device"], taken["place"] = arguments[3].device, place
        return Summary()

    monkeypatch.setattr("dump_activations.api.dump.dump_to_file", dumped)
    names = "dump_activations.pipeline.device."
    monkeypatch.setattr(f"{names}share_cores", partial(taken.__setitem__, "cores of"))
    monkeypatch.setattr(f"{names}lack_of_cuda", lambda: "")
    monkeypatch.chdir(tmp_path)
    for name in ("quiet", "speaker"):  # The others of several processes are quiet.
        monkeypatch.setattr(mode, name, getattr(mode, name))
    places = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, number in places.items():
        monkeypatch.setenv(name, number)
    assert main(["--init", str(demo.CHECKPOINT), "--dataset", str(demo.DATASET), *asked]) == 0
    assert taken == {"device": device, "place": Place(3, 4), "cores of": 2}
