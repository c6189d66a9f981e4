"""The metadata of a run, the fingerprint of its work, and keys that a model does not have."""

import hashlib
import json
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from dump_activations import dump, load_encoder, stream
from dump_activations.errors import ActivationUnavailableError
from reference.checkpoints import BASE, config_json, random_state_dict, save_checkpoint
from reference.datasets import make_dataset, write_shards
from reference.dumps import read_dump
from reference.model import assert_close, naive_dump

ON_CPU = {"device": "cpu", "allow_cpu": True, "n_samples": 7}
TRUNK_KEYS = ["final_hidden", "pooled", "layer_outputs", "attn_norm", "mlp_input"]


@pytest.fixture
def metadata_of(demo_dataset, tmp_path):
    def metadata(init):
        path = tmp_path / "a.safetensors"
        dump(init, demo_dataset, path, overwrite=True, **ON_CPU)
        return read_dump(path).metadata

    return metadata


def naive_sha256(state_dict):
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        array = state_dict[name].numpy()
        digest.update(json.dumps([name, f"torch.{array.dtype}", list(array.shape)]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@pytest.fixture
def checkpoint(tmp_path):
    directory = save_checkpoint(tmp_path / "init", random_state_dict(BASE), config_json(BASE))
    (directory / "tokenizer.json").write_text('{"bins":\n [0.5, "\N{SNOWMAN}"]}')
    return directory


def test_every_entry_of_the_metadata(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = make_dataset(tmp_path / "dataset", "packed_46", n=40).rows
    write_shards(tmp_path / "shards", rows, [30, 10])
    path = Path("a.npz")
    asked = {"outputs": ["pooled", "attn_out"], "layers": [-1], "labels": "move_dir,empty_cells"}
    chosen = {"steps": slice(5, None, 2), "where": " step_index >= 0 ", "n_samples": 3, "seed": 9}
    how = {"dtype": "fp16", "batch_size": 4, "device": "cpu", "allow_cpu": True}
    dump("init", "shards", path, **asked, **chosen, **how)
    metadata = dict(read_dump(path).metadata)
    (computed_by,) = json.loads(metadata.pop("computed_by"))
    assert computed_by["device"].startswith("cpu (")
    assert computed_by["threads"] == str(torch.get_num_threads())
    descr = str(np.lib.format.dtype_to_descr(rows.dtype))
    shards = [["steps-00000.npy", 30, descr], ["steps-00001.npy", 10, descr]]
    assert json.loads(metadata.pop("integrity")).keys() > {"indices", "boards", "pooled"}
    assert len(metadata.pop("fingerprint")) == 64
    assert metadata == {
        "checkpoint": "init",
        "tokenizer": '{"bins":\n [0.5, "\N{SNOWMAN}"]}',
        "hidden_size": str(BASE.hidden),
        "num_layers": str(BASE.layers),
        "head_type": "binned_ev",
        "n_bins": str(BASE.n_bins),
        "n_samples": "18",
        "seed": "9",
        "dtype": "fp16",
        "outputs": "attn_out,pooled",
        "layers": str(BASE.layers - 1),
        "precision": "fp32",
        "compile": "false",
        "random_init": "false",
        "format_version": "1",
        "dump_activations_version": version("dump-activations"),
        "torch_version": torch.__version__,
        "batch_size": "4",
        "dataset": "shards",
        "dataset_rows": "40",
        "dataset_layout_sha256": hashlib.sha256(json.dumps(shards).encode()).hexdigest(),
        "sampling": "steps 5:40:2",
        "where": "step_index >= 0",
        "steps": "5:40:2",
        "labels": "move_dir,empty_cells",
        "weights_sha256": naive_sha256(random_state_dict(BASE)),
    }


def test_what_does_not_apply_is_left_out(checkpoint, metadata_of):
    (checkpoint / "tokenizer.json").unlink()
    assert not {"hub_commit", "weights_dtype", "tokenizer"} & metadata_of(checkpoint).keys()


def test_an_edited_model_and_one_of_another_dtype_are_told_apart(checkpoint, metadata_of):
    plain = metadata_of(checkpoint)
    assert plain["weights_sha256"] == naive_sha256(random_state_dict(BASE))
    assert plain["tokenizer"] == '{"bins":\n [0.5, "\N{SNOWMAN}"]}'
    model = load_encoder(checkpoint)
    model.final_ln.weight[3] += 1
    edited = metadata_of(model)
    assert edited["weights_sha256"] == naive_sha256(model.state_dict())
    assert edited["tokenizer"] == plain["tokenizer"]
    assert metadata_of(model.double())["weights_dtype"] == "float64"


@pytest.fixture
def trunk(tmp_path):
    weights = {k: v for k, v in random_state_dict(BASE).items() if "ev_heads" not in k}
    return save_checkpoint(tmp_path / "trunk", weights, config_json(BASE))


def test_a_trunk_dumps_everything_but_the_heads_keys(trunk, demo_dataset, tmp_path):
    path = tmp_path / "a.npz"
    dump(trunk, demo_dataset, path, outputs=[*TRUNK_KEYS, "rmsnorm_gammas"], **ON_CPU)
    result = read_dump(path)
    expected = naive_dump(random_state_dict(BASE), BASE, result.numpy("boards"), TRUNK_KEYS)
    for key in TRUNK_KEYS:
        assert_close(result.numpy(key), expected[key])
    assert result.metadata["head_type"] == "none"
    assert "n_bins" not in result.metadata


@pytest.mark.parametrize("run", [stream, partial(dump, output="a.pt"), partial(dump, write=False)])
def test_the_heads_keys_of_a_trunk_are_refused(run, trunk, demo_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("head_logits", "head_probs"):
        with pytest.raises(ActivationUnavailableError, match=key) as caught:
            run(trunk, demo_dataset, outputs=["pooled", key], **ON_CPU)
        assert caught.value.exit_code == 2
        assert "this checkpoint has no head; leave the key out" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["trunk"]


def test_the_order_of_a_state_dict_is_not_its_digest(checkpoint, metadata_of, tmp_path):
    backwards = dict(reversed(random_state_dict(BASE).items()))
    torch.save({"model": backwards, "encoder_config": config_json(BASE)}, tmp_path / "b.pt")
    digests = {metadata_of(init)["weights_sha256"] for init in (checkpoint, tmp_path / "b.pt")}
    assert len(digests) == 1
