"""A choice of layers: how it is indexed, what runs for it, and where it is stored."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dump_activations import (
    ActivationsFile,
    DumpActivationsWarning,
    InvalidArgumentError,
    dump,
    load_encoder,
    stream,
)
from dump_activations.commands.inspect import main
from dump_activations.model.activations import find_activations, find_layers
from reference.dumps import FORMATS, read_dump

L = 4  # of the demo checkpoint
LAYERS, CHOSEN = "3,1,-1,0:2", [0, 1, 3]
N, BATCH = 37, 16
on_cpu = {"device": "cpu", "allow_cpu": True, "n_samples": N, "batch_size": BATCH}
cpu_dump, cpu_stream = partial(dump, **on_cpu), partial(stream, **on_cpu)


@pytest.fixture
def model(demo_checkpoint):
    return load_encoder(demo_checkpoint)


numbers = st.integers(-20, 20)
bounds = st.one_of(st.none(), numbers)


@given(
    st.lists(st.one_of(numbers, st.tuples(bounds, bounds, bounds)), min_size=1, max_size=4),
    st.integers(1, 15),
)
@example([-3], 3)
@example([-4], 3)
@example([3], 3)
def test_layers_are_indexed_as_python_does(items, count):
    values = [item if isinstance(item, int) else slice(*item) for item in items]
    texts = [
        str(item)
        if isinstance(item, int)
        else ":".join("" if bound is None else str(bound) for bound in item)
        for item in items
    ]
    text = ",".join(texts)
    try:
        found = [np.atleast_1d(np.arange(count)[value]) for value in values]
        expected = {*map(int, np.concatenate(found))}
    except (IndexError, ValueError):
        expected = set()
    for layers in (values, text):
        if expected:
            assert find_layers(layers, count) == tuple(sorted(expected))
        else:
            with pytest.raises(InvalidArgumentError, match="layers"):
                find_layers(layers, count)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_holds_the_chosen_layers_stacked_or_split(suffix, model, demo_dataset, tmp_path):
    keys = ["layer_outputs", "attn_pattern", "pooled"]
    paths = [tmp_path / f"{name}{suffix}" for name in ("all", "stacked", "split")]
    choices = [{}, {"layers": LAYERS}, {"layers": LAYERS, "split_layers": True}]
    for path, choice in zip(paths, choices, strict=True):
        cpu_dump(model, demo_dataset, path, outputs=keys, **choice)
    everything, stacked, split = map(read_dump, paths)
    assert everything.metadata["layers"] == "0,1,2,3"
    assert stacked.metadata["layers"] == split.metadata["layers"] == "0,1,3"
    assert stacked.tensors.keys() == {*keys, "indices", "boards"}
    apart = {f"{key}.{layer}" for key in keys[:2] for layer in CHOSEN}
    assert split.tensors.keys() == {*apart, "pooled", "indices", "boards"}
    for key in keys[:2]:
        assert torch.equal(stacked.tensors[key], everything.tensors[key][:, CHOSEN])
        for i, layer in enumerate(CHOSEN):
            assert torch.equal(split.tensors[f"{key}.{layer}"], stacked.tensors[key][:, i])
    assert torch.equal(split.tensors["pooled"], everything.tensors["pooled"])


def test_an_alias_with_a_layer_is_stored_as_the_layer(model, demo_dataset, tmp_path, capsys):
    names = "blocks.2.hook_resid_post,hook_embed,blocks.0.hook_resid_pre,blocks.3.attn.hook_q"
    cpu_dump(model, demo_dataset, tmp_path / "some.safetensors", outputs=names)
    keys = ["layer_outputs", "resid_pre", "attn_q"]
    cpu_dump(model, demo_dataset, tmp_path / "all.safetensors", outputs=keys)
    some, everything = (read_dump(tmp_path / f"{name}.safetensors") for name in ("some", "all"))
    kept = ("attn_q.3", "layer_outputs.2", "resid_pre.0")
    assert some.metadata["outputs"] == ",".join(kept)
    assert some.tensors.keys() == {*kept, "indices", "boards"}
    for name in kept:
        key, layer = name.split(".")
        assert torch.equal(some.tensors[name], everything.tensors[key][:, int(layer)]), name
    acts = ActivationsFile(tmp_path / "some.safetensors")
    for name in ("layer_outputs.2", "blocks.2.hook_resid_post"):
        assert torch.equal(acts[name][:], some.tensors["layer_outputs.2"])
    assert torch.equal(acts["hook_resid_post"][:, 0], some.tensors["layer_outputs.2"])
    assert main([str(tmp_path / "some.safetensors")]) == 0
    assert "boards, 3 of 4 layers," in capsys.readouterr().out.splitlines()[0]


def test_layers_of_aliases_are_in_ascending_order():
    found = find_activations(["blocks.3.hook_resid_post", "blocks.1.hook_resid_post"])
    assert [each.key for each in found] == ["layer_outputs.1", "layer_outputs.3"]


@pytest.mark.parametrize(
    ("outputs", "layers", "words"),
    [
        ("blocks.2.hook_resid_post,layer_outputs", None, "blocks.2.hook_resid_post.*layer_outputs"),
        ("hook_embed,resid_*", None, "hook_embed.*resid_pre"),
        ("blocks.2.hook_resid_post", "0", "layers.*outputs"),
        ("pooled,blocks.2.hook_resid_post", "0", "layers.*outputs"),
        ("blocks.4.hook_resid_post", None, "blocks.4.hook_resid_post.*layers 0 to 3"),
        ("blocks.2.hook_nothing", None, "unknown key 'blocks.2.hook_nothing'"),
        ("blocks.-1.hook_resid_post", None, "unknown key"),
        ("blocks.2.layer_outputs", None, "unknown key"),
    ],
)
def test_a_layer_in_an_alias_contradicts_what_else_chooses_layers(
    outputs, layers, words, model, demo_dataset
):
    with pytest.raises(InvalidArgumentError, match=words):
        list(cpu_stream(model, demo_dataset, outputs=outputs, layers=layers))


def test_layers_of_keys_without_layers(model, demo_dataset):
    with pytest.warns(DumpActivationsWarning, match="^layers: .*pooled, rmsnorm_gammas"):
        (batch,) = cpu_stream(
            model, demo_dataset, outputs="rmsnorm_gammas,pooled", layers="0", batch_size=N
        )
    assert batch["pooled"].shape == (N, 64)


def test_sinks_are_of_the_chosen_layers(tmp_path, demo_dataset):
    from reference.checkpoints import VARIANTS

    checkpoint = VARIANTS["qk-norm-sinks-policy"](tmp_path)
    (batch,) = cpu_stream(
        checkpoint.init, demo_dataset, outputs="attn_sinks,pooled", layers=[-1], batch_size=N
    )
    expected = checkpoint.state_dict["blocks.2.attn.sinks"]
    np.testing.assert_array_equal(batch["attn_sinks"], expected[None])
