"""Step indices from files: arrays, archives, and dumps of this pool or another."""

import warnings

import numpy as np
import pytest

from dump_activations.commands.dump import main
from reference.dumps import FORMATS, read_dump
from reference.pools import read_pool, write_shards

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
        save(tmp_path / "given.npz", indices=steps, other=np.arange(3))
    else:
        np.save(tmp_path / "given.npy", steps)
    (given,) = tmp_path.iterdir()
    run("--indices", str(given), "-o", str(tmp_path / "a.npz"))
    assert stored_indices(tmp_path / "a.npz") == STEPS


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_earlier_dump(suffix, tmp_path, capsys):
    old, new = tmp_path / f"old{suffix}", tmp_path / "new.pt"
    run("--where", "max_rank > 9", "--n-samples=50", "-o", str(old))
    run("--indices", str(old), "--labels", "move_dir", "-o", str(new))
    assert stored_indices(new) == stored_indices(old)
    assert read_dump(new).metadata["indices_from"] == "given"
    assert "warning" not in capsys.readouterr().err


def test_a_dump_of_another_pool(tmp_path, demo_pool, demo_checkpoint, capsys):
    write_shards(tmp_path / "pool", read_pool(demo_pool), [10_000, 4138])
    run("--n-samples=50", "-o", str(tmp_path / "old.pt"))
    capsys.readouterr()
    flags = [f"--init={demo_checkpoint}", f"--dataset={tmp_path / 'pool'}", "--allow-cpu"]
    flags += ["--device=cpu", f"--indices={tmp_path / 'old.pt'}", "--no-write"]
    assert main(flags) == 0
    (line,) = capsys.readouterr().err.splitlines()
    for part in ("warning", "old.pt", "another pool", str(demo_pool), str(tmp_path / "pool")):
        assert part in line
