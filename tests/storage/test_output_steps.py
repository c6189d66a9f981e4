"""The steps in which several processes write one file: whose pages, in which order, and killed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations, groupby
from pathlib import Path

import pytest

from faults.fixtures import fault_library  # noqa: F401
from output_support import SUFFIXES

PAGE = 4096

# Rows, rows a batch, batches a ticket.
SETTINGS = [(1200, 7, 60), (1501, 128, 3), (900, 111, 1), (64, 3, 2)]

# Three processes write a file for each of the settings; each traces to LOG.SETTING.RANK.
GROUPS = f"""
import os, sys
from pathlib import Path
from output_support import *

directory, log, suffix = Path(sys.argv[1]), *sys.argv[2:]
for number, (rows, batch_rows, per_ticket) in enumerate({SETTINGS}):
    dump = small_dump(rows, batch_rows)
    batches = len(dump.first_rows)
    target = directory / f"x{{number}}{{suffix}}"

    def begin(rank):
        os.environ["TRACE"] = f"{{log}}.{{number}}.{{rank}}:{{directory}}"
        if rank:
            return join_file(target, dump, first, rank)
        return open_file(target, dump, shared=True)

    def share(file, rank):
        for start in range(rank * per_ticket, batches, 3 * per_ticket):
            write_ticket(file, dump, range(start, min(start + per_ticket, batches)))

    first = begin(0)
    pids = []
    for rank in (1, 2):
        if not (pid := os.fork()):
            file = begin(rank)
            share(file, rank)
            file.leave()
            os._exit(0)
        pids.append(pid)
    write_whole_tensors(first, dump)
    share(first, 0)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
    first.commit()
    other = write_dump(directory / f"y{{suffix}}", dump)
    assert target.read_bytes() == other.read_bytes()
"""


def run(library: Path, script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"LD_PRELOAD": str(library)},
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    return done.stdout


def calls_in(log: Path) -> Iterator[tuple[str, str, int, int]]:
    """Yield what a process did: call, name of the file, offset and length."""
    for line in log.read_text().splitlines():
        call, at, length, path = line.split(" ", 3)
        yield call, Path(path).name, int(at), int(length)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_two_processes_write_into_one_page(fault_library, tmp_path, suffix):  # noqa: F811
    directory = tmp_path / "out"
    directory.mkdir()
    run(fault_library, GROUPS, directory, tmp_path / "log", suffix)
    for number in range(len(SETTINGS)):
        pages = [
            {
                page
                for call, name, at, length in calls_in(tmp_path / f"log.{number}.{rank}")
                if (call, name) == ("pwrite", f"x{number}{suffix}.partial")
                for page in range(at // PAGE, -(-(at + length) // PAGE))
            }
            for rank in range(3)
        ]
        assert not any(one & other for one, other in combinations(pages, 2)), SETTINGS[number]
        assert all(pages) or number > 1, "some tickets have pages of their own"


# Two processes go on with what two have left.
RESUMED = """
import os, shutil, sys
from pathlib import Path
from dump_activations.storage.writing.partial import tidy
from output_support import *

def leave_some(target):
    with open_group(target, dump, 2) as (first, second):
        write_ticket(first, dump, range(1))
        write_ticket(second, dump, range(2, 4))

def finish(target, ranks):
    with open_group(target, dump, ranks) as files:
        first, *others = files
        assert first.resumed_rows >= 600
        write_whole_tensors(first, dump)
        for number, stretch in enumerate(first.missing):
            write_ticket(files[(number + 1) % ranks], dump, stretch)
        for other in others:
            other.leave()
        first.commit()

dump = small_dump(1190, 200)
"""

TRACED = """
target, log = map(Path, sys.argv[1:])
leave_some(target)
os.environ["TRACE"] = f"{log}:{target.parent}"
finish(target, 2)
"""

# A child is killed in its first call, the next in its second, until one is done before that.
KILLED = """
directory, suffix = Path(sys.argv[1]), sys.argv[2]
name = f"x{suffix}"
whole = write_dump(directory / name, dump).read_bytes()
left = directory / "left"
leave_some(left / name)
for nth in range(1, 200):
    target = directory / str(nth) / name
    shutil.copytree(left, target.parent)
    if not (pid := os.fork()):
        os.environ["FAULT"] = f"any:{nth}:kill:{target.parent}"
        finish(target, 2)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status in (0, 9), status
    if target.exists():
        tidy(target)
    else:
        finish(target, 1 + nth % 2)
    assert target.read_bytes() == whole
    assert os.listdir(target.parent) == [name]
    if status == 0:
        break
print(nth)
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_is_removed_or_renamed_before_what_replaces_it_is_on_disk(
    fault_library,  # noqa: F811
    tmp_path,
    suffix,
):
    directory = tmp_path / "out"
    directory.mkdir()
    target = directory / f"x{suffix}"
    run(fault_library, RESUMED + TRACED, target, tmp_path / "log")
    partial = f"{target.name}.partial"
    first, second, new = f"{partial}.journal", f"{partial}.journal.1", f"{partial}.journal.new"
    ordering = {"write", "pwrite", "fsync", "fdatasync", "rename", "unlink"}
    steps = [each[:2] for each in calls_in(tmp_path / "log") if each[0] in ordering]
    assert [step for step, _ in groupby(steps)] == [
        ("pwrite", partial),  # edges that were left
        ("fdatasync", partial),
        ("unlink", new),
        ("write", new),
        ("fsync", new),
        ("rename", new),
        ("fsync", "out"),
        ("unlink", second),
        ("fsync", "out"),  # the second process looks at the directory
        ("write", second),
        ("fsync", second),
        ("fsync", "out"),
        ("pwrite", partial),  # spans of both
        ("fdatasync", partial),
        ("write", second),
        ("fsync", second),
        ("fdatasync", partial),
        ("write", first),
        ("fsync", first),
        ("pwrite", partial),  # edges
        ("fdatasync", partial),
        ("pwrite", partial),  # the skeleton
        ("fsync", partial),
        ("rename", partial),
        ("fsync", "out"),
        ("unlink", second),
        ("unlink", first),
    ]


def test_killed_between_any_two_steps_it_is_resumed_without_loss(fault_library, tmp_path):  # noqa: F811
    done = run(fault_library, RESUMED + KILLED, tmp_path, ".safetensors")
    assert 30 < int(done) < 199
