"""A run's metadata, the fingerprint of its work, and keys that a model does not have."""

import hashlib
import json
import shutil
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import numpy as np
import pytest
import torch

from dump_activations import dump, load_encoder, stream
from dump_activations.errors import ActivationUnavailableError
from dump_activations.pipeline import plan as module
from dump_activations.pipeline.options import Options
from dump_activations.pipeline.plan import computed_by, fingerprint, make_plan, metadata
from reference.checkpoints import BASE, config_json, random_state_dict, save_checkpoint
from reference.datasets import encode_rows, random_boards, write_shards
from reference.dumps import read_dump

CPU = {"n_samples": 7, "device": "cpu", "allow_cpu": True}
BOARDS = random_boards(60, seed=1)
TOKENIZER = '{"bins":\n [0.5, "\N{SNOWMAN}"]}'


def planned(inputs, **options):
    options = {"outputs": ["pooled"]} | CPU | options
    return make_plan(inputs / "checkpoint", inputs / "dataset", Options(**options))


def work(inputs, **options):
    return fingerprint(planned(inputs, **options))


def write_checkpoint(inputs, state_dict=None, config=BASE):
    state_dict = random_state_dict(BASE) if state_dict is None else state_dict
    return save_checkpoint(inputs / "checkpoint", state_dict, config_json(config))


def write_dataset(inputs, *, layout="packed_46", sizes=(30, 30)):
    directory = inputs / "dataset"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    write_shards(directory, encode_rows(BOARDS, layout), list(sizes))


@pytest.fixture
def inputs(tmp_path):
    (write_checkpoint(tmp_path) / "tokenizer.json").write_text(TOKENIZER)
    write_dataset(tmp_path)
    return tmp_path


def naive_sha256(state_dict):
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        array = state_dict[name].numpy()
        digest.update(json.dumps([name, f"torch.{array.dtype}", list(array.shape)]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def differing(one, other):
    return {name for name in one | other if one.get(name) != other.get(name)}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, set()),
        ({"precision": "bf16"}, {"precision"}),
        ({"compile": True}, {"compile"}),
        ({"random_init": True}, {"weights_sha256"}),
        ({"split_layers": True}, {"split_layers"}),
        ({"labels": "move_dir"}, {"labels"}),
        ({"batch_size": 8}, {"batch_size"}),
        ({"dtype": "fp16"}, {"dtype"}),
        ({"outputs": ["final_hidden"]}, {"outputs"}),
        ({"layers": [0]}, {"layers"}),
        ({"seed": 1}, {"indices"}),
        ({"n_samples": 8}, {"n_samples", "indices"}),
        ({"indices": np.arange(7)}, {"indices"}),
    ],
    ids=lambda value: next(iter(value), "the same") if isinstance(value, dict) else "",
)
@pytest.mark.filterwarnings("ignore:layers:dump_activations.DumpActivationsWarning")
def test_an_option_changes_the_work(options, names, inputs):
    assert differing(work(inputs), work(inputs, **options)) == names


@pytest.mark.parametrize("at_once", [2, 1 << 20])
def test_the_steps_of_a_list_change_the_work(at_once, inputs, monkeypatch):
    monkeypatch.setattr(module, "_DIGESTED_AT_ONCE", at_once)
    one, other = (work(inputs, indices=[1, 2, last]) for last in (3, 4))
    assert differing(one, other) == {"indices"}


def edited_weights(inputs):
    state_dict = random_state_dict(BASE)
    state_dict["blocks.1.mlp.w_up.weight"][3, 3] += 1e-3
    write_checkpoint(inputs, state_dict)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (edited_weights, "weights_sha256"),
        (partial(write_checkpoint, config=replace(BASE, eps=0.5)), "config"),
        (partial(write_checkpoint, config=replace(BASE, heads=2, kv_heads=1)), "config"),
        (partial(write_dataset, sizes=(20, 40)), "dataset_layout_sha256"),
        (partial(write_dataset, layout="aligned_48"), "dataset_layout_sha256"),
    ],
)
def test_other_inputs_at_the_same_paths_change_the_work(change, name, inputs):
    before = work(inputs)
    change(inputs)
    assert differing(before, work(inputs)) == {name}


def test_versions_change_the_work(inputs, monkeypatch):
    before = work(inputs)
    monkeypatch.setattr(torch, "__version__", "1.0")
    monkeypatch.setattr(module._rust, "__version__", "0.0")
    assert differing(before, work(inputs)) == {"torch_version", "dump_activations_version"}


def test_paths_and_the_way_to_choose_steps_change_nothing(inputs, tmp_path_factory):
    steps = planned(inputs).indices[:]
    other = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(inputs, other)
    assert work(other, indices=steps) == work(inputs)


