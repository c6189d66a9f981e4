"""Checkpoints of every kind load as the models they hold. Hostile ones do no harm."""

import json
import os
import pickle
import struct
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dump_activations import load_encoder
from dump_activations.errors import DumpActivationsError, DumpActivationsWarning
from reference.checkpoints import (
    BASE,
    VARIANTS,
    WEIGHT_FILES,
    bundle,
    config_json,
    load_demo,
    random_state_dict,
    save_checkpoint,
    save_weights,
)
from reference.datasets import random_boards
from reference.model import assert_close, naive_forward

BOARDS = random_boards(23, seed=6)


def forward(model, boards=BOARDS):
    with torch.no_grad():
        hidden, logits = model(torch.from_numpy(boards.astype(np.int64)))
    return hidden.double().numpy(), logits.double().numpy()


def assert_loads_as(model, state_dict, config=BASE):
    hidden, logits = naive_forward(state_dict, config, BOARDS)
    found = forward(model)
    assert_close(found[0], hidden)
    assert_close(found[1], logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_equals_the_naive_one(variant, tmp_path):
    checkpoint = VARIANTS[variant](tmp_path / "checkpoint")
    model = load_encoder(checkpoint.init)
    assert_loads_as(model, checkpoint.state_dict, checkpoint.config)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert set(model.state_dict()) == set(checkpoint.state_dict)


def test_demo_checkpoint(demo_checkpoint):
    demo = load_demo(demo_checkpoint)
    assert_loads_as(load_encoder(str(demo_checkpoint)), demo.state_dict, demo.config)


def test_the_model_keeps_a_copy_of_the_weights_and_reads_no_other_file(tmp_path):
    """The model does not map the file, so nobody can change the weights of a run."""
    checkpoint = VARIANTS["gqa-4-2"](tmp_path / "checkpoint")
    for name in ("optimizer.pt", "model-00001.safetensors", "latest.pt", *WEIGHT_FILES[2:]):
        (checkpoint.init / name).write_bytes(b"not weights")
    model = load_encoder(checkpoint.init)
    weights = checkpoint.init / "model.safetensors"
    with weights.open("r+b") as file:
        file.write(bytes(weights.stat().st_size))
    assert_loads_as(model, checkpoint.state_dict)


def test_random_init_gives_an_untrained_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json(replace(BASE, sinks=True))))
    model = load_encoder(tmp_path, random_init=True)
    hidden, logits = forward(model)
    assert hidden.shape == (23, 16, BASE.hidden)
    assert logits.shape == (23, 4, BASE.n_bins)
    assert np.unique(logits).size > 23
    same, other = (load_encoder(tmp_path, random_init=True, seed=seed) for seed in (0, 1))
    assert equal_weights(model, same)
    assert not equal_weights(model, other)
    # PyTorch's default initialisation, module after module.
    torch.manual_seed(0)
    assert torch.equal(model.tok_emb.weight, torch.nn.Embedding(17, BASE.hidden).weight)
    assert not model.blocks[1].attn.sinks.any()


