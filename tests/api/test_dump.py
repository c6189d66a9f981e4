"""Whole dumps against a naive forward with plain hooks, and against NumPy."""

import shutil
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch

from dump_activations import StepsDataset, demo, dump, load_encoder, stream
from dump_activations.errors import OutputError
from reference.checkpoints import BASE, VARIANTS, config_json, random_state_dict, save_checkpoint
from reference.datasets import ROW_DTYPES, make_dataset, numpy_indices, read_dataset
from reference.dumps import FORMATS, TORCH_DTYPES, read_dump
from reference.model import PER_BOARD_KEYS, assert_close, expected_shapes, naive_dump
from reference.pairwise import pairs_of, pairwise

pytestmark = pytest.mark.usefixtures("disk_takes_no_time")

N, BATCH, SEED = 37, 16, 42  # the last batch is short
on_cpu = {"device": "cpu", "allow_cpu": True}
cpu_dump = partial(dump, **on_cpu)
cpu_stream = partial(stream, **on_cpu)

DATASETS = {layout: partial(make_dataset, layout=layout) for layout in ROW_DTYPES}
DATASETS["packed_46-sharded"] = partial(make_dataset, layout="packed_46", shards=4)
DATASETS["selfplay_v1-sharded"] = partial(make_dataset, layout="selfplay_v1", shards=3)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    return {name: make(root / name) for name, make in DATASETS.items()}


@pytest.fixture(scope="module")
def packed(datasets):
    return datasets["packed_46-sharded"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make(root / name) for name, make in VARIANTS.items()}


@pytest.fixture(scope="module")
def model(checkpoints):
    return load_encoder(checkpoints["sinks-gqa-4-2"].init)


def keys_of(checkpoint):
    sinks = ["attn_sinks"] if checkpoint.config.sinks else []
    return ["rmsnorm_gammas", *PER_BOARD_KEYS, *sinks]


# The last batch is short, there is one batch, and the batch is longer than the run.
BATCHES = (BATCH, N, N + 13)
NO_BF16_IN_NPZ = frozenset({"bf16", ".npz"})
CASES = pairwise(
    list(VARIANTS), list(DATASETS), FORMATS, list(TORCH_DTYPES), BATCHES, never=[NO_BF16_IN_NPZ]
)
# Of the largest value, by the bits of the mantissa.
TOLERANCE = {"fp32": 1e-5, "fp16": 2**-10, "bf16": 2**-7}


def test_every_two_settings_meet_in_a_case():
    every = [VARIANTS, DATASETS, FORMATS, TORCH_DTYPES, BATCHES]
    wanted = set().union(*map(pairs_of, product(*every)))
    found = set().union(*map(pairs_of, CASES))
    assert {frozenset(value for _, value in pair) for pair in wanted - found} == {NO_BF16_IN_NPZ}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_dump_equals_naive_forward(case, checkpoints, datasets, tmp_path):
    variant, layout, suffix, dtype, batch_size = case
    checkpoint, dataset = checkpoints[variant], datasets[layout]
    path = tmp_path / f"activations{suffix}"
    keys = keys_of(checkpoint)

    options = {"n_samples": N, "batch_size": batch_size, "seed": SEED, "dtype": dtype}
    cpu_dump(str(checkpoint.init), str(dataset.path), str(path), outputs=keys, **options)

    indices = numpy_indices(len(dataset.rows), N, SEED)
    arrays = naive_dump(checkpoint.state_dict, checkpoint.config, dataset.boards[indices], keys)
    result = read_dump(path)
    assert set(result.tensors) == {*arrays, "indices", "boards"}
    assert result.tensors["indices"].dtype == torch.int64
    assert result.tensors["boards"].dtype == torch.uint8
    np.testing.assert_array_equal(result.numpy("indices"), indices)
    np.testing.assert_array_equal(result.numpy("boards"), dataset.boards[indices])
    for key, array in arrays.items():
        assert result.tensors[key].dtype == TORCH_DTYPES[dtype]
        assert_close(result.numpy(key), array, tolerance=TOLERANCE[dtype])
    for key, shape in expected_shapes(checkpoint.config, N).items():
        assert result.tensors[key].shape == shape
    asked = {"outputs": ",".join(sorted(keys)), "dtype": dtype, "n_samples": str(N)}
    its = {"head_type": checkpoint.config.head_type, "checkpoint": str(checkpoint.init)}
    its["n_bins"] = str(checkpoint.config.logits_per_move)
    assert result.metadata.items() >= (asked | its).items()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_demo_model_plays_like_the_player_it_imitates(demo_checkpoint, demo_dataset, tmp_path):
    rows = read_dataset(demo_dataset)
    path = tmp_path / "policy.npz"
    cpu_dump(demo_checkpoint, demo_dataset, path, outputs=["head_probs"], n_samples=2000)
    result = read_dump(path)
    rows = rows[result.numpy("indices")]
    value = result.numpy("head_probs") @ np.arange(10)
    legal = rows["ev_legal"][:, None] >> np.arange(4) & 1
    move = np.where(legal, value, -1).argmax(axis=1)
    assert (move == rows["move_dir"]).mean() > 0.7


