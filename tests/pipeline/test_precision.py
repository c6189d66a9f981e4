"""The arithmetic of a forward pass, whatever the caller has set."""

import pytest
import torch

from dump_activations import dump, load_encoder, stream
from reference.dumps import read_dump

CPU = {"device": "cpu", "allow_cpu": True}
OPTIONS = {"outputs": ["layer_outputs"], "n_samples": 12, "batch_size": 5} | CPU


@pytest.fixture
def model(demo_checkpoint):
    return load_encoder(demo_checkpoint)


def streamed(model, pool, **options):
    batches = stream(model, pool, **OPTIONS, **options)
    return torch.cat([batch["layer_outputs"] for batch in batches])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_callers_autocast_changes_nothing(precision, model, demo_pool, tmp_path):
    expected = streamed(model, demo_pool, precision=precision)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(streamed(model, demo_pool, precision=precision), expected)
        dump(model, demo_pool, tmp_path / "a.pt", precision=precision, **OPTIONS)
    assert torch.equal(read_dump(tmp_path / "a.pt").tensors["layer_outputs"], expected)


def test_bf16_is_not_fp32(model, demo_pool):
    wide, narrow = (streamed(model, demo_pool, precision=name) for name in ("fp32", "bf16"))
    assert not torch.equal(wide, narrow)
