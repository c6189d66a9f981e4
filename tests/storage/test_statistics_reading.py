"""Statistics read back: those that a file has, and what reading a file without them gives."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dump_activations import ActivationsFile, InvalidArgumentError, OutputError, dump
from dump_activations.statistics import STATISTICS
from dump_activations.storage.reading.inspection import find_damage, inspect
from dump_activations.storage.reading.statistics import compute_statistics, stored_statistics
from reference.dumps import read_dump
from reference.statistics import numpy_statistics

N = 300
LAYERS = (1, 3)
KEYS = ["attn_q", "attn_pattern", "layer_outputs", "pooled", "head_logits"]
PER_LAYER = KEYS[:3]
NAMES = [each.name for each in STATISTICS]
SCALARS = {each.name for each in STATISTICS if not each.per_feature}
FORMS = [(".safetensors", "fp32", False), (".pt", "bf16", True), (".npz", "fp16", False)]


@pytest.fixture(scope="module")
def make(tmp_path_factory, demo_checkpoint, demo_dataset):
    made: dict[tuple, Path] = {}

    def make(suffix: str, dtype: str, split: bool, *, stats: bool = True) -> Path:
        form = (suffix, dtype, split, stats)
        if form not in made:
            made[form] = tmp_path_factory.mktemp("dumps") / f"x{suffix}"
            dump(
                demo_checkpoint,
                demo_dataset,
                made[form],
                outputs=[*KEYS, "rmsnorm_gammas"],
                layers=LAYERS,
                split_layers=split,
                stats=stats,
                n_samples=N,
                batch_size=64,
                dtype=dtype,
                device="cpu",
                allow_cpu=True,
            )
        return made[form]

    return make


@pytest.fixture(params=FORMS, ids=lambda form: "-".join(map(str, form)))
def form(request):
    return request.param


def vectors(values: torch.Tensor) -> np.ndarray:
    return values.double().reshape(-1, values.shape[-1]).numpy()


def test_a_dump_has_what_numpy_makes_of_its_stored_values(make, form):
    acts = ActivationsFile(make(*form))
    assert acts.keys() == [key for key in acts.keys() if key in KEYS]  # noqa: SIM118
    for key in KEYS:
        layers = LAYERS if key in PER_LAYER else [None]
        found = acts.stats(key)
        for number, layer in enumerate(layers):
            of_layer = acts.stats(key, layer)
            expected = numpy_statistics(vectors(acts.read(key, layer=layer)))
            assert [*of_layer] == NAMES
            for name, values in expected.items():
                assert of_layer[name].dtype == np.float64
                assert of_layer[name].shape == np.shape(values)
                np.testing.assert_allclose(of_layer[name], values, rtol=1e-9, atol=1e-300)
                stacked = found[name][number] if layer is not None else found[name]
                np.testing.assert_array_equal(stacked, of_layer[name])


def test_statistics_are_among_the_tensors_that_are_digested(make, form):
    path = make(*form)
    assert find_damage(inspect(path), threads=2) == []
    plain, found = read_dump(make(*form, stats=False)), read_dump(path)
    added = found.tensors.keys() - plain.tensors.keys()
    stored = [f"{key}.{n}" for key in PER_LAYER for n in LAYERS] if form[2] else PER_LAYER
    tensors = [*stored, "pooled", "head_logits"]
    assert added == {f"stats/{tensor}/{name}" for tensor in tensors for name in NAMES}
    assert all(torch.equal(found.tensors[name], plain.tensors[name]) for name in plain.tensors)
    assert found.metadata["stats"] == "true"
    assert "stats" not in plain.metadata
    assert found.metadata["fingerprint"] != plain.metadata["fingerprint"]


def test_computed_statistics_are_the_stored_ones_to_the_bit(make, form):
    stored = stored_statistics(inspect(make(*form)))
    without = inspect(make(*form, stats=False))
    assert stored_statistics(without) == {}
    seen: list[tuple[int, int]] = []
    computed = compute_statistics(without, threads=2, progress=lambda *at: seen.append(at))
    assert computed.keys() == stored.keys()
    for tensor, statistics in computed.items():
        assert [*statistics] == NAMES
        for name, values in statistics.items():
            assert values.shape == stored[tensor][name].shape
            assert values.tobytes() == stored[tensor][name].tobytes(), (tensor, name)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_what_has_no_statistics_says_so(make):
    acts = ActivationsFile(make(*FORMS[0], stats=False))
    with pytest.raises(InvalidArgumentError, match=r"pooled has no statistics .* stats=True"):
        acts.stats("pooled")
    acts = ActivationsFile(make(*FORMS[0]))
    with pytest.raises(InvalidArgumentError, match="has layers 1, 3"):
        acts.stats("attn_q", 2)
    with pytest.raises(InvalidArgumentError, match="no 'attn_k' in it"):
        acts.stats("attn_k")
    with pytest.raises(InvalidArgumentError, match="final_ln has no statistics"):
        acts.stats("rmsnorm_gammas/final_ln")
    with pytest.raises(InvalidArgumentError, match="of one file"):
        ActivationsFile(make(*FORMS[0]), make(*FORMS[0])).stats("pooled")


def test_a_foreign_file_has_statistics_of_its_floats(tmp_path):
    path = tmp_path / "x.safetensors"
    values = torch.randn(50, 4, 7)
    others = {"n": torch.arange(50), "one": torch.rand(50), "of_layers": torch.rand(50, 3)}
    save_file({"hidden": values, **others}, path, {"num_layers": "3"})
    computed = compute_statistics(inspect(path), threads=1)
    assert [*computed] == ["hidden"]
    for name, expected in numpy_statistics(vectors(values)).items():
        np.testing.assert_allclose(
            computed["hidden"][name],
            np.broadcast_to(expected, computed["hidden"][name].shape),
            1e-9,
        )


def test_what_cannot_be_read_where_it_lies(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(
        path, hidden=np.ones((3, 2), np.float32), **{"stats/hidden/mean": np.ones(3)}
    )
    assert stored_statistics(inspect(path)) == {}
    with pytest.raises(OutputError, match=r"x.npz: hidden is compressed or not in C order"):
        compute_statistics(inspect(path), threads=1)


@pytest.mark.parametrize(
    "count", [torch.tensor(3.0), torch.zeros(0), torch.zeros(2), torch.zeros(1)]
)
def test_tensors_that_are_only_called_statistics(tmp_path, count):
    dtype = torch.float32 if count.shape == (1,) else torch.float64
    tensors = {"indices": torch.arange(5), "pooled": torch.rand(5, 4)}
    path = tmp_path / "x.safetensors"
    save_file(tensors | {"stats/pooled/count": count.to(dtype)}, path)
    with pytest.raises(InvalidArgumentError, match="pooled has no statistics"):
        ActivationsFile(path).stats("pooled")


def test_a_file_cut_short_meanwhile_is_an_error(make, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(make(*FORMS[0], stats=False).read_bytes())
    inspection = inspect(path)
    os.truncate(path, inspection.size - 1000)
    with pytest.raises(OutputError, match="is another file than it was"):
        compute_statistics(inspection, threads=1)

    def interrupt(_done: int, _whole: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_statistics(inspect(make(*FORMS[0])), threads=2, progress=interrupt)