def test_the_demo_in_one_call(demo_checkpoint, demo_dataset, tmp_path):
    options = {"outputs": "layer_outputs", "layers": -1, "n_samples": 20, "labels": "move_dir"}
    options |= {"dtype": "fp16", "stats": True}
    demo.dump(tmp_path / "a.npz", **options)
    cpu_dump(demo_checkpoint, demo_dataset, tmp_path / "b.npz", **options)
    ours, other = read_dump(tmp_path / "a.npz"), read_dump(tmp_path / "b.npz")
    shapes = [{name: each.shape for name, each in file.tensors.items()} for file in (ours, other)]
    assert shapes[0] == shapes[1]
    for name in ("fingerprint", "layers", "labels", "dtype"):
        assert ours.metadata[name] == other.metadata[name]
    assert ours.metadata["layers"] == "3"
    with pytest.raises(OutputError, match="of other work"):
        demo.dump(tmp_path / "a.npz")
    demo.dump(tmp_path / "a.npz", overwrite=True)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_storage_dtype_rounds_the_fp32_values(dtype, model, packed, tmp_path):
    keys = [*PER_BOARD_KEYS, "rmsnorm_gammas", "attn_sinks"]
    wide, narrow = tmp_path / "wide.safetensors", tmp_path / "narrow.safetensors"
    cpu_dump(model, packed.path, wide, outputs=keys, n_samples=N, batch_size=BATCH)
    cpu_dump(model, packed.path, narrow, outputs=keys, n_samples=N, batch_size=BATCH, dtype=dtype)
    wide, narrow = read_dump(wide), read_dump(narrow)
    assert narrow.metadata["dtype"] == dtype
    assert set(narrow.tensors) == set(wide.tensors)
    for key, tensor in wide.tensors.items():
        stored = tensor.to(TORCH_DTYPES[dtype]) if tensor.is_floating_point() else tensor
        assert narrow.tensors[key].dtype == stored.dtype
        assert torch.equal(narrow.tensors[key], stored), key


@pytest.mark.parametrize("suffix", FORMATS)
def test_many_batches_each_in_its_place(suffix, model, packed, tmp_path):
    """Every slot of every ring is used many times over."""
    path = tmp_path / f"many{suffix}"
    keys = ["final_hidden", "layer_outputs"]
    indices = np.random.default_rng(5).integers(0, len(packed.rows), size=1001)
    cpu_dump(model, packed.path, path, outputs=keys, indices=indices, batch_size=8)
    result = read_dump(path)
    np.testing.assert_array_equal(result.numpy("indices"), indices)
    np.testing.assert_array_equal(result.numpy("boards"), packed.boards[indices])
    once = {}
    for batch in cpu_stream(
        model, packed.path, outputs=keys, indices=np.arange(len(packed.rows)), batch_size=500
    ):
        once |= {key: torch.as_tensor(batch[key]).clone() for key in keys}
    for key in keys:
        assert_close(result.numpy(key), once[key].double().numpy()[indices])