def equal_weights(model, other):
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("random_init", [False, True])
@pytest.mark.parametrize("weights", ["model.safetensors", "model.pt"])
def test_the_callers_default_dtype_device_and_generator_change_nothing(
    weights, random_init, tmp_path
):
    save_checkpoint(tmp_path, random_state_dict(BASE), config_json(BASE), weights=weights)
    expected = load_encoder(tmp_path, random_init=random_init)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        model = load_encoder(tmp_path, random_init=random_init)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert equal_weights(model, expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("weights", ["model.safetensors", "model.pt"])
def test_misfits_are_listed(weights, tmp_path):
    state_dict = random_state_dict(BASE)
    del state_dict["blocks.1.mlp.w_up.weight"]
    state_dict["blocks.0.attn.extra"] = torch.zeros(3)
    state_dict["blocks.0.attn.wo.weight"] = torch.zeros(32, 31)
    state_dict["tok_emb.weight"] = torch.zeros(16, 32)  # smaller than the vocabulary
    text = refused(save_checkpoint(tmp_path, state_dict, config_json(BASE), weights=weights))
    assert (
        "missing blocks.1.mlp.w_up.weight; "
        "misshapen tok_emb.weight (16, 32), not (17, 32), blocks.0.attn.wo.weight (32, 31)"
    ) in text
    assert "unexpected blocks.0.attn.extra" in text


def test_only_the_first_few_misfits_are_listed(tmp_path):
    config = replace(BASE, layers=40, hidden=8, heads=2, kv_heads=2, mlp=8)
    small = random_state_dict(replace(config, layers=1))
    save_checkpoint(tmp_path / "bad", small, config_json(config))
    text = refused(tmp_path / "bad")
    assert "missing blocks.1." in text
    assert len(text) < 1500


def refused(init, **options):
    """Load a checkpoint that must be refused with one line, and return the line."""
    with pytest.raises(DumpActivationsError) as caught:
        load_encoder(init, **options)
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


class Evil:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("form", ["torch", "pickle", "nested"])
def test_code_in_a_bundle_does_not_run(form, tmp_path):
    canary = tmp_path / "canary"
    content = bundle(random_state_dict(BASE), config_json(BASE))
    content["resume"] = Evil(canary)
    path = tmp_path / "evil.pt"
    match form:
        case "torch":
            torch.save(content, path)
        case "pickle":
            path.write_bytes(pickle.dumps(content))
        case "nested":
            content["model"]["blocks.0.attn.wq.weight"] = Evil(canary)
            torch.save(content, path, _use_new_zipfile_serialization=False)
    assert "evil.pt" in refused(path)
    assert not canary.exists()


def _safetensors(header, data=b""):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def _entry(shape, data=b""):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, len(data)]}
    return _safetensors({"tok_emb.weight": entry}, data)


HOSTILE_SAFETENSORS = {
    "thousands-of-axes": _entry([1] * 20_000, bytes(4)),
    "a-million-digits": _entry(["N"], bytes(4)).replace(b'"N"', b"1" + b"0" * 10**6),
    "header-past-the-end": struct.pack("<Q", 10**6) + b"{}",
    "empty": _safetensors({}),
    "overflowing-strides": _entry([0, 2**40, 2**40]),
    "length-past-int64": _entry([0, 2**63]),
    "odd-name": _entry([1], bytes(4)).replace(b"tok_emb.weight", b"\\n\\u001b[31m456"),
}


@pytest.mark.parametrize("case", HOSTILE_SAFETENSORS)
def test_hostile_safetensors(case, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json(BASE)))
    (tmp_path / "model.safetensors").write_bytes(HOSTILE_SAFETENSORS[case])
    text = refused(tmp_path)
    assert str(tmp_path) in text
    assert "\x1b" not in text


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64])
def test_weights_must_be_floating_point(dtype, tmp_path):
    state_dict = random_state_dict(BASE)
    state_dict["tok_emb.weight"] = state_dict["tok_emb.weight"].to(dtype)
    save_checkpoint(tmp_path / "ints", state_dict, config_json(BASE))
    assert "tok_emb.weight" in refused(tmp_path / "ints")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{hidden_size: 32}",
        b"[1, 2]",
        b"null",
        b"\xff\xfe\0\1",
        b"[" * 10**5,
        b'{"a":' * 10**5,
    ],
    ids=["empty", "not-json", "list", "null", "not-text", "deep", "deep-object"],
)
def test_config_that_is_not_an_object(text, tmp_path):
    directory = save_checkpoint(tmp_path / "bad", random_state_dict(BASE), config_json(BASE))
    (directory / "config.json").write_bytes(text)
    assert "config.json" in refused(directory)


REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "layer_norm_eps",
)


