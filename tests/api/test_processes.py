"""Several processes that write the shards of one dump, through kills, failures and signals.

With 20 moments per format, 60 kills and as many interruptions:

    uv run --locked pytest tests/api/test_processes.py --faults 20
"""

import errno
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from api.test_faults_kills import SYNC_INTERVAL, sha256
from dump_activations import demo, dump, load_encoder
from dump_activations.api.dump import dump_to_file
from dump_activations.pipeline.options import DumpOptions
from dump_activations.storage.writing.shards import Place
from faults.groups import place, start_group, without_notes
from reference.dumps import FORMATS

N = 600
# 12 MB in 75 batches, cut into 13 shards. Statistics, labels and whole tensors are in each.
ARGUMENTS = [
    *["--demo", f"--n-samples={N}", "--batch-size=8", "--json", "--labels=move_dir", "--stats"],
    *["--outputs=layer_outputs,final_hidden,rmsnorm_gammas", "--shard-size=1MB"],
]
# One format has a tensor per layer.
MORE = {".safetensors": [], ".pt": ["--split-layers"], ".npz": ["--dtype=fp16"]}


class Runs:
    """Starts runs of one output, and knows the files of one undisturbed process."""

    def __init__(self, server, root, suffix, *more):
        self.server, self.root, self.suffix = server, root, suffix
        self.arguments = [*ARGUMENTS, *MORE[suffix], *more]
        self.directory = root / "output"
        started = time.monotonic()
        code, lines = self.run(f"-o{root}/one/a{suffix}")
        assert code == 0, lines
        self.seconds = time.monotonic() - started
        self.expected = digests(root / "one")

    def run(self, *more, **options):
        """Run one process to its end; return its exit code and what it printed but notes."""
        code, lines = self.server.run([*self.arguments, *more], self.root / "log", **options)
        return code, without_notes(lines)

    def start(self, size, **options):
        arguments = [*self.arguments, f"-o{self.target}"]
        return start_group(self.server, arguments, self.root / "logs", size=size, **options)

    @property
    def target(self):
        return self.directory / f"a{self.suffix}"

    def finish(self):
        code, lines = self.run(f"-o{self.target}")
        assert code == 0, lines
        self.is_whole()
        return json.loads(lines[-1])

    def is_whole(self):
        """Check that the shards are there and nothing else, and that no process is left."""
        assert digests(self.directory) == self.expected
        assert processes_of(self.directory) == []

    def is_part(self):
        """Check that every shard that has its name is whole."""
        finished = {n: d for n, d in digests(self.directory).items() if "partial" not in n}
        assert finished.items() <= self.expected.items()


def digests(directory: Path) -> dict[str, str]:
    paths = directory.iterdir() if directory.exists() else ()
    return {path.name: sha256(path) for path in paths if path.exists()}


def processes_of(directory: Path) -> list[str]:
    """List the commands that name a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:  # it ended
            continue
    return [text for text in found if str(directory) in text]


@pytest.fixture(scope="module")
def known(server, tmp_path_factory):
    """Return what makes the runs of a format, whose expected files are computed once."""
    made = {}

    def of(suffix, *more):
        key = (suffix, *more)
        if key not in made:
            made[key] = Runs(server, tmp_path_factory.mktemp("runs"), suffix, *more)
        return made[key]

    return of


@pytest.fixture
def runs(known, tmp_path):
    """Return the runs of a format, with an output directory of the test's own."""

    def of(suffix, *more):
        found = known(suffix, *more)
        found.directory = tmp_path / "output"
        return found

    return of


# --- However the processes are started, the shards are the same bytes.


@pytest.mark.parametrize(
    ("suffix", "size"), [(".safetensors", 1), (".safetensors", 2), (".pt", 3), (".npz", 3)]
)
def test_started_together(suffix, size, runs):
    run = runs(suffix)
    group = run.start(size)
    assert group.wait() == [0] * size, group.lines
    run.is_whole()
    # The first process speaks for all.
    (line,) = group.lines
    summary = json.loads(line)
    assert summary["shards_written"] + summary["shards_found"] == len(run.expected)
    assert [command.lines for command in group.commands[1:]] == [[]] * (size - 1)


def test_started_by_hand_each_batch_is_computed_once(runs):
    run = runs(".safetensors")
    commands = [
        run.server.start([*run.arguments, f"-o{run.target}"], run.directory.with_name(name))
        for name in ("first", "second")
    ]
    assert [command.wait() for command in commands] == [0, 0]
    run.is_whole()
    summaries = [json.loads(command.lines[-1]) for command in commands]
    assert sum(each["boards"] for each in summaries) == N
    assert sum(each["shards_written"] for each in summaries) == len(run.expected)


def test_started_one_after_another(runs):
    run = runs(".pt")
    for shards in ("3-9", "12", "1-13"):
        code, lines = run.run(f"-o{run.target}", f"--shards={shards}")
        assert code == 0, lines
        run.is_part()
    run.is_whole()
    before = {path: path.stat() for path in run.directory.iterdir()}
    summary = run.finish()
    assert (summary["boards"], summary["resumed_boards"]) == (0, N)
    assert {path: path.stat() for path in run.directory.iterdir()} == before


@pytest.mark.parametrize("launcher", ["own", "torchrun"])
def test_started_by_a_launcher(launcher, runs):
    run = runs(".npz")
    arguments = [*run.arguments, f"-o{run.target}"]
    log = run.directory.with_name("log")
    two_cores = {"cores": 2}  # one thread per process, as in the other runs
    if launcher == "own":
        code, lines = run.server.run([*arguments, "--nproc-per-node=2"], log, **two_cores)
    else:
        of_torchrun = ["--standalone", "--nproc-per-node=2", "-m", "dump_activations"]
        code, lines = run.server.run([*of_torchrun, *arguments], log, command="torchrun")
    assert code == 0, lines
    run.is_whole()
    assert sum(line.startswith("{") for line in without_notes(lines)) == 1


