"""Dumps on a GPU against the naive forward on the CPU."""

from functools import partial

import numpy as np
import pytest
import torch

from dump_activations import dump, load_encoder, stream
from dump_activations.commands.dump import main
from reference.checkpoints import VARIANTS, load_demo
from reference.datasets import make_dataset, naive_boards, numpy_indices, read_dataset
from reference.dumps import FORMATS, TORCH_DTYPES, read_dump
from reference.model import LAYER_KEYS, PER_BOARD_KEYS, assert_close, naive_dump

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("disk_takes_no_time")]

SAMPLES, BATCH, SEED = 301, 32, 11  # ten batches: more than any ring has slots; a short last one
ARCHITECTURES = [
    *("mha", "gqa-4-2", "gqa-6-3", "gqa-4-1", "sinks-mha", "sinks-gqa-6-2", "qk-norm"),
    *("qk-norm-sinks-policy", "policy", "one-layer", "large-eps", "bf16", "fp16", "bundle-new"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"), "packed_46", n=977, shards=3)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: VARIANTS[name](root / name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def model(checkpoints):
    return load_encoder(checkpoints["sinks-gqa-6-2"].init, device="cuda")


run = partial(dump, n_samples=SAMPLES, batch_size=BATCH, seed=SEED, device="cuda")
KEYS_WITH_WEIGHTS = [*PER_BOARD_KEYS, "rmsnorm_gammas", "attn_sinks"]


def assert_equals_reference(path, checkpoint, dataset, keys):
    result = read_dump(path)
    indices = numpy_indices(len(dataset.rows), SAMPLES, SEED)
    boards = dataset.boards[indices]
    expected = naive_dump(checkpoint.state_dict, checkpoint.config, boards, keys)
    assert set(result.tensors) == {*expected, "indices", "boards"}
    np.testing.assert_array_equal(result.numpy("indices"), indices)
    np.testing.assert_array_equal(result.numpy("boards"), boards)
    for key, array in expected.items():
        assert result.tensors[key].dtype == torch.float32
        assert_close(result.numpy(key), array)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_every_architecture(variant, suffix, checkpoints, dataset, tmp_path):
    checkpoint = checkpoints[variant]
    keys = KEYS_WITH_WEIGHTS if checkpoint.config.sinks else KEYS_WITH_WEIGHTS[:-1]
    path = tmp_path / f"a{suffix}"
    run(checkpoint.init, dataset.path, path, outputs=keys)
    assert_equals_reference(path, checkpoint, dataset, keys)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 2e-5),
        ({"precision": "tf32"}, 1e-2),
        ({"precision": "bf16"}, 0.05),
        ({"precision": "bf16-true"}, 0.1),
        ({"compile": True}, 2e-5),
        ({"compile": True, "precision": "bf16"}, 0.05),
    ],
    ids=["fp32", "tf32", "bf16", "bf16-true", "compiled-fp32", "compiled-bf16"],
)
def test_every_layer_key_in_every_arithmetic(options, tolerance, checkpoints, dataset, tmp_path):
    checkpoint = checkpoints["sinks-gqa-6-2"]
    path = tmp_path / "a.safetensors"
    run(checkpoint.init, dataset.path, path, outputs=LAYER_KEYS, **options)
    found = read_dump(path)
    boards = dataset.boards[numpy_indices(len(dataset.rows), SAMPLES, SEED)]
    expected = naive_dump(checkpoint.state_dict, checkpoint.config, boards, LAYER_KEYS)
    for key, array in expected.items():
        assert_close(found.numpy(key), array, tolerance=tolerance)
    # Whatever the forward rounds, the scores are the products of the queries and keys it made.
    k_NLSQD = found.numpy("attn_k")[:, :, :, [h % 2 for h in range(6)]]
    scores_NLQSS = np.einsum("nlsqd,nltqd->nlqst", found.numpy("attn_q"), k_NLSQD) / 8**0.5
    assert_close(found.numpy("attn_scores"), scores_NLQSS, tolerance=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 300, 301, 302, 4096])
def test_batch_size_changes_nothing(batch_size, checkpoints, dataset, tmp_path):
    checkpoint = checkpoints["sinks-gqa-6-2"]
    path = tmp_path / "a.pt"
    run(checkpoint.init, dataset.path, path, outputs=PER_BOARD_KEYS, batch_size=batch_size)
    assert_equals_reference(path, checkpoint, dataset, PER_BOARD_KEYS)