BAD_VALUES = [
    *[(field, None) for field in REQUIRED],
    *[
        (field, value)
        for field in (*REQUIRED[:-1], "num_key_value_heads")
        for value in (0, -4, "32", 32.5, True, [4], {}, 10**30, 2**40)
    ],
    *[("input_vocab_size", value) for value in ("16", 2.5, [16], 2**50)],
    *[("max_position_embeddings", value) for value in ("16", 2.5, [16], 2**50, 0, -1, 8, 15)],
    *[("layer_norm_eps", value) for value in ("1e-6", -1.0, [1e-6], True, 10**400)],
    *[("layer_norm_eps", float(value)) for value in ("nan", "inf", "-inf")],
    *[("use_attention_sinks", value) for value in ("yes", 2, [])],
    *[("use_qk_norm", value) for value in ("yes", 2, [])],
    *[("num_key_value_heads", 3), ("num_attention_heads", 5), ("num_attention_heads", 3)],
    ("hidden_size", 34),
]


@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
def test_bad_config_value(field, value, tmp_path):
    directory = save_checkpoint(
        tmp_path / "bad", random_state_dict(BASE), config_json(BASE, **{field: value})
    )
    text = refused(directory)
    assert str(directory) in text
    assert field in text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("output_n_bins", value) for value in (0, -1, "16", 2.5, [16], 10**30)],
        *[("head_type", value) for value in (3, ["binned_ev"], "value", {})],
        *[("input_vocab_size", value) for value in (0, -1)],
    ],
)
def test_bad_value_of_a_field_that_the_weights_settle(field, value, tmp_path):
    """It may be ignored or refused by name."""
    state_dict = random_state_dict(BASE)
    directory = save_checkpoint(tmp_path / "odd", state_dict, config_json(BASE, **{field: value}))
    try:
        model = load_encoder(directory)
    except DumpActivationsError as error:
        assert field in str(error)  # noqa: PT017
    else:
        assert_loads_as(model, state_dict)


def test_null_means_the_default(tmp_path):
    config = replace(BASE, kv_heads=4)
    state_dict = random_state_dict(config)
    fields = config_json(config) | {"num_key_value_heads": None}
    assert_loads_as(load_encoder(save_checkpoint(tmp_path, state_dict, fields)), state_dict, config)


def _one_storage_in_every_weight(path):
    row = torch.zeros(1 << 20)
    state_dict = {f"blocks.{i}.attn_norm.weight": row for i in range(300)}
    torch.save(bundle(state_dict, config_json(BASE)), path)


def _overlapping_members(path):
    """Give each entry of the archive's directory the place of the largest member."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        start = archive.start_dir
    sizes = struct.pack("<II", largest.file_size, largest.file_size)
    while data[start : start + 4] == b"PK\1\2":
        data[start + 20 : start + 28] = sizes
        data[start + 42 : start + 46] = struct.pack("<I", largest.header_offset)
        start += 46 + sum(struct.unpack("<HHH", data[start + 28 : start + 34]))
    path.write_bytes(data)


def _compressed(path):
    """Compress each member, after zeros were added to it."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data + bytes(1 << 20))


# How a bundle is changed, and a word of its refusal.
HURTING_BUNDLES = {
    _one_storage_in_every_weight: "larger than the file",
    _overlapping_members: "larger than the file",
    _compressed: "compressed",
}


