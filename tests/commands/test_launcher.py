"""Real processes: started by the command itself, or by one torchrun a machine."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from api.test_faults_kills import PROMPTLY, sha256
from dump_activations.commands.dump import main
from dump_activations.commands.failures import Failure, read_failures
from faults.commands import HANG

N = 9000
# Some seconds of one process, if it has a core: more than journals wait for a flush.
ARGUMENTS = [
    *["--demo", f"--n-samples={N}", "--batch-size=8", "--outputs=layer_outputs", "--json"],
    "--dtype=fp16",
]

KEPT = rf"[\d,]+ of {N:,} boards are kept in \S+; the same call again does the rest"

# Threads of one process count for its bytes: each of two is to have one.
CORES = sorted(os.sched_getaffinity(0))[:2]


@pytest.fixture(scope="module")
def expected(server, tmp_path_factory):
    directory = tmp_path_factory.mktemp("unbroken")
    code, lines = server.run([*ARGUMENTS, f"-o{directory}/a.pt"], directory / "log")
    assert code == 0, lines
    return sha256(directory / "a.pt")


def children(pid):
    """Return the processes that a process has started and not yet waited for."""
    with contextlib.suppress(FileNotFoundError):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return []


def is_alive(pid):
    with contextlib.suppress(FileNotFoundError):
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


def told(lines):
    return [line for line in lines if not line.startswith("note: ")]


def launch(server, target, log, *more):
    """Start the command in two processes; return once both have batches on disk."""
    arguments = [*ARGUMENTS, f"-o{target}", "--nproc-per-node=2", *more]
    log.unlink(missing_ok=True)
    command = server.start(arguments, log)
    os.sched_setaffinity(command.pid, CORES)
    journal = Path(f"{target}.partial.journal.1")
    command.wait_until(lambda: f" to {target}; " in "".join(command.lines))
    command.wait_until(lambda: journal.exists() and journal.stat().st_size > 1000)
    return command


def test_interrupted_or_killed_it_keeps_what_is_done(server, expected, tmp_path):
    target, log = tmp_path / "a.pt", tmp_path / "log"
    command = launch(server, target, log)
    started = children(command.pid)
    command.signal(signal.SIGTERM)
    assert command.wait() == -signal.SIGTERM
    (line,) = told(command.lines)
    assert re.fullmatch(rf"error: interrupted; {KEPT}", line)
    assert len(started) == 2
    assert not any(map(is_alive, started))

    command = launch(server, target, log)
    started = children(command.pid)
    os.kill(started[1], signal.SIGKILL)
    assert command.wait() == 1
    (line,) = told(command.lines)
    assert re.fullmatch(rf"error: rank [01] was killed by SIGKILL; {KEPT}", line)
    assert not any(map(is_alive, started))

    command = launch(server, target, log, "--max-restarts=1")
    os.kill(children(command.pid)[1], signal.SIGKILL)
    assert command.wait() == 0, command.lines
    (line,) = told(command.lines)
    assert json.loads(line)["processes"] == 2
    assert sha256(target) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "log"]


def test_an_error_of_one_process_is_the_commands(server, tmp_path):
    (tmp_path / "empty").mkdir()
    arguments = [*ARGUMENTS, "--steps=:", "--where=no_such_field > 1", f"-o{tmp_path}/a.pt"]
    code, lines = server.run([*arguments, "--nproc-per-node=2"], tmp_path / "log")
    (line,) = told(lines)
    assert line.startswith("error: --where: ")
    assert code == server.run(arguments, tmp_path / "log")[0]


@pytest.fixture
def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def torchrun_of_two(endpoint):
    return [
        *["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=a"],
        *[f"--rdzv-endpoint={endpoint}", "-m", "dump_activations"],
    ]


def test_interrupted_while_there_is_no_store(server, free_port, tmp_path):
    """torch tries to connect for minutes."""
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    environment = {name: str(number) for name, number in place.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    command = server.start(ARGUMENTS, tmp_path / "log", environment=environment)
    command.wait_until(lambda: "no CUDA device" in "".join(command.lines))
    time.sleep(1)
    command.signal(signal.SIGTERM)
    assert command.wait(PROMPTLY) == -signal.SIGTERM
    assert told(command.lines) == ["error: interrupted"]


def test_two_launchers_as_two_machines(server, free_port, tmp_path):
    run = [*ARGUMENTS, "--n-samples=500"]
    code, lines = server.run([*run, f"-o{tmp_path}/one.pt"], tmp_path / "log")
    assert code == 0, lines
    arguments = [*torchrun_of_two(f"localhost:{free_port}"), *run, f"-o{tmp_path}/a.pt"]
    commands = [
        server.start(arguments, tmp_path / f"log-{i}", command="torchrun") for i in range(2)
    ]
    assert [command.wait() for command in commands] == [0, 0], [c.lines for c in commands]
    # No machine is the first before they have met.
    (line,) = (line for c in commands for line in c.lines if line.startswith("{"))
    assert json.loads(line)["processes"] == 2
    assert sha256(tmp_path / "a.pt") == sha256(tmp_path / "one.pt")


@pytest.fixture
def namespaces(request):
    """Return two network namespaces, each with its address, that are joined by a cable."""
    if request.config.getoption("--faults") == 1:
        pytest.skip("takes long: with --faults 2 or more")
    names = [f"dump{os.getpid()}-{i}" for i in range(2)]
    addresses = ["10.211.55.1", "10.211.55.2"]
    ends = [f"veth{os.getpid()}{end}" for end in "ab"]
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add {ends[0]} type veth peer name {ends[1]}",
    ]
    for name, end, address in zip(names, ends, addresses, strict=True):
        commands += [
            f"ip link set {end} netns {name}",
            f"ip -n {name} addr add {address}/24 dev {end}",
            f"ip -n {name} link set {end} up",
            f"ip -n {name} link set lo up",
        ]
    try:
        for command in commands:
            try:
                done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            except FileNotFoundError:
                pytest.skip("no ip command here")
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        yield dict(zip(names, addresses, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_machines_of_a_network(namespaces, expected, tmp_path):
    first = next(iter(namespaces.values()))
    started = []
    for i, (name, address) in enumerate(namespaces.items()):
        of_torchrun = [f"--local-addr={address}", f"--rdzv-conf=is_host={1 - i}"]
        with (tmp_path / f"log-{i}").open("w") as log:
            command = [
                *["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"],
                *of_torchrun,
                *torchrun_of_two(f"{first}:29400"),
                *[*ARGUMENTS, f"-o{tmp_path}/a.pt"],
            ]
            started.append(subprocess.Popen(command, stdout=log, stderr=log))
    logs = [tmp_path / f"log-{i}" for i in range(2)]
    try:
        assert [process.wait(HANG) for process in started] == [0, 0], [p.read_text() for p in logs]
    finally:
        for process in started:
            process.kill()
    assert sha256(tmp_path / "a.pt") == expected


@pytest.mark.parametrize("number", ["", "0", "-1", "two", "1.5"])
def test_a_number_of_processes_that_is_none(number, capsys):
    assert main(["--demo", f"--nproc-per-node={number}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --nproc-per-node: '{number}' is no number")


def failed(directory, restarts, when, rank, failure):
    (directory / f"{restarts}-{when}-{rank}").write_text(json.dumps(vars(failure)))


def test_which_failure_is_told(tmp_path):
    """Of the processes that were started last, the first that failed."""
    peer = Failure(1, "rank 1 failed", "rank 1 failed")
    reason = Failure(2, "no", "no; kept")
    failed(tmp_path, 0, "first", 0, Failure(1, "old", "old"))
    failed(tmp_path, 10, "later", 0, peer)
    failed(tmp_path, 10, "first", 1, reason)
    (tmp_path / "10-later-2").write_text('{"code": 1, "te')
    assert read_failures(tmp_path) == [reason, peer]
    assert reason.notes == "kept"


@pytest.mark.parametrize("code", [1, -signal.SIGINT])
@pytest.mark.parametrize("local_rank", [0, 1])
def test_torch_is_not_there_to_say_why(local_rank, code):
    """As where its import is broken, or was interrupted: it cannot be imported again then."""
    place = {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    environment = {name: str(number) for name, number in place.items()}
    program = (
        "import sys; sys.modules['torch'] = None;"
        "from dump_activations.commands.failures import Failure, is_to_say;"
        f"print(is_to_say(Failure({code}, 'no', 'no')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (f"{local_rank == 0}\n", "")