@pytest.mark.parametrize(
    ("dtype", "suffix"),
    [*[("fp16", suffix) for suffix in FORMATS], ("bf16", ".safetensors"), ("bf16", ".pt")],
)
def test_storage_dtype_rounds_the_fp32_values(dtype, suffix, model, dataset, tmp_path):
    wide, narrow = tmp_path / f"wide{suffix}", tmp_path / f"narrow{suffix}"
    run(model, dataset.path, wide, outputs=KEYS_WITH_WEIGHTS)
    run(model, dataset.path, narrow, outputs=KEYS_WITH_WEIGHTS, dtype=dtype)
    wide, narrow = read_dump(wide), read_dump(narrow)
    for key, tensor in wide.tensors.items():
        stored = tensor.to(TORCH_DTYPES[dtype]) if tensor.is_floating_point() else tensor
        assert torch.equal(narrow.tensors[key], stored), key


USES = {
    "copy": lambda tensor: tensor,
    "view": lambda tensor: tensor.to("cuda", non_blocking=True),
    "device": lambda tensor: tensor.clone(),
}


@pytest.mark.parametrize("tensors", USES)
def test_views_hold_in_streams_of_the_callers(tensors, model, dataset, tmp_path):
    """Work on a batch is queued behind some that takes long, in another stream each time."""
    keys = ["layer_outputs", "pooled"]
    run(model, dataset.path, tmp_path / "a.safetensors", outputs=keys)
    written = read_dump(tmp_path / "a.safetensors")
    mine = [torch.cuda.Stream(), torch.cuda.Stream()]
    options = {"n_samples": SAMPLES, "batch_size": BATCH, "seed": SEED}
    batches = stream(model, dataset.path, outputs=keys, tensors=tensors, **options)
    copies = {key: [] for key in keys}
    for i in range(-(-SAMPLES // BATCH)):
        with torch.cuda.stream(mine[i % 2]):
            batch = next(batches)
            torch.cuda._sleep(10**8)
            for key in keys:
                copies[key].append(USES[tensors](batch[key]))
    assert next(batches, None) is None
    for key, parts in copies.items():
        assert torch.equal(torch.cat([part.cpu() for part in parts]), written.tensors[key]), key


def test_view_memory_is_page_locked_until_the_run_ends(model, dataset):
    batches = stream(model, dataset.path, tensors="view", n_samples=900)
    pooled = next(batches)["final_hidden"]
    assert pooled.is_pinned()
    batches.close()
    assert not pooled.is_pinned()


def test_exponent_outside_the_vocabulary_is_no_device_assert(model, dataset, tmp_path, capsys):
    boards = make_dataset(tmp_path / "bad", "selfplay_v1", n=50).rows.copy()
    boards["exps"][44, 3] = 200
    np.save(tmp_path / "bad" / "steps.npy", boards)
    with pytest.raises(ValueError, match="200"):
        dump(model, tmp_path / "bad", tmp_path / "a.pt", indices=np.arange(50), batch_size=8)
    assert not list(tmp_path.glob("a.pt*"))
    assert torch.zeros(3, device="cuda").sum().item() == 0  # the device still works


def test_seed_command_on_cuda(demo_checkpoint, demo_dataset, tmp_path):
    path = tmp_path / "activations.safetensors"
    keys = ["final_hidden", "layer_outputs", "head_logits", "attn_norm", "mlp_input"]
    arguments = ["--init", str(demo_checkpoint), "--dataset", str(demo_dataset), "--seed", "42"]
    arguments += ["--n-samples", "4096", "--outputs", ",".join(keys), "-o", str(path)]
    assert main([*arguments, "--device", "cuda"]) == 0
    demo, rows = load_demo(demo_checkpoint), read_dataset(demo_dataset)
    indices = numpy_indices(len(rows), 4096, 42)
    result = read_dump(path)
    np.testing.assert_array_equal(result.numpy("indices"), indices)
    expected = naive_dump(demo.state_dict, demo.config, naive_boards(rows[indices]), keys)
    for key in keys:
        assert_close(result.numpy(key), expected[key])