@pytest.mark.parametrize("hurt", HURTING_BUNDLES)
def test_a_bundle_that_would_take_more_than_its_size_is_refused(hurt, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(bundle(random_state_dict(BASE), config_json(BASE)), path)
    hurt(path)
    assert HURTING_BUNDLES[hurt] in refused(path)


NOT_BUNDLES = {
    "empty": b"",
    "garbage": b"\x00\x01garbage" * 100,
    "zip": b"PK\x03\x04" + b"\0" * 60,
    "list": [1, 2],
    "tensor": torch.zeros(3),
    "no-model": {"encoder_config": config_json(BASE)},
    "model-is-a-list": {"model": [torch.zeros(2)], "encoder_config": config_json(BASE)},
    "model-of-numbers": {"model": {"tok_emb.weight": 3}, "encoder_config": config_json(BASE)},
    "model-of-odd-keys": {"model": {3: torch.zeros(2)}, "encoder_config": config_json(BASE)},
    "model-empty": {"model": {}, "encoder_config": config_json(BASE)},
    "no-config": {"model": random_state_dict(BASE)},
    "config-is-a-list": {"model": random_state_dict(BASE), "encoder_config": [1]},
    "training-config-is-a-list": {"model": random_state_dict(BASE), "training_config": [1]},
    "training-config-without": {"model": random_state_dict(BASE), "training_config": {"lr": 1}},
    "config-with-gap": {
        "model": random_state_dict(BASE),
        "encoder_config": config_json(BASE, hidden_size=None),
    },
}


@pytest.mark.parametrize("content", NOT_BUNDLES.values(), ids=NOT_BUNDLES)
def test_a_bundle_that_is_not_one(content, tmp_path):
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    for init in (path, tmp_path):
        assert str(init) in refused(init)


POLICY = {"policy_head.weight": torch.ones(4, 32), "policy_head.bias": torch.zeros(4)}
VALUE = {
    "value_head.weight": torch.zeros(1, 32),
    "value_head.bins": torch.arange(3),
    "value_pre_pool_norm.weight": torch.zeros(32),
    "module.value_pre_pool_mlp.0.weight": torch.zeros(8, 32),
}


@pytest.mark.parametrize("weights", ["model.safetensors", "model.pt"])
def test_weights_without_a_module_are_left_out_with_one_warning(weights, tmp_path):
    state_dict = random_state_dict(BASE)
    config = config_json(BASE, value_head={"type": "mean"})
    directory = save_checkpoint(
        tmp_path / "more", state_dict | POLICY | VALUE, config, weights=weights
    )
    with pytest.warns(DumpActivationsWarning) as caught:
        model = load_encoder(directory)
    (warning,) = caught
    for module in ("policy_head", "value_head", "value_pre_pool_norm", "value_pre_pool_mlp"):
        assert f"{module}," in str(warning.message) or f"{module}:" in str(warning.message)
    assert "ev_heads" not in str(warning.message)
    assert_loads_as(model, state_dict)


def test_the_config_chooses_one_of_two_heads(tmp_path):
    policy = replace(BASE, head_type="action_policy")
    state_dict = random_state_dict(policy)
    both = random_state_dict(BASE, seed=1) | state_dict
    with pytest.warns(DumpActivationsWarning, match="ev_heads"):
        model = load_encoder(save_checkpoint(tmp_path / "both", both, config_json(policy)))
    assert_loads_as(model, state_dict, policy)


@pytest.mark.parametrize("lacking", ["ev_heads.0", "ev_heads.2.bias"])
def test_half_a_head_is_refused(lacking, tmp_path):
    weights = {k: v for k, v in random_state_dict(BASE).items() if not k.startswith(lacking)}
    text = refused(save_checkpoint(tmp_path / "half", weights, config_json(BASE)))
    assert f"missing {lacking}" in text


def test_a_trunk_without_a_head(tmp_path):
    state_dict = random_state_dict(BASE)
    trunk = {name: value for name, value in state_dict.items() if "ev_heads" not in name}
    model = load_encoder(save_checkpoint(tmp_path / "trunk", trunk, config_json(BASE)))
    hidden, logits = forward(model)
    assert_close(hidden, naive_forward(state_dict, BASE, BOARDS)[0])
    assert logits.shape == (len(BOARDS), 0)


def test_a_state_dict_of_another_model_says_what_it_has(tmp_path):
    foreign = {f"encoder.{name}": value for name, value in random_state_dict(BASE).items()}
    text = refused(save_checkpoint(tmp_path / "foreign", foreign, config_json(BASE)))
    assert "missing tok_emb.weight" in text
    assert "not of this model encoder" in text


@pytest.mark.parametrize("weights", ["model.safetensors", "model.pt", "step.pt"])
def test_transformer_engine_is_refused_by_its_name(weights, tmp_path):
    config = config_json(BASE, model_backend="transformer_engine")
    foreign = {"blocks.0.layer.qkv_weight": torch.zeros(3)}
    directory = save_checkpoint(tmp_path / "te", foreign, config, weights=weights)
    assert "model_backend transformer_engine" in refused(
        directory / weights if weights == "step.pt" else directory
    )


def test_a_directory_without_weights_lists_those_it_does_not_take(tmp_path):
    names = ["model-step-00001000.pt", "model-step-00002000.pt", "ema.safetensors", "notes.txt"]
    for name in names:
        (tmp_path / name).write_bytes(b"not read")
    for _ in range(2):
        text = refused(tmp_path)
        assert all(name in text for name in names[:3])
        assert "notes.txt" not in text
        (tmp_path / "config.json").write_text(json.dumps(config_json(BASE)))


def save_shards(directory, state_dict, *, count=3):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_json(BASE)))
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        names = list(state_dict)[i::count]
        save_file({name: state_dict[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return weight_map, index


def test_sharded_safetensors(tmp_path):
    state_dict = random_state_dict(BASE)
    wrapped = {f"_orig_mod.{name}": value for name, value in state_dict.items()}
    weight_map, index = save_shards(tmp_path / "a", wrapped)
    save_weights(index.parent / "model.pt", random_state_dict(BASE, seed=1), config_json(BASE))
    model = load_encoder(index.parent)
    assert_loads_as(model, state_dict)
    assert {path.name for path in model.checkpoint_files} == {
        "config.json",
        index.name,
        *weight_map.values(),
    }


@pytest.mark.parametrize(
    "change",
    [
        {"tok_emb.weight": "../a/model-00001-of-00003.safetensors"},
        {"tok_emb.weight": "model-00009-of-00003.safetensors"},
        {"tok_emb.weight": "model-00002-of-00003.safetensors"},
        {"tok_emb.weight": "config.json"},
        {"tok_emb.weight": 3},
        {"nothing": "model-00001-of-00003.safetensors"},
    ],
    ids=["elsewhere", "missing", "not-in-it", "config", "number", "unknown"],
)
def test_an_index_that_lies(change, tmp_path):
    weight_map, index = save_shards(tmp_path / "a", random_state_dict(BASE))
    index.write_text(json.dumps({"weight_map": weight_map | change}))
    text = refused(index.parent)
    assert "model.safetensors.index.json" in text


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.pt", "model.safetensors.index.json", "config.json"]
)
def test_a_git_lfs_pointer_is_named_as_one(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json(BASE)))
    (tmp_path / name).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n"
    )
    (tmp_path / "model-stable.pt").write_bytes(b"not read")
    text = refused(tmp_path)
    assert "git-LFS pointer" in text
    assert name in text


