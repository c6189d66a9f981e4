"""A run's copy of its caller's model."""

import pytest
import torch

from dump_activations import load_encoder
from dump_activations.model.prepared import replicate
from reference.checkpoints import VARIANTS

BOARDS = torch.arange(32, dtype=torch.uint8).view(2, 16) % 12


@pytest.fixture
def model(tmp_path):
    model = load_encoder(VARIANTS["sinks-gqa-6-2"](tmp_path).init)
    return model.train().requires_grad_()


def test_only_mode_and_hooks_are_its_own(model):
    seen = []
    model.blocks[0].register_forward_hook(lambda *_: seen.append("before"))
    replica = replicate(model, torch.device("cpu"))
    replica.blocks[0].register_forward_hook(lambda *_: seen.append("replica"))
    assert not any(module.training for module in replica.modules())
    assert all(module.training for module in model.modules())
    assert not {*model.modules()} & {*replica.modules()}
    pairs = zip(model.named_parameters(), replica.named_parameters(), strict=True)
    assert all(ours[0] == its[0] and ours[1] is its[1] for ours, its in pairs)
    assert torch.equal(replica(BOARDS)[0], model(BOARDS)[0])
    assert seen == ["before", "replica", "before"]


def test_weights_elsewhere_are_its_own(model):
    replica = replicate(model, torch.device("meta"))
    assert {weight.device.type for weight in replica.parameters()} == {"meta"}
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}
    assert all(weight.requires_grad for weight in replica.parameters())
    assert replica(BOARDS.to("meta"))[0].shape == (2, 16, model.config.hidden_size)
