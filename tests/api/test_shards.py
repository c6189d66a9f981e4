"""Shards of one process: the values of the whole file, and one line for each wrong call."""

import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from dump_activations import demo, dump
from dump_activations.api import dump as module
from dump_activations.commands.dump import main
from dump_activations.errors import DumpActivationsNote
from dump_activations.progress import Phase
from dump_activations.storage.statistics import merge_stored
from faults.groups import without_notes
from reference.dumps import FORMATS, read_dump

pytestmark = pytest.mark.usefixtures("disk_takes_no_time")

# 15 batches of 66 kB.
N, BATCH, BATCHES = 58, 4, 15
ARGUMENTS = [
    *["--demo", f"--n-samples={N}", f"--batch-size={BATCH}", "--labels=move_dir"],
    "--outputs=layer_outputs,pooled,rmsnorm_gammas",
]
SIZE = "--shard-size=200kB"
SHARDS = 8


@pytest.fixture
def run(tmp_path, capsys):
    """Return what runs the command; it gives the exit code and the lines of stderr."""

    def call(*more, output="a.pt"):
        capsys.readouterr()
        code = main([*ARGUMENTS, f"-o{tmp_path / 'out' / output}", *more])
        lines = capsys.readouterr().err.splitlines()
        return code, [line for line in lines if "no CUDA device" not in line]

    return call


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "out"


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def names(shards=range(1, SHARDS + 1), of=SHARDS):
    return {f"a-{number:05}-of-{of:05}.pt" for number in shards}


# --- What shards hold.