def test_a_call_from_python_takes_no_place_from_a_launcher(tmp_path, monkeypatch):
    """`if rank == 0: dump(...)` in a training script waits for nobody."""
    for name, value in (place(0, 4) | {"MASTER_ADDR": "none", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    model = load_encoder(demo.CHECKPOINT)
    options = {"n_samples": 20, "batch_size": 4, "device": "cpu", "allow_cpu": True}
    summary = dump(model, demo.DATASET, tmp_path / "a.pt", **options)
    assert summary.boards == 20
    assert os.listdir(tmp_path) == ["a.pt"]  # noqa: PTH208


# --- Processes that die, fail or are interrupted.


@pytest.mark.parametrize("suffix", FORMATS)
def test_killed(suffix, moment_of_run, runs, tmp_path):
    """Some of three processes are killed. The survivors finish, or else a later call does."""
    chance = random.Random(f"{suffix} {moment_of_run}")
    run = runs(suffix, *chance.choice([[], ["--shard-size=4MB"]]))
    group = run.start(3, sync_interval=SYNC_INTERVAL)
    killed = chance.sample(range(3), chance.randint(1, 3))
    time.sleep(moment_of_run * run.seconds)
    for rank in killed:
        group.commands[rank].signal(signal.SIGKILL)
        time.sleep(0.05 * chance.random())
    codes = group.wait()
    assert {codes[rank] for rank in killed} <= {-signal.SIGKILL, 0}
    assert {codes[rank] for rank in range(3) if rank not in killed} <= {0}, group.lines
    run.is_part()
    if len(killed) < 3:
        run.is_whole()
    run.finish()


def test_a_killed_process_loses_no_more_than_its_last_batches(runs):
    boards = 5 * N  # A process that has ended before it is killed shows nothing.
    run = runs(".safetensors", "--shard-size=100MB", f"--n-samples={boards}")
    command = run.start(1, sync_interval=0).commands[0]
    (journal,) = [run.directory / f"{name}.partial.journal" for name in run.expected]
    command.wait_until(lambda: journal.exists() and journal.stat().st_size > 10_000)
    command.signal(signal.SIGKILL)
    command.wait()
    summary = run.finish()
    assert summary["resumed_boards"] > 20
    assert summary["boards"] == boards - summary["resumed_boards"]


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def test_one_fails_and_the_others_finish(reason, runs):
    run = runs(".safetensors", f"--n-samples={4 * N}")  # so that each has boards to write
    fault = {"FAULT": f"pwrite:4:{reason}:{run.directory}/"}
    group = run.start(3, of_rank={2: fault}, sync_interval=0)
    assert group.wait() == [0, 0, 1], group.lines
    _, line = group.lines
    assert line.startswith("error: rank 2: ")
    assert os.strerror(reason) in line
    assert str(run.target.with_suffix("")) in line
    run.is_whole()


def test_a_signal_to_the_launcher_ends_all(runs):
    """Other signals: tests/commands/test_process.py."""
    run = runs(".safetensors", "--n-samples=1500", "--shard-size=15MB")
    arguments = [*run.arguments, f"-o{run.target}", "--nproc-per-node=2"]
    launcher = run.server.start(arguments, run.directory.with_name("log"), cores=2)
    launcher.wait_until(lambda: len([*run.directory.glob("*.journal")]) == 2)
    launcher.signal(signal.SIGTERM)
    assert launcher.wait() == -signal.SIGTERM
    assert processes_of(run.directory) == []
    lines = without_notes(launcher.lines)
    assert 1 <= len(lines) <= 2
    assert all("interrupted" in line for line in lines), lines
    run.is_part()
    run.finish()


def test_the_launchers_exit_code_is_the_first_errors(server, tmp_path):
    arguments = ["--demo", "--layers=9", "--nproc-per-node=2", f"-o{tmp_path}/out/a.pt"]
    code, lines = server.run(arguments, tmp_path / "log")
    assert code == 2, lines
    assert any("no layer 9" in line for line in lines), lines
    assert not re.search("Traceback", "\n".join(lines))
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_who_is_slow_is_waited_for_by_name(runs):
    run = runs(".safetensors")
    group = run.start(1, sync_interval=0)
    slow = group.commands[0]
    slow.wait_until(lambda: [*run.directory.glob("*.partial.journal")])
    slow.signal(signal.SIGSTOP)
    held = next(run.directory.glob("*.partial")).name.removesuffix(".partial")
    log = run.directory.with_name("log")
    waits = run.server.start([*run.arguments, f"-o{run.target}"], log, first_note=0)
    note = f"waiting for {held} (host {os.uname().nodename}, process {slow.pid})"
    waits.wait_until(lambda: json.dumps({"note": note}) in waits.lines)
    slow.signal(signal.SIGCONT)
    assert [waits.wait(), *group.wait()] == [0, 0]
    run.is_whole()


def test_without_writing_the_batches_are_split_by_rank(tmp_path):
    options = DumpOptions(n_samples=50, batch_size=8, device="cpu", allow_cpu=True, write=False)
    boards = [
        dump_to_file(demo.CHECKPOINT, demo.DATASET, tmp_path, options, place=Place(rank, 3)).boards
        for rank in range(3)
    ]
    assert boards == [16, 16, 18]  # of 7 batches, the last of which has 2 boards
    assert list(tmp_path.iterdir()) == []