def test_the_device_and_its_threads_are_told_apart_from_the_work(inputs, monkeypatch):
    before, threads = work(inputs), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other")
    try:
        plan = planned(inputs)
        assert computed_by(plan) == {"device": "cpu (other)", "threads": str(threads + 1)}
    finally:
        torch.set_num_threads(threads)
    assert fingerprint(plan) == before


def test_every_entry_of_the_metadata(inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    write_dataset(inputs, layout="packed_46", sizes=(50, 10))
    asked = {"outputs": ["pooled", "attn_out"], "layers": [-1], "labels": "move_dir,empty_cells"}
    chosen = {"steps": slice(5, None, 2), "where": " step_index >= 0 ", "seed": 9}
    how = CPU | {"n_samples": 3, "dtype": "fp16", "batch_size": 4}
    dump("checkpoint", "dataset", "a.npz", **asked, **chosen, **how)
    metadata = dict(read_dump(inputs / "a.npz").metadata)
    (computed_by,) = json.loads(metadata.pop("computed_by"))
    assert computed_by["device"].startswith("cpu (")
    assert computed_by["threads"] == str(torch.get_num_threads())
    descr = str(np.lib.format.dtype_to_descr(encode_rows(BOARDS, "packed_46").dtype))
    shards = [["steps-00000.npy", 50, descr], ["steps-00001.npy", 10, descr]]
    assert json.loads(metadata.pop("integrity")).keys() > {"indices", "boards", "pooled"}
    assert len(metadata.pop("fingerprint")) == 64
    assert metadata == {
        "checkpoint": "checkpoint",
        "tokenizer": TOKENIZER,
        "hidden_size": str(BASE.hidden),
        "num_layers": str(BASE.layers),
        "head_type": "binned_ev",
        "n_bins": str(BASE.n_bins),
        "n_samples": "28",
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
        "dataset": "dataset",
        "dataset_rows": "60",
        "dataset_layout_sha256": hashlib.sha256(json.dumps(shards).encode()).hexdigest(),
        "sampling": "steps 5:60:2",
        "where": "step_index >= 0",
        "steps": "5:60:2",
        "labels": "move_dir,empty_cells",
        "weights_sha256": naive_sha256(random_state_dict(BASE)),
    }


def test_an_edited_model_and_one_of_another_dtype_are_told_apart(inputs):
    def described(init):
        return metadata(make_plan(init, inputs / "dataset", Options(**CPU)))

    plain = described(inputs / "checkpoint")
    assert not {"hub_commit", "weights_dtype"} & plain.keys()
    model = load_encoder(inputs / "checkpoint")
    model.final_ln.weight[3] += 1
    edited = described(model)
    assert edited["weights_sha256"] == naive_sha256(model.state_dict()) != plain["weights_sha256"]
    assert edited["tokenizer"] == plain["tokenizer"] == TOKENIZER
    assert described(model.double())["weights_dtype"] == "float64"
    backwards = dict(reversed(random_state_dict(BASE).items()))
    bundle = inputs / "b.pt"
    torch.save({"model": backwards, "encoder_config": config_json(BASE)}, bundle)
    assert described(bundle)["weights_sha256"] == plain["weights_sha256"]
    assert "tokenizer" not in described(bundle)


@pytest.fixture
def trunk(tmp_path):
    weights = {k: v for k, v in random_state_dict(BASE).items() if "ev_heads" not in k}
    return save_checkpoint(tmp_path / "trunk", weights, config_json(BASE))


def test_a_trunk_has_no_bins(trunk, demo_dataset, tmp_path):
    dump(trunk, demo_dataset, tmp_path / "a.npz", outputs=["pooled", "rmsnorm_gammas"], **CPU)
    metadata = read_dump(tmp_path / "a.npz").metadata
    assert metadata["head_type"] == "none"
    assert "n_bins" not in metadata


@pytest.mark.parametrize("run", [stream, partial(dump, output="a.pt"), partial(dump, write=False)])
@pytest.mark.parametrize("key", ["head_logits", "head_probs"])
def test_the_heads_keys_of_a_trunk_are_refused(key, run, trunk, demo_dataset, monkeypatch):
    monkeypatch.chdir(trunk.parent)
    text = f"{key}.*this checkpoint has no head; leave the key out"
    with pytest.raises(ActivationUnavailableError, match=text) as caught:
        run(trunk, demo_dataset, outputs=["pooled", key], **CPU)
    assert caught.value.exit_code == 2
    assert [path.name for path in trunk.parent.iterdir()] == ["trunk"]
