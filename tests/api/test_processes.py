"""Several processes that write one file: byte for byte that of one process, whatever befalls them.

With 20 moments a format, 60 kills and as many interruptions:

    uv run --locked pytest tests/api/test_processes.py --faults 20
"""

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from api.test_faults_kills import PROMPTLY, SYNC_INTERVAL, sha256
from conftest import DEMO_CHECKPOINT, DEMO_DATASET
from faults.groups import Launcher
from reference.datasets import encode_rows, random_boards
from reference.dumps import FORMATS

N = 1500
# 31 MB in 188 batches: about half a second of one process.
ARGUMENTS = [
    *["--demo", f"--n-samples={N}", "--batch-size=8", "--json", "--labels=move_dir", "--stats"],
    "--outputs=layer_outputs,final_hidden,rmsnorm_gammas",
]


@pytest.fixture(scope="module")
def unbroken(server, tmp_path_factory):
    """Return the digest of what one process writes, and the seconds it takes, by its suffix."""
    directory = tmp_path_factory.mktemp("unbroken")

    def run(suffix):
        started = time.monotonic()
        target = directory / f"a{suffix}"
        code, lines = server.run([*ARGUMENTS, f"-o{target}"], directory / "log")
        assert code == 0, lines
        return sha256(target), time.monotonic() - started

    return {suffix: run(suffix) for suffix in FORMATS}


@pytest.fixture
def launcher(server, tmp_path):
    return Launcher(server, tmp_path / "logs")