def test_indices_keep_their_order_and_duplicates(model, packed, tmp_path):
    indices = np.array([[[5, 100, 5], [0, 0, 99]], [[3, 5, 64], [100, 1, 0]]])
    path = tmp_path / "some.safetensors"
    cpu_dump(model, packed.path, path, outputs=["pooled"], indices=indices, batch_size=5)
    result = read_dump(path)
    assert result.metadata["n_samples"] == "12"
    np.testing.assert_array_equal(result.numpy("indices"), indices.ravel())
    np.testing.assert_array_equal(result.numpy("boards"), packed.boards[indices.ravel()])
    pooled = result.tensors["pooled"]
    assert torch.allclose(pooled[0], pooled[2], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(pooled[0], pooled[1], rtol=1e-2)


def test_model_and_dataset_objects_serve_as_well_as_paths(checkpoints, packed, tmp_path):
    checkpoint = checkpoints["gqa-4-2"]
    by_path, by_object = tmp_path / "path.safetensors", tmp_path / "object.safetensors"
    cpu_dump(checkpoint.init, packed.path, by_path, outputs=["head_logits"], n_samples=N)
    objects = load_encoder(checkpoint.init), StepsDataset(packed.path)
    cpu_dump(*objects, by_object, outputs=["head_logits"], n_samples=N)
    by_path, by_object = read_dump(by_path), read_dump(by_object)
    assert set(by_path.tensors) == set(by_object.tensors)
    assert all(torch.equal(by_path.tensors[key], by_object.tensors[key]) for key in by_path.tensors)
    assert by_path.metadata == by_object.metadata


@pytest.mark.parametrize("precision", ["bf16", "bf16-true"])
def test_bf16_arithmetic_is_near_fp32(precision, checkpoints, packed, tmp_path):
    """Eight bits of mantissa: a percent or so of the largest value after two layers."""
    checkpoint = checkpoints["gqa-4-2"]
    path = tmp_path / "low.safetensors"
    options = {"n_samples": N, "batch_size": BATCH, "precision": precision}
    cpu_dump(checkpoint.init, packed.path, path, outputs=PER_BOARD_KEYS, **options)
    boards = packed.boards[numpy_indices(len(packed.rows), N, 0)]
    result = read_dump(path)
    for key, array in naive_dump(checkpoint.state_dict, checkpoint.config, boards).items():
        assert result.tensors[key].dtype == torch.float32
        assert_close(result.numpy(key), array, tolerance=5e-2)
        if key == "layer_outputs":
            with pytest.raises(AssertionError):
                assert_close(result.numpy(key), array)


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_compiled_model_gives_the_same_numbers(checkpoints, packed, tmp_path):
    checkpoint = checkpoints["sinks-gqa-4-2"]  # Two layers, which share the generated code.
    path = tmp_path / "compiled.npz"
    # Graphs of every key: tests/model/test_compiled.py. Here the compiler generates code, for 10 s.
    keys = ["final_hidden", "head_probs", "layer_outputs", "attn_pattern", "attn_q", "mlp_post"]
    options = {"n_samples": N, "batch_size": BATCH, "compile": True}
    cpu_dump(checkpoint.init, packed.path, path, outputs=keys, **options)
    boards = packed.boards[numpy_indices(len(packed.rows), N, 0)]
    result = read_dump(path)
    for key, array in naive_dump(checkpoint.state_dict, checkpoint.config, boards, keys).items():
        assert_close(result.numpy(key), array)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_stream_yields_what_dump_writes(dtype, model, packed, tmp_path):
    path = tmp_path / "streamed.safetensors"
    keys = list(PER_BOARD_KEYS)
    options = {"outputs": keys, "n_samples": N, "batch_size": BATCH, "seed": SEED, "dtype": dtype}
    cpu_dump(model, packed.path, path, **options)
    written = read_dump(path)
    seen, sizes = {key: [] for key in [*keys, "indices", "boards"]}, []
    for batch in cpu_stream(model, packed.path, **options):
        for key in keys:
            seen[key].append(torch.as_tensor(batch[key]).clone())
        seen["indices"].append(torch.as_tensor(batch.indices).clone())
        seen["boards"].append(torch.as_tensor(batch.boards).clone())
        sizes.append(len(batch.indices))
    assert sizes == [16, 16, 5]
    for key, parts in seen.items():
        assert torch.equal(torch.cat(parts), written.tensors[key]), key


def test_without_write_nothing_is_written(model, packed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forwards = []
    handle = model.blocks[0].register_forward_hook(lambda *_: forwards.append(1))
    path = tmp_path / "no" / "such" / "place.safetensors"
    cpu_dump(model, packed.path, path, n_samples=N, batch_size=BATCH, write=False)
    handle.remove()
    assert list(tmp_path.iterdir()) == []
    assert len(forwards) == 3


def test_the_same_call_writes_the_same_bytes(model, packed, tmp_path):
    for suffix in FORMATS:
        paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
        for path in paths:
            cpu_dump(model, packed.path, path, outputs=PER_BOARD_KEYS, n_samples=N)
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_vocabulary_of_16_serves_boards_without_65536(datasets, tmp_path):
    config = replace(BASE, vocab=16)
    state_dict = random_state_dict(config)
    save_checkpoint(tmp_path / "small", state_dict, config_json(config))
    dataset = datasets["legacy_move"]
    path = tmp_path / "small.npz"
    cpu_dump(tmp_path / "small", dataset.path, path, outputs=["head_logits"], n_samples=N, seed=4)
    boards = dataset.boards[numpy_indices(len(dataset.rows), N, 4)]
    expected = naive_dump(state_dict, config, boards, ["head_logits"])["head_logits"]
    assert_close(read_dump(path).numpy("head_logits"), expected)


def test_metadata_says_of_a_loaded_model_what_it_is(checkpoints, packed, tmp_path):
    init = checkpoints["gqa-4-2"].init
    for untrained in (False, True):
        model = load_encoder(init, random_init=untrained)
        path = tmp_path / f"{untrained}.pt"
        cpu_dump(model, packed.path, path, n_samples=3)
        assert read_dump(path).metadata["random_init"] == str(untrained).lower()
    with pytest.raises(ValueError, match="random_init"):
        cpu_dump(model, packed.path, tmp_path / "b.pt", n_samples=3, random_init=True)
