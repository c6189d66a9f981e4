"""`inspect-activations --stats`: statistics of a file, stored or computed."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dump_activations import dump
from dump_activations.commands.inspect import main
from dump_activations.storage.reading.inspection import inspect
from dump_activations.storage.statistics import stored_statistics


@pytest.fixture(scope="module", params=[True, False])
def path(request, tmp_path_factory, demo_checkpoint, demo_dataset):
    """Return a file with statistics and one without, of the same activations."""
    path = tmp_path_factory.mktemp("dump") / "x.safetensors"
    dump(
        demo_checkpoint,
        demo_dataset,
        path,
        outputs=["layer_outputs", "pooled"],
        layers=[0, 3],
        stats=request.param,
        n_samples=100,
        device="cpu",
        allow_cpu=True,
    )
    return path


@pytest.fixture(scope="module")
def known(tmp_path_factory, demo_checkpoint, demo_dataset):
    path = tmp_path_factory.mktemp("dump") / "known.safetensors"
    outputs = ["layer_outputs", "pooled"]
    options = {"n_samples": 100, "device": "cpu", "allow_cpu": True}
    dump(demo_checkpoint, demo_dataset, path, outputs=outputs, layers=[0, 3], stats=True, **options)
    return stored_statistics(inspect(path))


def test_json_has_every_statistic(path, known, capsys):
    assert main([str(path), "--stats", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["stats"]
    assert shown == {
        tensor: {name: values.tolist() for name, values in of_tensor.items()}
        for tensor, of_tensor in known.items()
    }


def test_without_the_flag_there_are_none(path, capsys):
    assert main([str(path), "--json"]) == 0
    assert "stats" not in json.loads(capsys.readouterr().out)


def test_people_see_a_line_a_layer(path, known, capsys):
    assert main([str(path), "--stats"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {tuple(line[:2]): line[2:] for line in lines if len(line) == 8}
    layer = known["layer_outputs"]
    rms = np.sqrt(layer["mean_squared_norm"][1] / 64)
    assert found["layer_outputs", "3"] == [
        "1,600",
        f"{layer['norm_mean'][1]:.5g}",
        f"{rms:.5g}",
        f"{layer['min'][1].min():.5g}",
        f"{layer['max'][1].max():.5g}",
        f"{layer['count_abs_gt_6'][1].sum():,.0f}",
    ]


@pytest.mark.parametrize("left_out", ["nothing", "stats/layer_outputs/count"])
def test_a_dump_that_was_saved_again_by_another_program(path, tmp_path, capsys, left_out):
    """Without its metadata, which has the numbers of the layers."""
    again = tmp_path / "again.safetensors"
    tensors = load_file(path)
    tensors.pop(left_out, None)
    save_file(tensors, again)
    assert main([str(again), "--stats", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stats"].keys() >= {"pooled"}
    assert main([str(again), "--stats"]) == 0
    assert "pooled" in capsys.readouterr().out


def test_what_is_no_number_is_null_in_json(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    save_file({"x": np.array([[1, np.nan], [2, np.inf]], np.float32)}, path)
    assert main([str(path), "--stats", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["stats"]["x"]
    assert shown["mean"] == [1.5, None]


def test_two_files_have_no_statistics(path, capsys):
    assert main([str(path), str(path), "--stats"]) == 2
    assert "--stats: takes one file at a time" in capsys.readouterr().err
