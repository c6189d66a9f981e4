"""Unusual but correct calls: odd names, types, streams, and signals at odd times."""

import os
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dump_activations import StepsDataset, demo, dump, load_encoder, stream
from dump_activations.commands.dump import main
from dump_activations.errors import OutputError
from dump_activations.storage.reading.inspection import inspect
from reference.datasets import make_dataset
from reference.dumps import read_dump

CPU = {"device": "cpu", "allow_cpu": True}
DEMO = ["--demo", "--device", "cpu", "--n-samples", "20"]
COMMAND = [sys.executable, "-m", "dump_activations", *DEMO]


def test_integers_devices_and_keys_of_other_types(tmp_path):
    options = {"n_samples": np.int64(21), "batch_size": np.int32(8), "seed": np.uint8(3)}
    device = {"device": torch.device("cpu"), "allow_cpu": True}
    keys = (key for key in ["pooled", "head_logits"])
    dump(demo.CHECKPOINT, demo.DATASET, tmp_path / "a.pt", outputs=keys, **options, **device)
    metadata = read_dump(tmp_path / "a.pt").metadata
    assert (metadata["n_samples"], metadata["seed"]) == ("21", "3")
    assert metadata["outputs"] == "head_logits,pooled"


def test_a_warning_points_at_the_call(tmp_path, recwarn):
    model = load_encoder(demo.CHECKPOINT)
    model.final_ln.weight.data[0] = torch.inf
    dataset = tmp_path / "dataset"
    make_dataset(dataset, "packed_46", n=5)
    options = {"layers": [0], "n_samples": 9, **CPU}
    dump(model, dataset, tmp_path / "a.pt", **options)
    list(stream(model, demo.DATASET, **options))
    StepsDataset(dataset).sample_indices(9)
    texts = [str(each.message) for each in recwarn]
    dumped = ["no layers", "with replacement", "9 boards", "infinite"]
    found = [*dumped, "no layers", "with replacement"]
    assert all(part in text for part, text in zip(found, texts, strict=True))
    assert {each.filename for each in recwarn} == {__file__}


@pytest.mark.parametrize("tensors", ["copy", "view", "device"])
def test_the_memory_of_a_batch(tensors):
    """Without a GPU the device's memory is the host's."""
    model = load_encoder(demo.CHECKPOINT)
    keys, options = ["layer_outputs", "rmsnorm_gammas"], {"labels": "move_dir", **CPU}
    (whole,) = stream(model, demo.DATASET, outputs=keys, n_samples=38, **options)
    options |= {"n_samples": 38, "batch_size": 8, "tensors": tensors}
    kept = []
    for batch in stream(model, demo.DATASET, outputs=keys, **options):
        rows = slice(batch.first_row, batch.first_row + len(batch.indices))
        for name, tensor in batch.items():
            expected = whole[name]
            expected = expected if name.startswith("rmsnorm") else expected[rows]
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5)
            if tensors == "copy":  # It keeps no larger memory alive.
                assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
        kept.append(batch)
    places = {batch["layer_outputs"].data_ptr() for batch in kept}
    assert len(places) == (len(kept) if tensors == "copy" else 1)
    gammas = {batch["rmsnorm_gammas/final_ln"].data_ptr() for batch in kept}
    assert len(gammas) == (len(kept) if tensors == "copy" else 1)
    assert model.final_ln.weight.data_ptr() not in gammas


def test_a_batch_is_a_mapping():
    options = {"outputs": ["pooled", "rmsnorm_gammas"], "labels": "move_dir", **CPU}
    (batch,) = stream(demo.CHECKPOINT, demo.DATASET, n_samples=5, **options)
    assert batch["boards"] is batch.boards
    assert batch["labels/move_dir"] is batch.labels["move_dir"]
    assert {*batch} == {"indices", "boards", "labels/move_dir", *batch.tensors}
    with pytest.raises(KeyError):
        batch["final_hidden"]


@pytest.mark.parametrize("split", [False, True])
def test_a_batch_is_shown_in_a_few_lines(split):
    keys = ["layer_outputs", "attn_norm", "mlp_input", "attn_out", "mlp_out"]
    options = {"outputs": keys, "split_layers": split, "batch_size": 8, **CPU}
    *_, batch = stream(demo.CHECKPOINT, demo.DATASET, n_samples=20, **options)
    first, *lines = repr(batch).splitlines()
    assert first == "Batch of rows 16 to 19"
    if split:
        assert len(lines) == 19
        assert lines[-1] == "  and 4 more tensors"
    else:
        assert "  layer_outputs: float32 (4, 4, 16, 64) on cpu" in lines
        assert len(lines) == 7


def test_an_interruption_at_the_end_says_that_the_file_is_complete(tmp_path):
    target = tmp_path / "a.pt"

    def interrupt(done, of):
        if done == of:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        dump(demo.CHECKPOINT, demo.DATASET, target, n_samples=20, progress=interrupt, **CPU)
    assert caught.value.__notes__ == [f"{target} is complete"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("name", ["run[final].npz", ":warning:.npz", "[bold].npz"])
def test_names_that_look_like_markup(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*DEMO, "-o", name]) == 0
    printed = capsys.readouterr()
    assert name in printed.out
    (note,) = printed.err.splitlines()
    assert note.startswith("note: ")
    assert name in note


@pytest.mark.parametrize("redirection", ["2>&-", ">&- 2>&-", "2>/dev/full"])
def test_streams_that_are_closed_or_full(redirection, tmp_path):
    command = f'exec "$@" {redirection}'
    run = subprocess.run(
        ["sh", "-c", command, "sh", *COMMAND, "-o", tmp_path / "a.npz"], check=False
    )
    assert run.returncode == 0
    assert (tmp_path / "a.npz").exists()


def test_a_summary_that_cannot_be_printed(tmp_path):
    target = tmp_path / "a.npz"
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [*COMMAND, "--json", "-o", target], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert run.returncode == 1
    assert f"{target} is complete".encode() in run.stderr
    assert read_dump(target).numpy("boards").shape == (20, 16)


def test_metadata_that_unfolds_without_end(tmp_path):
    """Thirty tuples, each of the one before twice: a few hundred bytes, 2**30 entries as text."""
    dump(demo.CHECKPOINT, demo.DATASET, tmp_path / "whole.pt", n_samples=2, **CPU)
    folded = ()
    for _ in range(30):
        folded = (folded, folded)
    content = pickle.dumps({"metadata": {"a": folded}}, protocol=2)
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as whole,
        zipfile.ZipFile(tmp_path / "a.pt", "w") as changed,
    ):
        for info in whole.infolist():
            is_pickle = info.filename.endswith("data.pkl")
            changed.writestr(info.filename, content if is_pickle else whole.read(info))
    with pytest.raises(OutputError, match="metadata"):
        inspect(tmp_path / "a.pt")
