"""A compiled forward stores the eager one's values, from one graph for all layers."""

import gc
import weakref
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from dump_activations import load_encoder, stream
from dump_activations.model.activations import board_tensors, find_activations
from dump_activations.model.capture import Capture
from dump_activations.model.encoder import random_encoder
from reference.checkpoints import VARIANTS
from reference.model import assert_close

N, BATCH = 37, 16  # the last batch is short
on_cpu = {"device": "cpu", "allow_cpu": True, "n_samples": N, "batch_size": BATCH}


@pytest.fixture
def graphs(monkeypatch):
    """Return the graphs that are compiled, which torch runs as they are."""
    found = []

    def backend(graph, _inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return found


@pytest.fixture
def model(tmp_path):
    """Return a model of three layers as its training leaves it."""
    init = VARIANTS["qk-norm-sinks-policy"](tmp_path).init
    return load_encoder(init).train().requires_grad_()


def assert_compiled_equals_eager(init, dataset, *, tolerance=1e-5, **options):
    eager, compiled = (
        list(stream(init, dataset, compile=flag, **on_cpu, **options)) for flag in (False, True)
    )
    assert [len(batch.indices) for batch in compiled] == [16, 16, 5]
    for batch, expected in zip(compiled, eager, strict=True):
        assert batch.keys() == expected.keys()
        for key in expected.tensors:
            values, its = (each[key].double().numpy() for each in (batch, expected))
            assert_close(values, its, tolerance=tolerance)


@pytest.mark.parametrize(
    ("variant", "options", "count"),
    [
        ("mha", {}, 1),
        ("sinks-gqa-6-2", {"split_layers": True}, 1),
        ("qk-norm-sinks-policy", {}, 1),
        ("qk-norm-sinks-policy", {"layers": "0"}, 2),
        ("qk-norm-sinks-policy", {"precision": "bf16", "dtype": "bf16"}, 1),
        ("qk-norm-sinks-policy", {"precision": "bf16-true"}, 1),
    ],
)
def test_every_key_of_every_layer_comes_from_one_graph(  # noqa: PLR0917
    variant, options, count, graphs, demo_dataset, tmp_path
):
    init = VARIANTS[variant](tmp_path).init
    tolerance = 1e-5 if "precision" not in options else 0.02
    assert_compiled_equals_eager(init, demo_dataset, outputs="*", tolerance=tolerance, **options)
    assert len(graphs) == count


def test_layers_may_be_asked_for_different_keys(graphs, model, demo_dataset):
    keys = "blocks.0.attn.hook_q,blocks.1.hook_resid_post,blocks.1.attn.hook_q,attn_norm,pooled"
    assert_compiled_equals_eager(model, demo_dataset, outputs=keys)
    assert len(graphs) == 3


def test_the_tenth_layer_is_not_taken_for_the_first(graphs, model, demo_dataset):
    deep = random_encoder(replace(model.config, num_hidden_layers=11), seed=0)
    keys = "blocks.1.hook_resid_post,blocks.10.hook_resid_post"
    assert_compiled_equals_eager(deep, demo_dataset, outputs=keys)
    assert len(graphs) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.mlp_norm, "eps", 0.5),
        lambda block: block.mlp.register_forward_hook(lambda _module, _inputs, out: out * 2),
        lambda block: block.register_buffer("steering", torch.ones(32)),
        lambda block: setattr(block, "forward", lambda x: x + torch.arange(32.0)),
        lambda block: setattr(block.mlp, "forward", torch.zeros_like),
    ],
    ids=["eps", "hook", "buffer", "constant", "patch"],
)
def test_a_layer_that_differs_has_a_graph_of_its_own(change, graphs, model, demo_dataset):
    change(model.blocks[1])
    assert_compiled_equals_eager(model, demo_dataset, outputs="resid_pre,layer_outputs")
    assert len(graphs) in {1, 2}


def captured(model, key, **options):
    (activation,) = find_activations([key])
    (tensor,) = board_tensors(activation, model.config, layers=[0, 1], split=False)
    return Capture(model, [tensor], **options), torch.empty((BATCH, *tensor.shape))


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_is_left_of_a_pass_or_a_capture(compiled, graphs, model):
    tokens = torch.zeros((BATCH, 16), dtype=torch.uint8)
    capture, buffer = captured(model, "attn_pattern", compiled_rows=BATCH if compiled else None)
    with capture, torch.inference_mode():
        capture.run(tokens, {"attn_pattern": buffer})
        freed = weakref.ref(buffer)
        del buffer
        gc.collect()
        assert freed() is None
    assert len(graphs) == compiled
    freed = [weakref.ref(graph) for graph in graphs]
    graphs.clear()
    del capture
    torch.compiler.reset()
    gc.collect()
    assert not any(ref() for ref in freed)
    hooks = [*model.modules()]
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in hooks)
    assert all(each._compiled_call_impl is None for each in hooks)


def test_no_layer_runs_after_the_last_one_needed(graphs, model):
    tokens = torch.zeros((BATCH, 16), dtype=torch.uint8)
    capture, buffer = captured(model, "layer_outputs", compiled_rows=BATCH)
    seen = []
    model.blocks[2].register_forward_hook(lambda *_: seen.append("block 2"))
    with capture, torch.inference_mode():
        for passes in (1, 1, 1):
            capture.run(tokens, {"layer_outputs": buffer})
            assert len(seen) == passes
    assert len(graphs) == 1


def test_a_pass_that_fails_leaves_no_buffer(graphs, model):
    tokens = torch.zeros((BATCH, 16), dtype=torch.uint8)
    capture, buffer = captured(model, "layer_outputs", compiled_rows=BATCH)
    values = np.zeros(3)
    model.blocks[1].register_forward_hook(lambda *_: values[3])
    freed = weakref.ref(buffer)
    with capture, torch.inference_mode():
        with pytest.raises(IndexError):
            capture.run(tokens, {"layer_outputs": buffer})
        del buffer
        gc.collect()
        assert freed() is None
    assert graphs == []
