"""Previews: `--dry-run` shows the tensors of a run, `--list-outputs` the keys of a model."""

import errno
import fcntl
import json
import os
import shutil
import warnings

import pytest

from dump_activations import demo, dump
from dump_activations.commands.dump import main
from dump_activations.errors import DumpActivationsNote
from faults.fixtures import small_disk  # noqa: F401
from reference.checkpoints import VARIANTS
from reference.dumps import read_dump

N = 20
CHOICE = ["--outputs", "*", "--layers", "1:", "--dtype", "fp16", f"--n-samples={N}"]


def shown(capsys, *arguments):
    assert main([*map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("split", [[], ["--split-layers"]], ids=["stacked", "split"])
def test_a_dry_run_shows_what_the_run_writes(split, tmp_path, capsys, demo_dataset):
    init = VARIANTS["sinks-gqa-6-2"](tmp_path / "init").init
    target = tmp_path / "out" / "a.safetensors"
    target.parent.mkdir()
    given = [
        *("--allow-cpu", "--init", init, "--dataset", demo_dataset),
        *(*CHOICE, *split, "-o", target),
    ]
    said = shown(capsys, *given, "--dry-run", "--json")
    assert list(target.parent.iterdir()) == []
    assert main([*map(str, given)]) == 0
    written = read_dump(target)
    tensors = {each["key"]: (each["dtype"], each["shape"]) for each in said["tensors"]}
    assert tensors == {
        key: (str(tensor.dtype).removeprefix("torch."), [*tensor.shape])
        for key, tensor in written.tensors.items()
    }
    assert [each["bytes"] for each in said["tensors"]] == [
        written.tensors[each["key"]].nbytes for each in said["tensors"]
    ]
    assert said["bytes"] == sum(tensor.nbytes for tensor in written.tensors.values())
    assert ",".join(sorted(said["keys"])) == written.metadata["outputs"]
    assert said["boards"] == N
    assert said["output"] == str(target)
    assert said["free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


def test_a_dry_run_runs_nothing_and_shows_a_table(tmp_path, capsys, monkeypatch):
    def no_forward(*_: object) -> None:
        raise AssertionError("a forward pass")

    monkeypatch.setattr("dump_activations.model.encoder.Encoder.forward", no_forward)
    assert main(["--demo", *CHOICE, "--dry-run", "-o", str(tmp_path / "a.npz")]) == 0
    out = capsys.readouterr().out
    assert "20 boards" in out
    assert "(20, 3, 4, 16, 16)" in out
    assert main(["--demo", *CHOICE, "--dry-run", "--no-write"]) == 0
    assert "not written" in capsys.readouterr().out


def test_a_dry_run_shows_all_statistics_in_one_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # The default output must not meet a file of the working directory.
    given = ["--demo", "--dry-run", "--outputs", "pooled,layer_outputs", "--stats"]
    held = [each for each in shown(capsys, *given, "--json")["tensors"] if "stats/" in each["key"]]
    assert main(given) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "stats/" in line]
    nbytes = sum(each["bytes"] for each in held)
    assert len(held) == 16
    size = [f"{nbytes / 1000:.1f}", "kB"]
    assert rows == [["stats/KEY/NAME", "float64", "16", "tensors", *size]]


def refusal(capsys, target, *arguments):
    """Return the exit code of a dry run and what it says in one line."""
    code = main(["--demo", "--dry-run", "-o", str(target), *arguments])
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "no CUDA" not in each]
    return code, line


def test_a_dry_run_refuses_what_a_run_would(tmp_path, capsys):
    (tmp_path / "file").touch()
    code, line = refusal(capsys, tmp_path / "file" / "a.pt")
    assert (code, str(tmp_path / "file") in line) == (1, True)
    target, partial = tmp_path / "made" / "a.pt", tmp_path / "a.pt.partial"
    partial.write_bytes(b"left")
    assert main(["--demo", "--dry-run", "-o", str(target)]) == 0
    assert main(["--demo", "--dry-run", "--overwrite", "-o", str(tmp_path / "a.pt")]) == 0
    assert partial.read_bytes() == b"left"
    assert not target.parent.exists()


def test_a_dry_run_refuses_a_small_disk_and_counts_the_space_of_a_partial_file(
    small_disk,  # noqa: F811
    capsys,
):
    target = small_disk / "a.pt"
    code, line = refusal(capsys, target, "--outputs=layer_outputs", "--n-samples=600")
    assert (code, str(target) in line, os.strerror(errno.ENOSPC) in line) == (1, True, True)
    assert main(["--demo", "--dry-run", "--outputs=pooled", "-o", str(target)]) == 0
    (small_disk / "a.pt.partial").write_bytes(bytes(3 << 20))
    more_than_is_free = ["--outputs=layer_outputs", "--n-samples=150"]
    assert main(["--demo", "--dry-run", *more_than_is_free, "-o", str(target)]) == 0


def test_a_run_notes_what_it_writes_and_python_callers_opt_in(
    demo_checkpoint, demo_dataset, tmp_path, capsys
):
    target = tmp_path / "a.pt"
    assert main(["--demo", "--outputs=pooled", "--n-samples=20", "-o", str(target)]) == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "boards" in line]
    assert note.startswith(f"note: 20 boards of pooled: 5.60 kB to {target}; ")
    options = {"outputs": "pooled", "n_samples": 20, "device": "cpu", "allow_cpu": True}
    target.unlink()
    with pytest.warns(DumpActivationsNote, match="20 boards of pooled"):
        dump(demo_checkpoint, demo_dataset, target, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dump(demo_checkpoint, demo_dataset, target, **options)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_list_of_keys_gives_the_sizes_of_a_model(dtype, tmp_path, capsys, demo_dataset):
    init = VARIANTS["sinks-gqa-6-2"](tmp_path / "init").init
    given = ["--init", init, "--layers=-1", "--dtype", dtype]
    listed = {each["key"]: each for each in shown(capsys, *given, "--list-outputs", "--json")}
    target = tmp_path / "a.pt"
    run = [
        f"--dataset={demo_dataset}",
        "--outputs=*",
        "--n-samples=3",
        "--allow-cpu",
        f"-o{target}",
    ]
    assert main([*map(str, given), *run]) == 0
    tensors = {
        key: tensor
        for key, tensor in read_dump(target).tensors.items()
        if key not in ("indices", "boards") and not key.startswith("rmsnorm_gammas/")
    }
    assert listed.keys() == {*tensors, "rmsnorm_gammas"}
    for key, tensor in tensors.items():
        shape = tensor.shape if key == "attn_sinks" else ("N", *tensor.shape[1:])
        assert listed[key]["shape"] == [*shape]
        assert listed[key]["bytes"] == (None if key == "attn_sinks" else tensor[0].nbytes)
    assert listed["attn_pattern"]["alias"] == "attn.hook_pattern"


def test_the_list_of_keys_without_a_model_or_of_one_without_sinks(capsys):
    keys = shown(capsys, "--list-outputs", "--json")
    assert all(each["text"] for each in keys)
    listed = {each["key"]: each["shape"] for each in keys}
    assert listed["attn_pattern"] == ["N", "L", "Q", 16, 16]
    assert listed["mlp_post"] == ["N", "L", 16, "I"]
    assert main(["--list-outputs"]) == 0
    out = capsys.readouterr().out
    assert "(N, L, 16, K, D)" in out
    assert "mean of final_hidden" in out
    assert main(["--list-outputs", "--demo"]) == 0
    out = capsys.readouterr().out
    assert "(N, 4, 16, 64)" in out
    assert f"{4 * 16 * 64 * 4:,}" in out
    assert "this model has no" in out


def interrupted(target):
    """Leave a partial file of some of 20 boards, and return how many the error says are kept."""

    def fail(done, _of):
        if done == 16:
            raise RuntimeError("enough")

    options = {"n_samples": 20, "batch_size": 4, "device": "cpu", "allow_cpu": True}
    with pytest.raises(RuntimeError) as caught:
        dump(demo.CHECKPOINT, demo.DATASET, target, progress=fail, **options)
    return int(caught.value.__notes__[0].split()[0])


def test_a_dry_run_tells_the_fate_of_a_partial_file(tmp_path, capsys):
    target = tmp_path / "a.pt"
    partial = tmp_path / "a.pt.partial"
    same = ["--n-samples=20", "--batch-size=4"]
    kept = interrupted(target)
    assert 0 < kept < 20
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, line = refusal(capsys, target, *same)
    assert (code, line) == (0, f"note: {partial} will be resumed: it has {kept} of 20 boards")
    code, line = refusal(capsys, target, *same, "--seed=1")
    assert code == 1
    assert f"{partial} is of other work" in line
    assert "--seed (0 there, 1 here)" in line
    code, line = refusal(capsys, target, *same, "--seed=1", "--overwrite")
    assert (code, line) == (0, f"note: {partial} is of other work and will be dropped")
    with partial.open("rb") as running:
        fcntl.flock(running, fcntl.LOCK_EX)
        code, line = refusal(capsys, target, *same)
    assert (code, f"error: another dump to {target} is running" in line) == (1, True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "a.pt.partial.journal").unlink()
    code, line = refusal(capsys, target, *same)
    assert (code, line) == (0, f"note: {partial}: it has no journal; it will be started over")
