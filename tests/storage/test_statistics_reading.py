"""Statistics read back: stored ones, and those computed from a file without them."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dump_activations import ActivationsFile, InvalidArgumentError, OutputError
from dump_activations.dtypes import TensorSpec
from dump_activations.storage.reading import stored_statistics as reading
from dump_activations.storage.reading.dump_files import inspect_dump
from dump_activations.storage.reading.stored_statistics import compute_statistics, stored_statistics
from dump_activations.storage.statistics import STATISTICS, RunningStatistics, statistics_specs
from reference.statistics import numpy_statistics

N = 300
LAYERS = (1, 3)
NAMES = [each.name for each in STATISTICS]
GENERATOR = torch.Generator().manual_seed(0)
ACTIVATIONS = {
    "attn_q": torch.randn(N, 2, 16, 24, generator=GENERATOR),
    "layer_outputs.1": (torch.randn(N, 16, 8, generator=GENERATOR) + 1000).bfloat16(),
    "layer_outputs.3": torch.randn(N, 16, 8, generator=GENERATOR).bfloat16(),
    "pooled": 5 * torch.randn(N, 7, generator=GENERATOR).half(),
}
OTHERS = {"indices": torch.arange(N), "rmsnorm_gammas/final_ln": torch.ones(8)}


def taken() -> dict[str, torch.Tensor]:
    """Take the statistics of the activations in batches of 64 boards."""
    specs = [
        TensorSpec(name, str(of.dtype).removeprefix("torch."), tuple(of.shape))
        for name, of in ACTIVATIONS.items()
    ]
    for spec in [*specs]:
        layers = len(LAYERS) if spec.name == "attn_q" else None
        specs += statistics_specs(spec.name, layers=layers, width=spec.shape[-1])
    running = RunningStatistics(specs)
    for batch, start in enumerate(range(0, N, 64)):
        rows = {name: of[start : start + 64] for name, of in ACTIVATIONS.items()}
        bytes_of = {name: of.reshape(-1).view(torch.uint8).numpy() for name, of in rows.items()}
        running.add(batch, {name: running.measure(name, of) for name, of in bytes_of.items()})
    return {name: torch.from_numpy(of) for name, of in running.tensors().items()}


def saved(directory: Path, statistics: dict[str, torch.Tensor]) -> Path:
    tensors = {**OTHERS, **ACTIVATIONS, **statistics}
    save_file(tensors, directory / "x.safetensors", {"num_layers": "4", "layers": "1,3"})
    return directory / "x.safetensors"


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("dumps"), {})


@pytest.fixture(scope="module")
def with_them(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("dumps"), taken())


@pytest.mark.parametrize("key", ["attn_q", "layer_outputs", "pooled"])
def test_a_key_has_the_statistics_of_its_values(with_them, key):
    acts = ActivationsFile(with_them)
    found = acts.stats(key)
    for number, layer in enumerate([None] if key == "pooled" else LAYERS):
        of_layer = acts.stats(key, layer)
        values = acts.read(key, layer=layer).double()
        assert [*of_layer] == NAMES
        for name, expected in numpy_statistics(values.flatten(0, -2).numpy()).items():
            assert of_layer[name].dtype == np.float64
            assert of_layer[name].shape == np.shape(expected)
            np.testing.assert_allclose(of_layer[name], expected, rtol=1e-9, atol=1e-12)
            stacked = found[name] if layer is None else found[name][number]
            np.testing.assert_array_equal(stacked, of_layer[name])
    if key == "attn_q":  # to the bit
        stored = load_file(with_them)
        for name, values in found.items():
            np.testing.assert_array_equal(values, stored[f"stats/{key}/{name}"])


@pytest.mark.parametrize("nbytes", [1, 50_000])  # less than a row, and several
def test_a_file_without_statistics_is_read_for_them(with_them, without, monkeypatch, nbytes):
    stored = stored_statistics(inspect_dump(with_them))
    assert stored.keys() == ACTIVATIONS.keys()
    assert stored_statistics(inspect_dump(without)) == {}
    monkeypatch.setattr(reading, "_CHUNK_NBYTES", nbytes)
    seen: list[tuple[int, int]] = []
    computed = compute_statistics(
        inspect_dump(without), threads=3, progress=lambda *at: seen.append(at)
    )
    again = compute_statistics(inspect_dump(without), threads=1)
    assert computed.keys() == stored.keys()
    for tensor, of_tensor in computed.items():
        assert [*of_tensor] == NAMES
        for name, values in of_tensor.items():
            assert values.tobytes() == again[tensor][name].tobytes()
            assert values.shape == stored[tensor][name].shape
            np.testing.assert_allclose(values, stored[tensor][name], rtol=1e-12, atol=1e-12)
    assert len(seen) > len(ACTIVATIONS)
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]


def test_a_key_without_statistics_is_an_error(with_them, without):
    with pytest.raises(InvalidArgumentError, match=r"pooled has no statistics .* stats=True"):
        ActivationsFile(without).stats("pooled")
    for paths in ((without, with_them), (with_them, without)):
        with pytest.raises(InvalidArgumentError, match="pooled has no statistics"):
            ActivationsFile(*paths).stats("pooled")
    for wrong, error in {
        ("attn_q", 2): "has layers 1, 3",
        ("attn_k",): "no 'attn_k' in it",
        ("rmsnorm_gammas/final_ln",): "final_ln has no statistics",
    }.items():
        with pytest.raises(InvalidArgumentError, match=error):
            ActivationsFile(with_them).stats(*wrong)


def test_a_foreign_file_has_statistics_of_its_floats(tmp_path):
    path = tmp_path / "x.safetensors"
    hidden = torch.randn(50, 4, 7)
    others = {"n": torch.arange(50), "one": torch.rand(50), "of_layers": torch.rand(50, 3)}
    save_file({"hidden": hidden, **others}, path, {"num_layers": "3"})
    computed = compute_statistics(inspect_dump(path), threads=1)
    assert [*computed] == ["hidden"]
    for name, expected in numpy_statistics(hidden.double().reshape(-1, 7).numpy()).items():
        found = computed["hidden"][name]
        np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), 1e-9, 1e-12)


def test_compressed_tensors_have_no_statistics(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(
        path, hidden=np.ones((3, 2), np.float32), **{"stats/hidden/mean": np.ones(3)}
    )
    assert stored_statistics(inspect_dump(path)) == {}
    with pytest.raises(OutputError, match=r"x.npz: hidden is compressed or not in C order"):
        compute_statistics(inspect_dump(path), threads=1)


@pytest.mark.parametrize(
    "count", [torch.tensor(3.0), torch.zeros(0), torch.zeros(2), torch.zeros(1)]
)
def test_tensors_that_only_have_the_name_of_statistics_are_ignored(tmp_path, count):
    dtype = torch.float32 if count.shape == (1,) else torch.float64
    tensors = {"indices": torch.arange(5), "pooled": torch.rand(5, 4)}
    path = tmp_path / "x.safetensors"
    save_file(tensors | {"stats/pooled/count": count.to(dtype)}, path)
    with pytest.raises(InvalidArgumentError, match="pooled has no statistics"):
        ActivationsFile(path).stats("pooled")


def test_a_file_that_changes_meanwhile_is_an_error(without, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(without.read_bytes())
    dump = inspect_dump(path)
    os.truncate(path, dump.size - 1000)
    with pytest.raises(OutputError, match="was replaced or changed since"):
        compute_statistics(dump, threads=1)
    status = path.stat()  # as if it were cut after it was opened
    dump.files[0] = replace(dump.files[0], stamp=(status.st_ino, status.st_mtime_ns))
    with pytest.raises(OutputError, match="cut short"):
        compute_statistics(dump, threads=1)


def test_an_interrupted_computation_ends(without):
    def interrupt(_done: int, _in_all: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_statistics(inspect_dump(without), threads=2, progress=interrupt)