@pytest.fixture
def directory(tmp_path):
    directory = tmp_path / "output"
    directory.mkdir()
    return directory


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Spread the moments evenly over a run, each drawn from its own part of it."""
    if "moment" in metafunc.fixturenames:
        count = metafunc.config.getoption("--faults")
        draw = random.Random(metafunc.function.__name__)
        moments = [(i + draw.random()) / count for i in range(count)]
        metafunc.parametrize("moment", moments, ids="{:.3f}".format)


def is_whole(target: Path, expected: str) -> None:
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert sha256(target) == expected


def finish(launcher, target, size, expected):
    group = launcher.start([*ARGUMENTS, "--resume", f"-o{target}"], size=size)
    assert group.wait() == [0] * size, group.lines
    is_whole(target, expected)


@pytest.mark.parametrize("order", [[0], [1, 0], [2, 0, 1]], ids=len)
@pytest.mark.parametrize("suffix", FORMATS)
def test_the_bytes_are_those_of_one_process(suffix, order, launcher, unbroken, directory):
    size = len(order)
    target = directory / f"a{suffix}"
    group = launcher.start([*ARGUMENTS, f"-o{target}"], size=size, order=order)
    assert group.wait() == [0] * size, group.lines
    is_whole(target, unbroken[suffix][0])
    # One summary, of all; whoever does not make the file says nothing.
    (line,) = group.lines
    assert line == group.commands[0].lines[-1]
    summary = json.loads(line)
    assert (summary["boards"], summary["processes"]) == (N, size)
    assert sum(summary["boards_by_rank"]) == N
    fewest = min(summary["boards_by_rank"])
    assert summary["boards_by_rank"][summary["slowest_rank"]] == fewest
    assert [command.lines for command in group.commands[1:]] == [[]] * (size - 1)


@pytest.mark.parametrize("suffix", FORMATS)
def test_killed(suffix, moment, launcher, unbroken, directory):
    """One of three is killed, the launcher ends the others; any number of them does the rest."""
    expected, seconds = unbroken[suffix]
    draw = random.Random(f"{suffix} {moment}")
    target = directory / f"a{suffix}"
    group = launcher.start([*ARGUMENTS, f"-o{target}"], size=3, sync_interval=SYNC_INTERVAL)
    time.sleep(moment * seconds)
    killed = draw.randrange(3)
    group.commands[killed].signal(signal.SIGKILL)
    time.sleep(0.1 * draw.random())
    group.signal(signal.SIGTERM)
    codes = group.wait(PROMPTLY)
    assert codes[killed] in {-signal.SIGKILL, 0}
    # Whatever it is that the others say, one of them says it.
    assert len(group.lines) <= 1 or 0 in codes, group.lines
    assert not target.exists() or sha256(target) == expected
    finish(launcher, target, draw.randint(1, 3), expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_interrupted(number, moment, launcher, unbroken, directory):
    draw = random.Random(f"{number} {moment}")
    suffix = draw.choice(FORMATS)
    expected, seconds = unbroken[suffix]
    target = directory / f"a{suffix}"
    target.write_bytes(b"old")
    group = launcher.start([*ARGUMENTS, f"-o{target}"], size=2, sync_interval=SYNC_INTERVAL)
    for command in group.commands:
        command.wait_until(command.log.exists)
    time.sleep(0.05 + moment * seconds)
    group.signal(number)
    codes = group.wait(PROMPTLY)
    assert set(codes) <= {0, 1, -number}
    if target.read_bytes() == b"old":
        (line,) = group.lines
        assert "interrupted" in line
        left = {path.name for path in directory.iterdir()} - {target.name}
        assert left <= {f"{target.name}.partial{end}" for end in ("", ".journal", ".journal.1")}
        assert not left or re.search(rf"\d+ of {N:,} boards are kept in {target}.partial", line)
        finish(launcher, target, 1, expected)
    is_whole(target, expected)


def test_what_the_others_have_done_is_kept(launcher, directory):
    """A process that is killed takes none of their batches with it, nor all of its own."""
    target = directory / "a.safetensors"
    arguments = [*ARGUMENTS, "--n-samples=14000", f"-o{target}"]
    group = launcher.start(arguments, size=3, sync_interval=0)
    journals = [directory / f"a.safetensors.partial.journal{end}" for end in ("", ".1", ".2")]
    for journal, command in zip(journals, group.commands, strict=True):
        command.wait_until(lambda path=journal: path.exists() and path.stat().st_size > 20_000)
    group.commands[2].signal(signal.SIGKILL)
    sizes = [journal.stat().st_size for journal in journals]
    group.signal(signal.SIGTERM)
    group.wait(PROMPTLY)
    (line,) = group.lines
    kept = int(re.search(r"([\d,]+) of 14,000 boards are kept", line)[1].replace(",", ""))
    assert all(
        journal.stat().st_size >= size for journal, size in zip(journals, sizes, strict=True)
    )
    group = launcher.start(arguments, size=1)
    group.commands[0].wait_until(lambda: "going on" in "".join(group.commands[0].lines))
    group.signal(signal.SIGTERM)
    group.wait(PROMPTLY)
    resumed = re.search(r"which has ([\d,]+) of 14,000", "".join(group.commands[0].lines))[1]
    # Whoever said it need not have seen the last batches of all.
    assert 14_000 > int(resumed.replace(",", "")) >= kept > 100


def test_who_is_slow_is_waited_for(launcher, unbroken, directory):
    target = directory / "a.safetensors"
    group = launcher.start([*ARGUMENTS, f"-o{target}"], size=2, sync_interval=0)
    journals = [directory / f"a.safetensors.partial.journal{end}" for end in ("", ".1")]
    for journal, command in zip(journals, group.commands, strict=True):
        command.wait_until(lambda path=journal: path.exists() and path.stat().st_size > 5000)
    group.commands[1].signal(signal.SIGSTOP)
    size = 0
    while size != (size := journals[0].stat().st_size):
        time.sleep(1)  # Until the other one has nothing more to do.
    group.commands[1].signal(signal.SIGCONT)
    assert group.wait() == [0, 0], group.lines
    is_whole(target, unbroken[".safetensors"][0])


def test_started_again_it_goes_on_by_itself(launcher, unbroken, directory):
    """Also where --overwrite is given, which counted when all were started first."""
    target = directory / "a.safetensors"
    arguments = [*ARGUMENTS, "--overwrite", f"-o{target}"]
    group = launcher.start(arguments, size=2, sync_interval=0)
    journal = directory / "a.safetensors.partial.journal.1"
    group.commands[1].wait_until(lambda: journal.exists() and journal.stat().st_size > 5000)
    group.commands[1].signal(signal.SIGKILL)
    group.signal(signal.SIGTERM)
    group.wait(PROMPTLY)
    # On another machine than the one whose process was killed nothing was started again.
    group = launcher.start(arguments, size=2, restarts=[0, 1])
    assert group.wait() == [0, 0], group.lines
    is_whole(target, unbroken[".safetensors"][0])
    assert json.loads(group.lines[-1])["resumed_boards"] > 0
    group = launcher.start(arguments, size=2, restarts=[1, 1])
    assert group.wait() == [0, 0], group.lines
    assert json.loads(group.lines[-1])["boards"] == 0


@pytest.fixture
def other_checkpoint(tmp_path):
    """Return a checkpoint with one other weight."""
    directory = Path(shutil.copytree(DEMO_CHECKPOINT, tmp_path / "other"))
    weights = safetensors.torch.load_file(directory / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    safetensors.torch.save_file(weights, directory / "model.safetensors")
    return directory


def fails(group, codes, pattern):
    """Check that all ended so, and that one of them said why, in one line."""
    assert group.wait(PROMPTLY) == codes, group.lines
    (line,) = group.lines
    assert re.search(pattern, line), line


@pytest.mark.parametrize("rank", [0, 1])
def test_one_without_the_dataset(rank, launcher, directory, tmp_path):
    arguments = [f"--init={DEMO_CHECKPOINT}", "--allow-cpu", f"-o{directory}/a.pt"]
    datasets = {0: [f"--dataset={DEMO_DATASET}"], 1: [f"--dataset={DEMO_DATASET}"]}
    datasets[rank] = [f"--dataset={tmp_path}/none"]
    group = launcher.start(arguments, size=2, of_rank=datasets)
    fails(group, [1, 1], f"{tmp_path}/none: no such directory")
    assert [*directory.iterdir()] == []


def test_one_of_other_work(launcher, directory, other_checkpoint):
    arguments = [f"--dataset={DEMO_DATASET}", "--allow-cpu", f"-o{directory}/a.pt"]
    inits = [
        [f"--init={DEMO_CHECKPOINT}"],
        [f"--init={DEMO_CHECKPOINT}"],
        [f"--init={other_checkpoint}", "--seed=1"],
    ]
    group = launcher.start(arguments, size=3, of_rank=dict(enumerate(inits)))
    fails(group, [1, 1, 1], "rank 2 differs from rank 0 in checkpoint, the weights, --seed$")
    assert [*directory.iterdir()] == []


def test_a_wrong_call_is_said_once(launcher):
    group = launcher.start(["--demo", "--batch-size=0"], size=3)
    fails(group, [2, 2, 2], "--batch-size: must be 1 or more")


def test_a_directory_that_is_not_shared(launcher, directory, tmp_path):
    group = launcher.start(
        ARGUMENTS, size=2, of_rank={0: [f"-o{directory}/a.pt"], 1: [f"-o{tmp_path}/a.pt"]}
    )
    fails(group, [1, 1], f"{tmp_path} is not shared")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("a.pt")]


def test_a_full_disk(launcher, small_disk):
    group = launcher.start([*ARGUMENTS, f"-o{small_disk}/a.pt"], size=2)
    fails(group, [1, 1], "cannot reserve .* No space left")
    assert [*small_disk.iterdir()] == []


def test_what_other_work_left(launcher, directory):
    target = directory / "a.pt"
    group = launcher.start([*ARGUMENTS, f"-o{target}"], size=2, sync_interval=0)
    journal = directory / "a.pt.partial.journal.1"
    group.commands[1].wait_until(lambda: journal.exists() and journal.stat().st_size > 5000)
    group.signal(signal.SIGTERM)
    group.wait(PROMPTLY)
    left = {path: path.read_bytes() for path in directory.iterdir()}
    group = launcher.start([*ARGUMENTS, "--seed=1", f"-o{target}"], size=2)
    fails(group, [1, 1], r"other work, which differs in --seed \(0 there, 1 here\)")
    assert {path: path.read_bytes() for path in directory.iterdir()} == left


def test_exponents_outside_leave_nothing(launcher, directory, tmp_path):
    """The process that finds them need not be the one that made the file."""
    rows = encode_rows(random_boards(2000, seed=1, largest=15), "selfplay_v1")
    rows["exps"][1900, 3] = 30
    np.save(tmp_path / "steps.npy", rows)
    arguments = [
        f"--init={DEMO_CHECKPOINT}",
        f"--dataset={tmp_path}",
        "--steps=:",
        "--batch-size=8",
    ]
    group = launcher.start(
        [*arguments, "--allow-cpu", f"-o{directory}/a.pt"], size=2, sync_interval=0
    )
    fails(group, [1, 1], "step 1900: exponent 30 is outside")
    assert [*directory.iterdir()] == []


def test_nothing_is_written(launcher):
    group = launcher.start([*ARGUMENTS, "--no-write"], size=2)
    assert group.wait() == [0, 0], group.lines
    summary = json.loads(group.lines[-1])
    assert sum(summary["boards_by_rank"]) == N
    assert summary["bytes_written"] == 0