def test_weights_that_are_not_finite_are_named_once(tmp_path):
    state_dict = random_state_dict(BASE)
    state_dict["blocks.1.mlp.w_up.weight"][2, 3:5] = float("nan")
    state_dict["blocks.0.attn.wq.weight"][0, 0] = float("-inf")
    with pytest.warns(DumpActivationsWarning) as caught:
        load_encoder(save_checkpoint(tmp_path / "nan", state_dict, config_json(BASE)))
    (warning,) = caught
    assert "blocks.1.mlp.w_up.weight (2 NaN, 0 infinite)" in str(warning.message)
    assert "blocks.0.attn.wq.weight (0 NaN, 1 infinite)" in str(warning.message)


def test_the_tokenizer_next_to_a_checkpoint_is_kept_as_text(tmp_path):
    directory = save_checkpoint(tmp_path / "a", random_state_dict(BASE), config_json(BASE))
    assert load_encoder(directory).tokenizer is None
    text = '{"bins": [0.5,\r\n 1],\t"name": "é"}'
    (directory / "tokenizer.json").write_bytes(text.encode())
    assert load_encoder(directory).tokenizer == text
    assert load_encoder(directory, random_init=True).tokenizer == text
    for unfit in (b" " * 70_000, b"\xff\xfe"):
        (directory / "tokenizer.json").write_bytes(unfit)
        assert load_encoder(directory).tokenizer is None


