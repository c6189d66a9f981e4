"""Step indices from files: arrays, archives, and dumps of this dataset or another."""

import io
import os
import pickle
import warnings

import numpy as np
import pytest

from dump_activations import (
    IndicesError,
    IndicesNotFoundError,
    InvalidArgumentError,
    StepsDataset,
    dump,
    stream,
)
from dump_activations.api.step_indices import read_step_indices
from dump_activations.commands.dump import main
from reference.datasets import read_dataset, write_shards
from reference.dumps import FORMATS, read_dump

STEPS = [14, 3, 14, 9000]


def run(*arguments):
    with warnings.catch_warnings(record=True):
        assert main(["--demo", "--device=cpu", "--outputs=pooled", *arguments]) == 0


def stored_indices(path):
    return read_dump(path).numpy("indices").tolist()


@pytest.mark.parametrize("dtype", ["<i8", ">i4", "<u2", "<f8", ">f4"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, None])
def test_arrays_and_archives(save, dtype, tmp_path):
    steps = np.array(STEPS, dtype).reshape(2, 2)
    if save:
        with (tmp_path / "given.NPZ").open("wb") as file:  # its suffix in either case
            save(file, indices=steps, other=np.arange(3))
    else:
        np.save(tmp_path / "given.npy", steps)
    (given,) = tmp_path.iterdir()
    run("--indices", str(given), "-o", str(tmp_path / "a.npz"))
    assert stored_indices(tmp_path / "a.npz") == STEPS


@pytest.mark.parametrize("dtype", ["<i8", ">i4", "u1", "<u8", "<f4"])
def test_arrays_of_any_shape(dtype, tmp_path, demo_dataset):
    path = tmp_path / "indices.npy"
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    for stored in (array, np.asfortranarray(array), array[:, ::2], np.array(5, dtype)):
        np.save(path, stored)
        indices = read_step_indices(path, StepsDataset(demo_dataset))
        assert indices.dtype == np.int64
        np.testing.assert_array_equal(indices, stored.ravel())


def saved(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (saved(np.array([1.0, 2.5])), "integers; got float64"),
        (saved(np.array([1.0, np.nan])), "integers; got float64"),
        (saved(np.array([2.0**53])), "integers; got float64"),
        (saved(np.zeros(3, bool)), "integers; got bool"),
        (saved(np.array(["a"])), "integers; got"),
        (saved(np.array([1j])), "integers; got complex128"),
        (saved(np.array(["2020-01-01"], "M8[D]")), "integers; got"),
        (saved(np.zeros(2, [("a", "<i8")])), "integers; got"),
        (saved(np.zeros((0, 5), np.int64)), "no step indices"),
        (saved(np.zeros(0, np.int64)), "no step indices"),
        (saved(np.array([2**63], np.uint64)), "must fit into int64"),
        (saved(np.array([1, None])), "cannot be read"),
        (saved(np.zeros(10**5, np.int64))[:-1], "cannot be read"),
        *((content, "") for content in (b"", b"PK\x03\x04", b"garbage", pickle.dumps([1]))),
        (b"\x93NUMPY\x01\x00\xff\xff{", "cannot be read"),
    ],
)
def test_files_that_are_not_indices(content, text, tmp_path, demo_dataset):
    path = tmp_path / "indices.npy"
    path.write_bytes(content)
    with pytest.raises(IndicesError, match=rf"indices\.npy: .*{text}") as caught:
        read_step_indices(path, StepsDataset(demo_dataset))
    assert "\n" not in str(caught.value)
    assert ("cannot be read" in str(caught.value)) == (text in ("cannot be read", ""))


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_earlier_dump(suffix, tmp_path, capsys):
    old, new = tmp_path / f"old{suffix}", tmp_path / "new.pt"
    run("--where", "max_rank > 9", "--n-samples=50", "-o", str(old))
    run("--indices", str(old), "--labels", "move_dir", "-o", str(new))
    assert stored_indices(new) == stored_indices(old)
    assert read_dump(new).metadata["sampling"] == "given"
    assert "warning" not in capsys.readouterr().err


def test_a_pipe_is_not_read(tmp_path, demo_dataset):
    path = tmp_path / "indices.npy"
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR)
    os.write(fd, b"else a reader would wait")
    with pytest.raises(IndicesError, match="not an ordinary file"):
        read_step_indices(path, StepsDataset(demo_dataset))
    os.close(fd)


def test_a_file_may_change_once_it_is_read(tmp_path, demo_dataset):
    path = tmp_path / "indices.npy"
    np.save(path, STEPS)
    steps = read_step_indices(path, StepsDataset(demo_dataset))
    np.save(path, STEPS[::-1])
    assert steps.tolist() == STEPS


