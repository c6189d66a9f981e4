"""The fingerprint names everything that determines a run's values, and nothing else."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dump_activations.options import Options
from dump_activations.pipeline import plan as module
from dump_activations.pipeline.plan import Plan, computed_by, fingerprint, make_plan
from reference.checkpoints import BASE, config_json, random_state_dict, save_checkpoint
from reference.datasets import encode_rows, random_boards, write_shards

CPU = {"outputs": ["pooled"], "n_samples": 7, "device": "cpu", "allow_cpu": True}
BOARDS = random_boards(60, seed=1)


def planned(directory: Path, **options) -> Plan:
    return make_plan(directory / "checkpoint", directory / "dataset", Options(**(CPU | options)))


def work(directory: Path, **options) -> dict[str, str]:
    return fingerprint(planned(directory, **options))


def write_dataset(directory: Path, *, layout: str = "packed_46", sizes=(30, 30)) -> None:
    directory.mkdir(exist_ok=True)
    for shard in directory.iterdir():
        shard.unlink()
    write_shards(directory, encode_rows(BOARDS, layout), list(sizes))


@pytest.fixture
def inputs(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", random_state_dict(BASE), config_json(BASE))
    write_dataset(tmp_path / "dataset")
    return tmp_path


def differing(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {name for name in one | other if one.get(name) != other.get(name)}


def test_the_same_call_is_the_same_work(inputs):
    assert differing(work(inputs), work(inputs)) == set()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"precision": "bf16"}, {"precision"}),
        ({"compile": True}, {"compile"}),
        ({"random_init": True}, {"weights_sha256"}),
        ({"split_layers": True}, {"split_layers"}),
        ({"labels": "move_dir"}, {"labels"}),
        ({"batch_size": 8}, {"batch_size"}),
        ({"dtype": "fp16"}, {"dtype"}),
        ({"outputs": ["final_hidden"]}, {"outputs"}),
        ({"seed": 1}, {"indices"}),
        ({"n_samples": 8}, {"n_samples", "indices"}),
        ({"indices": np.arange(7)}, {"indices"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option(options, names, inputs):
    assert differing(work(inputs), work(inputs, **options)) == names


def test_the_steps_of_a_list(inputs):
    one, other = (work(inputs, indices=[1, 2, last]) for last in (3, 4))
    assert differing(one, other) == {"indices"}


def test_weights_of_the_same_shapes_at_the_same_path(inputs):
    before = work(inputs)
    state_dict = random_state_dict(BASE)
    state_dict["blocks.1.mlp.w_up.weight"][3, 3] += 1e-3
    save_checkpoint(inputs / "checkpoint", state_dict, config_json(BASE))
    assert differing(before, work(inputs)) == {"weights_sha256"}


@pytest.mark.parametrize("change", [{"eps": 0.5}, {"heads": 2, "kv_heads": 1}])
def test_a_config_of_the_same_weights(change, inputs):
    before = work(inputs)
    config = config_json(replace(BASE, **change))
    save_checkpoint(inputs / "checkpoint", random_state_dict(BASE), config)
    assert differing(before, work(inputs)) == {"config"}


@pytest.mark.parametrize("change", [{"sizes": (20, 40)}, {"layout": "aligned_48"}])
def test_shards_of_as_many_rows(change, inputs):
    before = work(inputs)
    write_dataset(inputs / "dataset", **change)
    assert differing(before, work(inputs)) == {"dataset_layout_sha256"}


def test_versions(inputs, monkeypatch):
    before = work(inputs)
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert differing(before, work(inputs)) == {"torch_version"}
    monkeypatch.undo()
    monkeypatch.setattr(module, "version", lambda _package: "0.0")
    assert differing(before, work(inputs)) == {"dump_activations_version"}


def test_paths_and_the_way_to_choose_steps_do_not_count(inputs, tmp_path_factory):
    steps = planned(inputs).indices[:]
    other = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(inputs, other)
    assert work(other, indices=steps) == work(inputs)


def test_the_device_and_its_threads_are_told_apart_from_the_work(inputs, monkeypatch):
    before, threads = work(inputs), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    monkeypatch.setattr(module, "device_name", lambda _device: "another")
    try:
        plan = planned(inputs)
    finally:
        changed = computed_by(plan)
        torch.set_num_threads(threads)
    assert fingerprint(plan) == before
    assert changed == {"device": "another", "threads": str(threads + 1)}