def test_two_keys_that_are_one_without_their_prefix(tmp_path):
    """Neither copy may win in silence."""
    state_dict = random_state_dict(BASE)
    other = random_state_dict(BASE, seed=1)["tok_emb.weight"]
    save_file(state_dict | {"module.tok_emb.weight": other}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_json(BASE)))
    assert "tok_emb.weight" in refused(tmp_path)


def test_a_bundle_given_by_its_path_uses_its_own_config(tmp_path):
    save_checkpoint(tmp_path, random_state_dict(BASE, seed=1), config_json(replace(BASE, eps=0.5)))
    state_dict = random_state_dict(BASE)
    save_weights(tmp_path / "model-best.pt", state_dict, config_json(BASE))
    assert_loads_as(load_encoder(tmp_path / "model-best.pt"), state_dict)


def test_safetensors_take_the_config_of_a_bundle_next_to_them(tmp_path):
    state_dict = random_state_dict(BASE)
    save_file(state_dict, tmp_path / "model.safetensors")
    torch.save(bundle(random_state_dict(BASE, seed=1), config_json(BASE)), tmp_path / "model.pt")
    assert_loads_as(load_encoder(tmp_path), state_dict)


def test_an_empty_config_of_a_bundle_and_nulls_in_it_are_none(tmp_path):
    state_dict = random_state_dict(BASE)
    (tmp_path / "config.json").write_text(json.dumps(config_json(BASE)))
    content = bundle(state_dict, config_json(BASE)) | {"encoder_config": {"layer_norm_eps": None}}
    torch.save(content, tmp_path / "model.pt")
    assert_loads_as(load_encoder(tmp_path), state_dict)
    old = {"model": state_dict, "encoder_config": {}}
    torch.save(old | {"training_config": {"encoder": config_json(BASE)}}, tmp_path / "old.pt")
    assert_loads_as(load_encoder(tmp_path / "old.pt"), state_dict)


def test_a_bundle_of_more_than_plain_values_says_of_what(tmp_path):
    content = bundle(random_state_dict(BASE), config_json(BASE))
    content["resume"] = {"rng": np.random.default_rng(0).bit_generator.state, "at": tmp_path}
    torch.save(content | {"numbers": np.arange(3)}, tmp_path / "model.pt")
    text = refused(tmp_path / "model.pt")
    for word in ("PosixPath", "numpy", "save it again with 'model' and 'encoder_config'"):
        assert word in text


@pytest.mark.parametrize(
    "name",
    ["9" * 5000 + ".x", "x" * 100_000, "\x1b[31m\nx", "x" * 300 + "\x1b\n"],
    ids=["number", "long", "control", "both"],
)
def test_names_from_the_file_are_quoted_in_one_short_line(name, tmp_path):
    state_dict = random_state_dict(BASE)
    within = state_dict | {f"blocks.{name}": torch.zeros(2)}
    text = refused(save_checkpoint(tmp_path / "within", within, config_json(BASE)))
    assert "unexpected" in text
    outside = state_dict | {name: torch.zeros(2)}
    with pytest.warns(DumpActivationsWarning) as caught:
        load_encoder(save_checkpoint(tmp_path / "outside", outside, config_json(BASE)))
    for line in (text, str(caught[0].message)):
        assert line.isprintable()
        assert len(line) < 1000


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "no such checkpoint"),
        ("nowhere.pt", "no such checkpoint"),
        ("empty", "not a checkpoint"),
        ("weightless", "random_init=True"),
        ("a" * 300, "name too long"),
        ("weightless/model-step-1.safetensors", "give the directory"),
    ],
)
def test_a_path_without_a_checkpoint(name, words, tmp_path):
    (tmp_path / "empty").mkdir()
    save_checkpoint(
        tmp_path / "weightless", {}, config_json(BASE), weights="model-step-1.safetensors"
    )
    text = refused(tmp_path / name)
    assert words in text
    assert str(tmp_path / name) in text


def test_a_path_may_start_with_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    checkpoint = VARIANTS["gqa-4-2"](tmp_path / "checkpoint")
    model = load_encoder("~/checkpoint")
    assert_loads_as(model, checkpoint.state_dict)
    assert model.checkpoint == "~/checkpoint"