def test_an_earlier_dump_in_shards(tmp_path):
    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    run("--steps=40:100:7", "--batch-size=4", "--shard-size=1kB", "-o", str(old))
    assert len([*tmp_path.glob("old-*-of-00003.pt")]) == 3
    run("--indices", str(old), "-o", str(new))
    assert stored_indices(new) == [*range(40, 100, 7)]


def test_a_file_of_indices_in_python(tmp_path, demo_dataset, demo_checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"indices": "old.npz", "outputs": "pooled", "device": "cpu", "allow_cpu": True}
    np.savez("old.npz", indices=STEPS)
    dump(demo_checkpoint, demo_dataset, "new.pt", **given)
    assert stored_indices(tmp_path / "new.pt") == STEPS
    for indices in (tmp_path / "new.pt", "old.npz"):
        (batch,) = stream(demo_checkpoint, demo_dataset, **{**given, "indices": indices})
        assert batch.indices.tolist() == STEPS
    with pytest.raises(InvalidArgumentError, match="choose another output"):
        dump(demo_checkpoint, demo_dataset, "old.npz", **given)
    with pytest.raises(IndicesNotFoundError, match=r"none\.npy: no such file"):
        stream(demo_checkpoint, demo_dataset, **{**given, "indices": "none.npy"})


def shuffled_dataset(demo_dataset, directory, drop=()):
    """Write the demo's rows in another order, but for some, as a dataset of two shards."""
    rows = np.delete(read_dataset(demo_dataset), drop)
    write_shards(
        directory, np.random.default_rng(0).permutation(rows), [10_000, len(rows) - 10_000]
    )
    return directory


def dump_from(dataset, indices, checkpoint, *arguments):
    """Dump the steps of an earlier dump from a dataset; what it says, line by line."""
    flags = [f"--init={checkpoint}", f"--dataset={dataset}", "--allow-cpu", "--device=cpu"]
    return main([*flags, "--outputs=pooled", f"--indices={indices}", *arguments])


@pytest.mark.parametrize("label", ["run_id", "step_index"])
def test_a_dump_of_another_dataset(label, tmp_path, demo_dataset, demo_checkpoint, capsys):
    dataset, old = shuffled_dataset(demo_dataset, tmp_path / "dataset"), tmp_path / "old.pt"
    run("--n-samples=50", f"--labels={label}", "-o", str(old))
    capsys.readouterr()
    assert dump_from(dataset, old, demo_checkpoint, "--no-write") == 0
    (line,) = capsys.readouterr().err.splitlines()
    named = ("warning", "old.pt", "another dataset", str(demo_dataset), str(dataset))
    for part in (*named, "with --labels run_id,step_index its rows could be found here"):
        assert part in line


@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_of_another_dataset(suffix, tmp_path, demo_dataset, demo_checkpoint, capsys):
    dataset, old = shuffled_dataset(demo_dataset, tmp_path / "dataset"), tmp_path / f"old{suffix}"
    run("--n-samples=50", "--labels=run_id,step_index,move_dir", "-o", str(old))
    capsys.readouterr()
    new = tmp_path / f"new{suffix}"
    assert dump_from(dataset, old, demo_checkpoint, "--labels=move_dir,step_index", f"-o{new}") == 0
    note = capsys.readouterr().err.splitlines()[0]
    assert "note" in note
    assert "found by their run_id and step_index" in note
    rows = read_dataset(demo_dataset)[stored_indices(old)]
    assert (read_dataset(dataset)[stored_indices(new)] == rows).all()
    assert stored_indices(new) != stored_indices(old)
    seen, there = [], StepsDataset(dataset)
    found = read_step_indices(old, there, lambda *rows: seen.append(rows))
    assert found.tolist() == stored_indices(new)
    assert seen[-1] == (len(there), len(there))
    for name in ("boards", "labels/move_dir", "labels/step_index"):
        assert (read_dump(new).numpy(name) == read_dump(old).numpy(name)).all()


def test_rows_that_another_dataset_has_not(tmp_path, demo_dataset, demo_checkpoint, capsys):
    old = tmp_path / "old.npz"
    run("--steps=40:60", "--labels=run_id,step_index", "-o", str(old))
    dataset = shuffled_dataset(demo_dataset, tmp_path / "dataset", drop=[55, 47, 3])
    capsys.readouterr()
    assert dump_from(dataset, old, demo_checkpoint, "--no-write") == 1
    *_, line = capsys.readouterr().err.splitlines()
    row = read_dataset(demo_dataset)[47]
    assert (
        f"--indices: no rows of {dataset} are step {row['step_index']} of run {row['run_id']}"
        in line
    )
