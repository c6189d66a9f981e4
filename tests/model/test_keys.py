"""Every activation key: against a naive forward, against plain hooks, and against each other."""

from functools import partial

import numpy as np
import pytest
import torch

from dump_activations import dump, load_encoder, stream
from dump_activations.errors import ActivationNotImplementedError, ActivationUnavailableError
from dump_activations.model.activations import find_activations
from reference.checkpoints import VARIANTS
from reference.datasets import make_dataset
from reference.dumps import read_dump
from reference.model import LAYER_KEYS, PER_BOARD_KEYS, assert_close, naive_dump

N, BATCH = 37, 16  # the last batch is short
KEYS = (*dict.fromkeys((*PER_BOARD_KEYS, *LAYER_KEYS)),)
MODELS = ["mha", "gqa-6-2", "sinks-gqa-6-2", "qk-norm", "qk-norm-sinks-policy"]
on_cpu = {"device": "cpu", "allow_cpu": True, "indices": np.arange(N), "batch_size": BATCH}
cpu_dump, cpu_stream = partial(dump, **on_cpu), partial(stream, **on_cpu)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"), "packed_46", n=N)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: VARIANTS[name](root / name) for name in MODELS}


@pytest.fixture(scope="module")
def sinks(checkpoints):
    """A model with grouped heads and sinks."""
    return load_encoder(checkpoints["sinks-gqa-6-2"].init)


def streamed(init, dataset, **options):
    """Return all boards of each tensor."""
    batches = list(cpu_stream(init, dataset.path, **options))
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0].tensors}


@pytest.mark.parametrize("variant", MODELS)
def test_every_key_equals_the_naive_forward(variant, checkpoints, dataset, tmp_path):
    checkpoint = checkpoints[variant]
    cpu_dump(checkpoint.init, dataset.path, tmp_path / "a.safetensors", outputs="*")
    found = read_dump(tmp_path / "a.safetensors")
    asked = [*KEYS, "rmsnorm_gammas", *["attn_sinks"] * checkpoint.config.sinks]
    expected = naive_dump(checkpoint.state_dict, checkpoint.config, dataset.boards, asked)
    assert found.tensors.keys() == {*expected, "indices", "boards"}
    assert found.metadata["outputs"] == ",".join(sorted(asked))
    for key, array in expected.items():
        assert_close(found.numpy(key), array, tolerance=2e-5)


def test_more_keys_change_no_bit_of_the_others(sinks, dataset):
    together = streamed(sinks, dataset, outputs="*")
    for key in KEYS:
        assert torch.equal(streamed(sinks, dataset, outputs=key)[key], together[key]), key


def test_scores_and_pattern_are_of_fp32_where_the_forward_is_not(sinks, dataset):
    found = streamed(sinks, dataset, outputs="attn_*", precision="bf16")
    assert torch.equal(found["attn_q"], found["attn_q"].bfloat16().float())
    q_NLSQD = found["attn_q"].double()
    k_NLSQD = found["attn_k"].double()[:, :, :, [h % 2 for h in range(6)]]
    scores = torch.einsum("nlsqd,nltqd->nlqst", q_NLSQD, k_NLSQD) / 8**0.5
    assert_close(found["attn_scores"].numpy(), scores.numpy(), tolerance=1e-6)
    sink_LQ = torch.stack([block.attn.sinks for block in sinks.blocks])[:, [0, 3, 1, 4, 2, 5]]
    total = scores.exp().sum(-1, keepdim=True) + sink_LQ.double().exp()[..., None, None]
    assert_close(found["attn_pattern"].numpy(), (scores.exp() / total).numpy(), tolerance=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-true"])
@pytest.mark.parametrize("variant", ["sinks-gqa-6-2", "qk-norm-sinks-policy"])
def test_head_probs_are_a_softmax_in_fp32(variant, precision, checkpoints, dataset):
    options = {"outputs": "head_*", "precision": precision}
    found = streamed(checkpoints[variant].init, dataset, **options)
    logits = found["head_logits"].double().numpy()
    assert torch.equal(found["head_logits"], found["head_logits"].bfloat16().float()) == (
        precision != "fp32"
    )
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    assert_close(found["head_probs"].numpy(), exp / exp.sum(axis=-1, keepdims=True), tolerance=1e-6)


@pytest.mark.parametrize(
    ("asked", "keys"),
    [
        ("mlp_p*", {"mlp_pre", "mlp_pre_linear", "mlp_post"}),
        ("attn_?,pooled", {"attn_q", "attn_k", "attn_v", "attn_z", "pooled"}),
        ("attn_[qk]", {"attn_q", "attn_k"}),
        ("hook_resid_mid", {"resid_mid"}),
        ("attn.hook_pattern,mlp.hook_post", {"attn_pattern", "mlp_post"}),
        ("mlp.hook_*", {"mlp_pre", "mlp_pre_linear", "mlp_post"}),
        ("hook_resid_post,layer_outputs,layer_*", {"layer_outputs"}),
        ("*", {*KEYS, "rmsnorm_gammas"}),
    ],
)
def test_globs_and_the_names_of_hooks(asked, keys, checkpoints):
    config = load_encoder(checkpoints["mha"].init).config
    assert {each.key for each in find_activations(asked.split(","), config)} == keys


def test_a_key_that_the_model_lacks_is_named(checkpoints):
    config = load_encoder(checkpoints["mha"].init).config
    with pytest.raises(ActivationUnavailableError, match="attn_sinks"):
        find_activations(["*", "attn_sinks"], config)
    with pytest.raises(ActivationNotImplementedError, match="attn_pattern"):
        find_activations(["*", "attn_weights"])
