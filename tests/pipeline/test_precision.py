"""The arithmetic of a forward pass, whatever the caller has set."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dump_activations import dump, load_encoder, stream
from reference.checkpoints import VARIANTS
from reference.dumps import read_dump

CPU = {"device": "cpu", "allow_cpu": True}
OPTIONS = {"outputs": ["layer_outputs"], "n_samples": 12, "batch_size": 5} | CPU


@pytest.fixture
def model(demo_checkpoint):
    return load_encoder(demo_checkpoint)


def streamed(model, dataset, **options):
    batches = stream(model, dataset, **OPTIONS, **options)
    return torch.cat([batch["layer_outputs"] for batch in batches])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_callers_autocast_changes_nothing(precision, model, demo_dataset, tmp_path):
    expected = streamed(model, demo_dataset, precision=precision)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(streamed(model, demo_dataset, precision=precision), expected)
        dump(model, demo_dataset, tmp_path / "a.pt", precision=precision, **OPTIONS)
    assert torch.equal(read_dump(tmp_path / "a.pt").tensors["layer_outputs"], expected)


@pytest.fixture(params=["gqa-4-2", "qk-norm-sinks-policy"])
def wide(request, tmp_path):
    return load_encoder(VARIANTS[request.param](tmp_path / "checkpoint").init)


def plainly(model, boards):
    """Return the model's own final states and logits."""
    with torch.inference_mode():
        hidden, logits = model(boards)
    return {"final_hidden": hidden.float(), "head_logits": logits.float()}


def only_batch(model, dataset, **options):
    keys = "final_hidden,head_logits"
    (batch,) = stream(model, dataset, outputs=keys, n_samples=12, **CPU, **options)
    return batch.boards, batch.tensors


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of the norms in autocast's own forward
def test_bf16_is_autocast(wide, demo_dataset):
    boards, found = only_batch(wide, demo_dataset, precision="bf16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(found, plainly(wide, boards))


def test_bf16_true_is_the_model_in_bf16(wide, demo_dataset):
    before = {name: (id(weight), weight.dtype) for name, weight in wide.named_parameters()}
    boards, found = only_batch(wide, demo_dataset, precision="bf16-true")
    assert {name: (id(w), w.dtype) for name, w in wide.named_parameters()} == before
    narrow = copy.deepcopy(wide).to(torch.bfloat16)
    assert_equal(found, plainly(narrow, boards))
    # A model that comes in bf16 is run as it is.
    assert_equal(only_batch(narrow, demo_dataset)[1], found)


class Casts(TorchDispatchMode):
    """Counts what is cast from fp32 to bf16, by its shape."""

    def __init__(self):
        super().__init__()
        self.of = Counter()

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.to, torch.ops.aten._to_copy):
            before, after = args[0].dtype, result.dtype
            if (before, after) == (torch.float32, torch.bfloat16):
                self.of[tuple(result.shape)] += 1
        return result


def test_bf16_casts_each_weight_once_a_run_and_each_norm_once_a_batch(wide, demo_dataset):
    options = {"outputs": "layer_outputs", "n_samples": 12, "batch_size": 3} | CPU
    with Casts() as casts:
        batches = len([*stream(wide, demo_dataset, precision="bf16", **options)])
    linears = [module for module in wide.modules() if isinstance(module, nn.Linear)]
    weights = Counter(tuple(weight.shape) for each in linears for weight in each.parameters())
    activations = casts.of - weights
    assert casts.of == weights + activations
    into_products = (3, 16, wide.config.hidden_size)
    norms = 2 * wide.config.num_hidden_layers * batches
    assert activations.pop(into_products) == norms
    # The head runs in the first pass alone.
    assert activations.pop((3, wide.config.hidden_size)) == 1
    assert all(len(shape) != 2 for shape in activations)


def test_bf16_is_not_fp32(model, demo_dataset):
    wide, narrow = (streamed(model, demo_dataset, precision=name) for name in ("fp32", "bf16"))
    assert not torch.equal(wide, narrow)
