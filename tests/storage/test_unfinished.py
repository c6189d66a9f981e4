"""Unfinished files as `inspect-activations` shows them, without a lock and without a change."""

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dump_activations.commands.inspect import main
from dump_activations.errors import OutputError
from dump_activations.storage.writing.existing import find_unfinished
from dump_activations.storage.writing.partial import BusyError, _lock
from output_support import SUFFIXES, interrupt, open_file, small_dump, write_batches, write_dump

DUMP = small_dump()  # 23 boards in batches of 4


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(params=SUFFIXES)
def target(request, tmp_path):
    """Return the target of a run that was killed with batches 0, 1 and the short last one done."""
    target = tmp_path / f"x{request.param}"
    interrupt(target, DUMP, [0, 4, 20])
    return target


@pytest.mark.parametrize("ending", ["", ".partial"])
def test_an_unfinished_file_says_how_far_it_is(ending, target, capsys):
    before = contents(target.parent)
    assert main([f"{target}{ending}", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["file"] == f"{target}.partial"
    assert said["format"] == target.suffix[1:]
    assert said["boards"] == 23
    assert {each["key"]: each["shape"] for each in said["tensors"]} == {
        spec.name: [*spec.shape] for spec in DUMP.specs
    }
    assert said["metadata"].items() >= {**DUMP.metadata, "seed": 0}.items()
    unfinished = said["unfinished"]
    assert unfinished.pop("written_at") == Path(f"{target}.partial.journal").stat().st_mtime
    assert unfinished == {
        "boards_done": 11,
        "batches": 6,
        "batches_done": 3,
        "being_written": False,
    }
    assert main([f"{target}{ending}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("unfinished: 11 of 23 boards (48%) are on disk, 3 of 6 batches; no")
    assert contents(target.parent) == before


@pytest.mark.parametrize(("age", "text"), [(7230, "2 h 0 min"), (-60, "0 s")])
def test_the_age_of_the_last_batch(age, text, target, capsys):
    """The clock of another machine may be ahead."""
    os.utime(f"{target}.partial.journal", (time.time() - age,) * 2)
    assert main([str(target)]) == 0
    assert f"the last batch is {text} old" in capsys.readouterr().out


@pytest.mark.parametrize("place", [0, 1])
def test_an_unfinished_file_is_not_compared(place, target, tmp_path, capsys):
    files = [str(write_dump(tmp_path / "whole.pt", DUMP))]
    files.insert(place, str(target))
    assert main(files) == 2
    error = f"error: {target}.partial is not finished: there is nothing to compare yet\n"
    assert capsys.readouterr().err == error


def test_a_running_dump_is_seen_and_goes_on(tmp_path, capsys):
    target = tmp_path / "x.pt"
    with open_file(target, DUMP) as file:
        write_batches(file, DUMP, [0])
        assert find_unfinished(target).is_being_written
        assert main([str(target)]) == 0
        assert "a process is writing it" in capsys.readouterr().out
        with pytest.raises(OutputError, match="another dump"):
            open_file(target, DUMP)
    assert not find_unfinished(target).is_being_written
    assert write_dump(target, DUMP).exists()


def test_a_dump_starts_while_someone_looks(target):
    """The look holds a lock for a moment."""
    with Path(f"{target}.partial").open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        fd = os.open(f"{target}.partial", os.O_RDWR)
        try:
            with pytest.raises(BusyError):
                _lock(fd, target)
            threading.Timer(0.005, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
            _lock(fd, target)
        finally:
            os.close(fd)


def test_a_partial_file_next_to_a_finished_one_is_noted(target, capsys):
    target.write_bytes(write_dump(target.with_name(f"other{target.suffix}"), DUMP).read_bytes())
    assert main([str(target), "--verify"]) == 0
    shown = capsys.readouterr()
    assert "unfinished" not in shown.out
    assert shown.err == (
        f"note: {target}.partial is next to it: another dump to its name, not finished\n"
    )


def test_what_tells_nothing_is_an_error(target, capsys):
    partial = f"{target}.partial"
    assert main([partial, "--verify"]) == 1
    assert "nothing to verify it by" in capsys.readouterr().err
    assert main([partial, str(target)]) == 2
    os.truncate(f"{partial}.journal", 5)
    assert main([partial]) == 1
    assert "its journal is damaged" in capsys.readouterr().err
    Path(f"{partial}.journal").unlink()
    assert main([str(target)]) == 1
    assert f"{partial}: it has no journal" in capsys.readouterr().err


def test_no_torch_is_imported(target):
    script = f"""
import sys
from dump_activations.commands.inspect import main
assert main([{str(target)!r}]) == 0
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
