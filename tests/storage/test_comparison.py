"""Two files side by side: what differs, against NumPy, in every pair of formats."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dump_activations.commands.inspect import main
from dump_activations.storage.reading import comparison
from dump_activations.storage.reading.comparison import Difference, compare
from dump_activations.storage.reading.dump_files import inspect_dump
from output_support import SUFFIXES, small_dump, write_dump

ROWS, WIDTH = 40, 7


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Cut tensors where neither rows nor anything else ends."""
    monkeypatch.setattr(comparison, "_CHUNK", 11)


def save(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata)
    elif path.suffix == ".pt":
        torch.save({**tensors, "metadata": metadata}, path)
    else:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        np.savez(path, **arrays, metadata=json.dumps(metadata))
    return path


def compared(tmp_path: Path, first: torch.Tensor, second: torch.Tensor) -> Difference:
    paths = [
        save(tmp_path / f"{name}.safetensors", {"x": tensor})
        for name, tensor in {"first": first, "second": second}.items()
    ]
    (pair,) = compare(*map(inspect_dump, paths), threads=2).tensors
    return pair.difference


@pytest.mark.parametrize(
    "dtypes",
    [*itertools.combinations_with_replacement(["float64", "float32", "float16", "bfloat16"], 2)],
    ids="-".join,
)
def test_floating_tensors_differ_as_numpy_says(dtypes, tmp_path):
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(ROWS, WIDTH, generator=generator).to(getattr(torch, dtypes[0]))
    second = first.clone().to(getattr(torch, dtypes[1]))
    second[5:9] += 0.25
    second[17, 3] = 31
    a, b = first.double().numpy(), second.double().numpy()
    distance = np.abs(a - b)
    assert compared(tmp_path, first, second) == Difference(
        elements=np.count_nonzero(a != b),
        nonfinite=0,
        largest=distance.max(),
        relative=(distance / np.maximum(np.abs(a), np.abs(b))).max(),
        place=(17, 3),
    )


@pytest.mark.parametrize("dtype", ["int64", "uint8"])
def test_integers_differ_exactly(dtype, tmp_path):
    first = torch.zeros(ROWS, WIDTH, dtype=getattr(torch, dtype))
    second = first.clone()
    low, high = {"int64": (-(2**63), 2**63 - 1), "uint8": (0, 255)}[dtype]
    first[30, 1], second[30, 1] = low, high
    first[31] = second[31] = high
    found = compared(tmp_path, first, second)
    assert (found.elements, found.largest, found.place) == (1, float(high - low), (30, 1))
    first[30, 1] = second[30, 1] = high
    if dtype == "int64":  # float64 has neither
        first[30, 1] -= 1
        found = compared(tmp_path, first, second)
        assert (found.elements, found.largest, found.place) == (1, 1.0, (30, 1))


def test_nonfinite_values_are_counted_apart(tmp_path):
    first = torch.zeros(ROWS, WIDTH)
    first[2], first[3], first[4, 0] = float("nan"), float("inf"), -0.0
    second = first.clone()
    second[4, 0] = 0.0
    assert compared(tmp_path, first, second) == Difference()
    first[6, 6] = 1.0
    second[6, 6], second[20, 0], second[39, 6] = float("nan"), float("inf"), 0.5
    found = compared(tmp_path, first, second)
    assert found == Difference(3, 2, largest=0.5, relative=1.0, place=(39, 6))
    second[39, 6] = 0.0
    assert compared(tmp_path, first, second) == Difference(2, 2)


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(SUFFIXES, 2)])
def test_one_dump_in_two_formats_is_equal(first, second, tmp_path, capsys):
    paths = [str(write_dump(tmp_path / f"x{suffix}", small_dump())) for suffix in (first, second)]
    assert main(paths) == 0
    assert "all 5 tensors are equal" in capsys.readouterr().out


