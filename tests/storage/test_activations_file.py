"""A finished file read by rows: every read as the ordinary reader of its format has it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dump_activations import ActivationsFile, InvalidArgumentError, dump
from reference.dumps import read_dump

N = 40
FORMATS = (".safetensors", ".pt", ".npz")
LAYERS = (1, 3)
STACKED = "layer_outputs"
OUTPUTS = [STACKED, "attn_q", "final_hidden", "head_logits", "rmsnorm_gammas"]


@pytest.fixture(scope="module")
def make(tmp_path_factory, demo_checkpoint, demo_pool):
    """Return what makes dumps of the demo, once each."""
    made = {}
    directory = tmp_path_factory.mktemp("dumps")

    def make(suffix=".safetensors", *, split=False, seed=0, dtype="fp16", outputs=tuple(OUTPUTS)):
        name = f"{split}-{seed}-{dtype}-{len(outputs)}{suffix}"
        if name not in made:
            made[name] = directory / name
            dump(
                demo_checkpoint,
                demo_pool,
                made[name],
                outputs=outputs,
                layers=LAYERS,
                split_layers=split,
                labels=["move_dir", "legal_moves"],
                n_samples=N,
                seed=seed,
                dtype=dtype,
                device="cpu",
                allow_cpu=True,
            )
        return made[name]

    return make


@pytest.fixture(params=FORMATS)
def path(request, make):
    return make(request.param)


def same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found, expected)


def test_every_tensor_is_as_the_ordinary_reader_has_it(path):
    acts, expected = ActivationsFile(path), read_dump(path)
    assert acts.tensor_names() == [name for name in acts.tensor_names() if name in expected.tensors]
    assert len(acts.tensor_names()) == len(expected.tensors)
    assert acts.metadata == expected.metadata
    assert len(acts) == N
    assert set(acts.keys()) == {STACKED, "attn_q", "final_hidden", "head_logits"}
    for name, tensor in expected.tensors.items():
        same(acts.read(name), tensor)
        same(acts.read(name, verify=True), tensor)
        assert acts.shape(name) == tensor.shape
        np.testing.assert_array_equal(acts.read_numpy(name), tensor.numpy())
    np.testing.assert_array_equal(acts.indices, expected.tensors["indices"])
    assert set(acts.labels) == {"move_dir", "legal_moves"}
    for name, values in acts.labels.items():
        np.testing.assert_array_equal(values, expected.tensors[f"labels/{name}"])


@settings(max_examples=60)
@given(
    st.sampled_from([STACKED, "attn_q", "final_hidden", "boards", "labels/legal_moves"]),
    st.tuples(st.sampled_from(FORMATS), st.booleans()),
    st.lists(st.integers(0, N - 1), max_size=60),
    st.sampled_from([None, *LAYERS]),
)
def test_rows_in_any_order(make, key, form, rows, layer):
    suffix, split = form
    acts, stacked = ActivationsFile(make(suffix, split=split)), read_dump(make(suffix))
    expected = stacked.tensors[key]
    if key in (STACKED, "attn_q"):
        assert acts.layers(key) == LAYERS
        assert acts.shape(key) == expected.shape
        expected = expected if layer is None else expected[:, LAYERS.index(layer)]
    else:
        layer = None
    expected = expected[torch.tensor(rows, dtype=torch.int64)]
    same(acts.read(key, rows, layer=layer), expected)
    out = torch.empty_like(expected)
    assert acts.read(key, torch.tensor(rows), layer=layer, out=out) is out
    same(out, expected)


@pytest.mark.parametrize("split", [False, True])
def test_bfloat16(make, split):
    path = make(split=split, dtype="bf16")
    acts, expected = ActivationsFile(path), read_dump(make(dtype="bf16")).tensors
    same(acts.read(STACKED, [3, 1], layer=3), expected[STACKED][[3, 1], 1])
    with pytest.raises(InvalidArgumentError, match="NumPy has no bfloat16"):
        acts.read_numpy("final_hidden")


def test_slices_and_masks(path):
    acts, expected = ActivationsFile(path), read_dump(path).numpy("final_hidden")
    mask = torch.arange(N) % 3 == 0
    for rows in (slice(3, 9), slice(None, None, -7), slice(9, 3), mask, mask.numpy()):
        found = acts.read("final_hidden", rows).double().numpy()
        np.testing.assert_array_equal(found, expected[rows])
