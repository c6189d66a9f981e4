"""Products with the same input are one: the values of the model, where nothing looks in between."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from dump_activations import load_encoder, stream
from dump_activations.model.encoder import with_joined_products
from dump_activations.pipeline import run
from reference.checkpoints import VARIANTS

TOKENS_BS = torch.arange(5 * 16).view(5, 16) % 11
CPU = {"device": "cpu", "allow_cpu": True, "n_samples": 9}


@pytest.fixture
def model(tmp_path):
    return load_encoder(VARIANTS["qk-norm-sinks-policy"](tmp_path / "checkpoint").init)


def joined(model, hooked=()):
    """Return the names of the modules whose products are joined."""
    replica = with_joined_products(model, hooked)
    return {name.removesuffix(".joined") for name, _ in replica.named_modules() if "joined" in name}


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_are_the_models(variant, tmp_path):
    model = load_encoder(VARIANTS[variant](tmp_path / "checkpoint").init)
    weights = {name: each.clone() for name, each in model.state_dict().items()}
    places = [each.data_ptr() for each in model.parameters()]
    with torch.no_grad():
        expected, found = model(TOKENS_BS), with_joined_products(model, ())(TOKENS_BS)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert [each.data_ptr() for each in model.parameters()] == places
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)


def test_one_product_takes_the_place_of_three_and_of_two(model):
    products, replica = [], with_joined_products(model, ())
    for name, module in replica.blocks[0].named_modules():
        module.register_forward_hook(lambda *_, name=name: products.append(name))
    replica(TOKENS_BS)
    found = [
        name for name in products if isinstance(replica.blocks[0].get_submodule(name), nn.Linear)
    ]
    assert found == ["attn.joined", "attn.wo", "mlp.joined", "mlp.w_down"]
    storages = {each.untyped_storage().data_ptr(): each for each in replica.parameters()}
    nbytes = sum(each.untyped_storage().nbytes() for each in storages.values())
    assert nbytes == sum(each.nbytes for each in model.parameters())


class OfTheCaller(nn.Linear):
    """A layer that computes something else."""


def replaced(model):
    model.blocks[1].attn.wk = OfTheCaller(8, 8)


def with_a_bias(model):
    model.blocks[1].mlp.w_gate = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("change", "apart"),
    [
        (lambda model: model.blocks[1].mlp.w_up.register_forward_hook(print), "blocks.1.mlp"),
        (lambda model: model.blocks[1].attn.wv.register_forward_pre_hook(print), "blocks.1.attn"),
        (
            lambda model: prune.l1_unstructured(model.blocks[1].mlp.w_up, "weight", 0.5),
            "blocks.1.mlp",
        ),
        (lambda model: setattr(model.blocks[1].attn.wq, "forward", print), "blocks.1.attn"),
        (replaced, "blocks.1.attn"),
        (with_a_bias, "blocks.1.mlp"),
    ],
)
def test_modules_that_someone_changed_stay_apart(change, apart, model):
    every = joined(model)
    change(model)
    assert joined(model) == every - {apart}


def test_products_that_are_asked_for_stay_apart(model):
    assert joined(model) - joined(model, ["blocks.1.mlp.w_gate"]) == {"blocks.1.mlp"}


@pytest.mark.parametrize(
    ("options", "is_joined"),
    [({}, False), ({"precision": "bf16"}, True), ({"precision": "bf16-true"}, True)],
)
def test_plain_fp32_has_the_bits_of_the_modules(
    options, is_joined, model, demo_dataset, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        run, "with_joined_products", lambda model, hooked: (asked.append(hooked), model)[1]
    )
    list(stream(model, demo_dataset, outputs="mlp_pre", layers=[1], **CPU, **options))
    assert asked == ([["blocks.1.mlp.w_gate"]] if is_joined else [])