@pytest.fixture
def unlike(tmp_path):
    """Return two files that differ in every way that files can."""
    rows = torch.arange(12).reshape(4, 3)
    first = {"same": rows, "values": rows.float(), "dtype": rows.float()}
    first |= {"shape": rows.clone(), "ours": rows.clone(), "indices": rows[:, 0].clone()}
    second = {"same": rows, "values": rows.float() + torch.tensor([0, 0, 0.5])}
    second |= {"dtype": rows.half(), "shape": rows[1:], "theirs": rows, "indices": rows[:, 1]}
    steps = {"steps": "1:2:1"}
    return [
        save(tmp_path / "a.pt", first, seed="0", dtype="fp32", fingerprint="1"),
        save(tmp_path / "b.npz", second, seed="1", dtype="fp32", fingerprint="2", **steps),
    ]


def test_json_has_all_differences(unlike, capsys):
    assert main([*map(str, unlike), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["files"] == [str(path) for path in unlike]
    assert said["equal"] is False
    assert said["metadata"] == {"seed": [0, 1], "steps": [None, "1:2:1"]}
    tensors = {tensor.pop("key"): tensor for tensor in said["tensors"]}
    assert {name for name, tensor in tensors.items() if tensor["equal"]} == {"same"}
    assert tensors["dtype"]["dtypes"] == ["float32", "float16"]
    assert tensors["shape"]["shapes"] == [[4, 3], [3, 3]]
    assert tensors["shape"]["difference"] is None
    assert tensors["ours"]["shapes"] == [[4, 3], None]
    assert tensors["theirs"]["dtypes"] == [None, "int64"]
    difference = {"elements": 4, "nonfinite": 0, "largest": 0.5, "relative": 0.2, "place": [0, 2]}
    assert tensors["values"]["difference"] == difference


def test_statistics_are_only_counted_where_activations_differ(tmp_path, capsys):
    def saved(name: str, value: float, mean: float) -> str:
        tensors = {"pooled": [value], "stats/pooled/mean": [mean], "stats/pooled/max": [mean]}
        arrays = {key: torch.tensor(values) for key, values in tensors.items()}
        return str(save(tmp_path / f"{name}.safetensors", arrays))

    first, second, third = saved("a", 0, 0), saved("b", 1, 1), saved("c", 0, 1)
    assert main([first, second]) == 1
    out = capsys.readouterr().out
    assert "stats/" not in out
    assert out.endswith("3 of 3 tensors differ, 2 of them statistics\n")
    assert main([first, third]) == 1
    out = capsys.readouterr().out
    assert "stats/pooled/mean" in out
    assert "stats/pooled/max" in out


def test_tables_show_the_differences(unlike, capsys):
    assert main([*map(str, unlike)]) == 1
    lines = capsys.readouterr().out.splitlines()
    found = [line.split() for line in lines]
    assert ["seed", "a", "0"] in found
    assert ["steps", "a", "-"] in found
    assert ["ours", "int64", "(4,", "3)", "-"] in found
    assert ["dtype", "float32", "(4,", "3)", "float16", "(4,", "3)"] in found
    assert ["values", "4", "33.33%", "0", "0.5", "0.2", "[0,", "2]"] in found
    assert not any(words[:1] == ["same"] for words in found)
    assert lines[-1].startswith("6 of 7 tensors differ; their rows are of other boards")


def test_files_that_cannot_be_compared_are_neither_equal_nor_different(unlike, tmp_path, capsys):
    ours = str(unlike[0])
    np.savez_compressed(tmp_path / "c.npz", same=np.arange(12).reshape(4, 3))
    np.savez(tmp_path / "d.npz", same=np.zeros((4, 3), np.complex64))
    (tmp_path / "e.pt").write_text("a text")
    for other, reason in {
        "c.npz": "same is compressed",
        "d.npz": "<c8, which cannot be compared",
        "e.pt": "not a whole pt file",
        "missing.pt": "No such file",
    }.items():
        assert main([ours, str(tmp_path / other)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert str(tmp_path / other) in err
        assert reason in err
    assert main([ours, ours, "--verify"]) == 2