@pytest.mark.parametrize("more", [["--stats"], ["--stats", "--split-layers"], ["--dtype=fp16"]])
@pytest.mark.parametrize("suffix", FORMATS)
def test_shards_hold_the_values_of_the_whole_file(suffix, more, run, directory):
    assert run(*more, output=f"whole{suffix}")[0] == 0
    assert run(*more, SIZE, output=f"a{suffix}")[0] == 0
    whole = read_dump(directory / f"whole{suffix}")
    paths = sorted(directory.glob("a-*"))
    shards = [read_dump(path) for path in paths]
    count = len(shards)
    assert [path.name for path in paths] == [
        f"a-{number:05}-of-{count:05}{suffix}" for number in range(1, count + 1)
    ]
    starts = [number * BATCHES // count * BATCH for number in range(count)]
    for number, (shard, start) in enumerate(zip(shards, starts, strict=True), 1):
        own = {"shard": f"{number}/{count}", "first_board": str(start), "n_samples": str(N)}
        assert shard.metadata.items() >= own.items()
        assert {shard.metadata[name] == whole.metadata[name] for name in ("fingerprint", "seed")}
        assert set(shard.tensors) == set(whole.tensors)
        nbytes = sum(tensor.nbytes for tensor in shard.tensors.values())
        assert nbytes <= 200_000 or start + BATCH == [*starts, N][number]
    for name, tensor in whole.tensors.items():
        if name.startswith("rmsnorm_gammas/"):
            assert all(torch.equal(shard.tensors[name], tensor) for shard in shards)
        elif not name.startswith("stats/"):
            assert torch.equal(torch.cat([shard.tensors[name] for shard in shards]), tensor), name
    for key in {name.split("/")[1] for name in whole.tensors if name.startswith("stats/")}:
        merged_equals(key, whole, shards)


def merged_equals(key, whole, shards):
    """Compare merged statistics with the whole file's."""
    stored = [
        {
            name.rpartition("/")[2]: tensor.numpy()
            for name, tensor in file.tensors.items()
            if name.startswith(f"stats/{key}/")
        }
        for file in [whole, *shards]
    ]
    merged = merge_stored(stored[1:])
    assert merged.keys() == stored[0].keys()
    for name, of_whole in stored[0].items():
        np.testing.assert_allclose(merged[name], of_whole, rtol=1e-12, atol=1e-12)


def test_a_run_that_fits_into_one_shard_is_one_shard(run, directory):
    assert run("--shard-size=1GB")[0] == 0
    assert set(contents(directory)) == names([1], 1)


def test_a_size_smaller_than_a_batch_is_raised_with_a_note(run, directory):
    code, lines = run("--shard-size=1kB")
    assert code == 0
    assert any("--shard-size: raised to one batch, 6" in line for line in lines), lines
    assert set(contents(directory)) == names(range(1, BATCHES + 1), BATCHES)


def test_some_shards_are_written_where_asked(run, directory):
    assert run(SIZE, "--shards=2-3")[0] == 0
    assert set(contents(directory)) == names([2, 3])
    code, lines = run(SIZE, "--shards=3")
    done = f"note: shards 3 to 3 of {directory / 'a.pt'} are already complete"
    assert (code, lines) == (0, [done])
    code, lines = run(SIZE)
    assert "note: 2 of 8 shards are already complete" in lines
    assert set(contents(directory)) == names()


def test_some_shards_of_the_default_cut(run, directory):
    """At most 128 shards, and at least one batch in each."""
    assert run("--shards=15")[0] == 0
    assert set(contents(directory)) == names([15], 15)


def test_a_dry_run_shows_the_shards(run, directory, capsys):
    main([*ARGUMENTS, SIZE, f"-o{directory / 'a.pt'}", "--dry-run", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert list(shown["shards"]) == [str(directory / name) for name in sorted(names())]
    main([*ARGUMENTS, SIZE, f"-o{directory / 'a.pt'}", "--dry-run"])
    assert f"{SHARDS} shards" in capsys.readouterr().out
    assert not directory.exists()


def test_the_rate_in_bytes_is_that_of_all_shards(tmp_path, monkeypatch):
    phases = []
    monkeypatch.setattr(
        module,
        "Phase",
        lambda *names, **figures: phases.append(figures) or Phase(*names, **figures),
    )
    options = {"n_samples": N, "batch_size": BATCH, "device": "cpu", "allow_cpu": True}
    dump(demo.CHECKPOINT, demo.DATASET, tmp_path / "a.pt", shard_size=50_000, **options)
    nbytes = N * (16 * 64 * 4 + 16 + 8)
    assert [(each["of"], each["nbytes"]) for each in phases] == [(N, nbytes)]


def test_from_python(tmp_path):
    options = {"n_samples": N, "batch_size": BATCH, "device": "cpu", "allow_cpu": True}
    call = partial(dump, demo.CHECKPOINT, demo.DATASET, tmp_path / "a.pt", **options)
    first = call(shard_size=50_000, shards=range(2, 4))
    assert first.bytes_written == sum(path.stat().st_size for path in tmp_path.iterdir())
    rest = call(shard_size="50kB")
    found = math.ceil(BATCHES / 3)
    assert (first.shards_written, first.shards_found) == (2, 0)
    assert rest.shards_written + rest.shards_found == len([*tmp_path.iterdir()]) >= found
    assert rest.boards + first.boards == N
    assert rest.resumed_boards == first.boards
    with pytest.warns(DumpActivationsNote, match="already complete"):
        again = call()  # without a size: the shards that are there
    assert (again.boards, again.resumed_boards, again.shards_written) == (0, N, 0)
    assert again.bytes_written == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_boards_of_other_processes_count_as_resumed(tmp_path):
    options = {"n_samples": N, "batch_size": BATCH, "device": "cpu", "allow_cpu": True}
    call = partial(dump, demo.CHECKPOINT, demo.DATASET, tmp_path / "a.pt", **options)
    others = []

    def progress(done, _of):
        if done and not others:
            others.append(call(shard_size=50_000, shards=range(4, 6)))

    summary = call(shard_size=50_000, progress=progress)
    assert others[0].boards + summary.boards == N
    assert summary.resumed_boards == others[0].boards > 0


def test_shards_of_different_numbers_of_threads_are_noted(tmp_path):
    options = {"n_samples": N, "batch_size": BATCH, "device": "cpu", "allow_cpu": True}
    call = partial(dump, demo.CHECKPOINT, demo.DATASET, tmp_path / "a.pt", **options)
    threads = torch.get_num_threads()
    call(shard_size=50_000, shards=1)
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(DumpActivationsNote, match='agree to rounding only: .*"threads"'):
            call(shard_size=50_000)
    finally:
        torch.set_num_threads(threads)


# --- What is already there.


def test_a_deleted_shard_is_written_again(run, directory):
    assert run(SIZE)[0] == 0
    before = contents(directory)
    times = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    victim = directory / "a-00005-of-00008.pt"
    victim.unlink()
    assert run()[0] == 0
    assert contents(directory) == before
    del times[victim]
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.fixture
def finished(run, directory):
    """Return the shards of a finished dump."""
    assert run(SIZE)[0] == 0
    return directory


def other_shard(run, directory):
    (directory / "a-00003-of-00008.pt").unlink()
    kept = contents(directory)
    shutil.rmtree(directory)
    assert run(SIZE, "--seed=1", "--shards=3")[0] == 0
    for name, data in kept.items():
        (directory / name).write_bytes(data)


def foreign_shard(_run, directory):
    (directory / "a-00003-of-00008.pt").write_bytes(b"precious")


def whole_file(run, directory):
    assert run(output="whole.pt")[0] == 0
    (directory / "whole.pt").rename(directory / "a.pt")


def nothing(_run, _directory):
    pass


REFUSED = {
    "another size": (nothing, ["--shard-size=400kB"], "--shard-size"),
    "a shard of other work": (other_shard, [SIZE], "of other work, which differs in --seed"),
    "a file of another program": (foreign_shard, [SIZE], "is not a dump of this package"),
    "other work without a size": (nothing, ["--seed=1"], "--seed (0 there, 1 here)"),
    "other work of this size": (nothing, [SIZE, "--seed=1"], "--seed (0 there, 1 here)"),
    "a whole file": (whole_file, [], "is there, and so one name would stand for"),
    "a whole file, a size": (whole_file, [SIZE], "is there, and so one name would stand for"),
    "a whole file, some shards": (whole_file, ["--shards=2"], "one name would stand for"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_are_refused_and_nothing_is_lost(case, run, finished):
    change, more, text = REFUSED[case]
    change(run, finished)
    before = contents(finished)
    for dry in ([], ["--dry-run"]):
        code, lines = run(*more, *dry)
        (line,) = without_notes(lines)
        assert code == 1
        assert text in line
        assert str(finished / "a") in line
        assert contents(finished) == before


def test_shards_next_to_a_whole_file_are_refused(run, directory):
    assert run()[0] == 0
    before = contents(directory)
    for more in ([SIZE], [SIZE, "--overwrite"]):
        code, (line,) = run(*more)
        assert code == 1
        assert "a.pt is there, and so one name would stand for a whole dump and for shards" in line
        assert contents(directory) == before


def test_overwrite_replaces_no_more_than_the_shards_of_other_work(run, finished):
    before = contents(finished)
    other_shard(run, finished)
    inodes = {path.name: path.stat().st_ino for path in finished.iterdir()}
    code, lines = run(SIZE, "--overwrite")
    assert code == 0, lines
    assert any("a-00003-of-00008.pt (" in line and "is replaced" in line for line in lines), lines
    assert contents(finished) == before
    after = {path.name: path.stat().st_ino for path in finished.iterdir()}
    assert {name for name in after if after[name] != inodes[name]} == {"a-00003-of-00008.pt"}


@pytest.mark.parametrize(
    ("more", "texts"),
    [
        *[([f"--shard-size={size}"], ["--shard-size", f"'{size}'"]) for size in
          ("4GiB/s", "4GiB", "0", "-1", "1e9", "0.1B", "")],
        *[([SIZE, f"--shards={shards}"], ["--shards", f"'{shards}'"]) for shards in
          ("0", "-1", "3-2", "1-", "1,2", "x", "")],
        ([SIZE, "--shards=9"], ["--shards", "between 1 and 8", "9"]),
        ([SIZE, "--shards=1-9"], ["--shards", "between 1 and 8", "9"]),
        (
            ["--shard-size=1", "--batch-size=1", "--n-samples=100000"],
            ["--shard-size", "100,000 shards", "99,999"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_wrong_calls(more, texts, run, directory, recwarn):
    code, lines = run(*more)
    (line,) = [line for line in without_notes(lines) if not line.startswith("warning: ")]
    assert code == 2, line
    assert all(text in line for text in texts), line
    assert not directory.exists()


def test_space_is_needed_for_all_missing_shards(small_disk, capsys):
    arguments = ["--demo", "--n-samples=600", "--outputs=layer_outputs", "--batch-size=10"]
    arguments += ["--shard-size=1MB", f"-o{small_disk / 'a.pt'}"]
    assert main(arguments) == 1
    (line,) = without_notes(capsys.readouterr().err.splitlines())
    assert "No space left on device" in line
    assert [*small_disk.iterdir()] == []
    assert main([*arguments, "--shards=1-2"]) == 0
    assert len([*small_disk.iterdir()]) == 2
