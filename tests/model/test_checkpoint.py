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
INDEX = "model.safetensors.index.json"
both_forms = pytest.mark.parametrize("weights", ["model.safetensors", "model.pt"])


def assert_loads_as(model, state_dict, config=BASE):
    with torch.no_grad():
        found = model(torch.from_numpy(BOARDS.astype(np.int64)))
    for values, expected in zip(found, naive_forward(state_dict, config, BOARDS), strict=True):
        assert_close(values.double().numpy(), expected)


def equal_weights(model, other):
    pairs = zip(model.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def base(directory, *, seed=0, weights="model.safetensors", **fields):
    """Write a good checkpoint, but for fields of its config; return its weights."""
    state_dict = random_state_dict(BASE, seed=seed)
    save_checkpoint(directory, state_dict, config_json(BASE, **fields), weights=weights)
    return state_dict


def refused(init):
    """Load a checkpoint that must be refused with one short line, and return the line."""
    with pytest.raises(DumpActivationsError) as caught:
        load_encoder(init)
    text = str(caught.value)
    assert text.isprintable()
    assert str(init) in text
    assert len(text) < 1500
    return text


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


def test_the_model_keeps_a_copy_of_the_weights_and_reads_no_other_file(tmp_path, monkeypatch):
    """The model does not map the file, so nobody can change the weights of a run."""
    state_dict = base(tmp_path / "a")
    for name in ("optimizer.pt", "model-00001.safetensors", "latest.pt", *WEIGHT_FILES[2:]):
        (tmp_path / "a" / name).write_bytes(b"not weights")
    monkeypatch.setenv("HOME", str(tmp_path))
    model = load_encoder("~/a")
    weights = tmp_path / "a" / "model.safetensors"
    with weights.open("r+b") as file:
        file.write(bytes(weights.stat().st_size))
    assert_loads_as(model, state_dict)
    assert model.checkpoint == "~/a"


def test_random_init_gives_an_untrained_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json(replace(BASE, sinks=True))))
    model, same, other = (load_encoder(tmp_path, random_init=True, seed=seed) for seed in (0, 0, 1))
    with torch.no_grad():
        hidden, logits = model(torch.from_numpy(BOARDS))
    assert hidden.shape == (23, 16, BASE.hidden)
    assert logits.shape == (23, 4, BASE.n_bins)
    assert np.unique(logits).size > 23
    assert equal_weights(model, same)
    assert not equal_weights(model, other)
    # PyTorch's default initialisation, module after module.
    torch.manual_seed(0)
    assert torch.equal(model.tok_emb.weight, torch.nn.Embedding(17, BASE.hidden).weight)
    assert not model.blocks[1].attn.sinks.any()


@pytest.mark.parametrize("random_init", [False, True])
@both_forms
def test_the_callers_default_dtype_device_and_generator_change_nothing(
    weights, random_init, tmp_path
):
    base(tmp_path, weights=weights)
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


def without(state_dict, prefix):
    return {name: value for name, value in state_dict.items() if not name.startswith(prefix)}


def misshapen(state_dict):
    changed = without(state_dict, "blocks.1.mlp.w_up")
    changed["tok_emb.weight"] = torch.zeros(16, 32)  # smaller than the vocabulary
    changed["blocks.0.attn.wo.weight"] = torch.zeros(32, 31)
    return changed | {"blocks.0.attn.extra": torch.zeros(3)}


# How good weights are changed, and words of the refusal.
UNFIT_WEIGHTS = {
    "misfits": (
        misshapen,
        "missing blocks.1.mlp.w_up.weight; "
        "misshapen tok_emb.weight (16, 32), not (17, 32), blocks.0.attn.wo.weight (32, 31)",
        "unexpected blocks.0.attn.extra",
    ),
    "half a head": (lambda weights: without(weights, "ev_heads.0"), "missing ev_heads.0"),
    "a bias": (lambda weights: without(weights, "ev_heads.2.bias"), "missing ev_heads.2.bias"),
    "another model's": (
        lambda weights: {f"encoder.{name}": value for name, value in weights.items()},
        "missing tok_emb.weight",
        "not of this model encoder",
    ),
    # Neither copy may win in silence.
    "one name twice": (
        lambda weights: weights | {"module.tok_emb.weight": weights["tok_emb.weight"] + 1},
        "two tensors named tok_emb.weight",
    ),
    **{
        str(dtype): (
            lambda weights, dtype=dtype: (
                weights | {"tok_emb.weight": torch.zeros(17, 32).to(dtype)}
            ),
            "tok_emb.weight",
        )
        for dtype in (torch.int32, torch.int8, torch.bool, torch.complex64)
    },
}


@pytest.mark.parametrize(("change", "words"), [(it[0], it[1:]) for it in UNFIT_WEIGHTS.values()])
@both_forms
def test_weights_that_do_not_fit_are_listed(weights, change, words, tmp_path):
    save_checkpoint(tmp_path, change(random_state_dict(BASE)), config_json(BASE), weights=weights)
    text = refused(tmp_path)
    assert all(word in text for word in words), text


def test_only_the_first_few_misfits_are_listed(tmp_path):
    config = replace(BASE, layers=40, hidden=8, heads=2, kv_heads=2, mlp=8)
    save_checkpoint(tmp_path, random_state_dict(replace(config, layers=1)), config_json(config))
    assert "missing blocks.1." in refused(tmp_path)


class Evil:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("save", [torch.save, lambda it, to: to.write_bytes(pickle.dumps(it))])
@pytest.mark.parametrize("place", ["resume", "model"])
def test_code_in_a_bundle_does_not_run(save, place, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "evil.pt"
    content = bundle(random_state_dict(BASE), config_json(BASE))
    content[place]["blocks.0.attn.wq.weight"] = Evil(canary)
    save(content, path)
    refused(path)
    assert not canary.exists()


def _safetensors(shape, data=b""):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, len(data)]}
    header = json.dumps({"tok_emb.weight": entry}).encode()
    return struct.pack("<Q", len(header)) + header + data


POINTER = (
    f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n".encode()
)
# A file of a good checkpoint, what is in its place, and a word of the refusal.
DAMAGED_FILES = {
    "no config": ("config.json", b"", "config.json"),
    "not JSON": ("config.json", b"{hidden_size: 32}", "config.json"),
    "a list": ("config.json", b"[1, 2]", "config.json"),
    "null": ("config.json", b"null", "config.json"),
    "not text": ("config.json", b"\xff\xfe\0\1", "config.json"),
    "deep": ("config.json", b"[" * 10**5, "config.json"),
    "deep objects": ("config.json", b'{"a":' * 10**5, "config.json"),
    **{
        f"{name} pointer": (name, POINTER, "git-LFS pointer")
        for name in ("config.json", "model.safetensors", "model-best.pt", INDEX)
    },
    **{
        name: ("model.safetensors", data, "model.safetensors")
        for name, data in {
            "thousands of axes": _safetensors([1] * 20_000, bytes(4)),
            "a million digits": _safetensors(["N"], bytes(4)).replace(b'"N"', b"1" + b"0" * 10**6),
            "header past the end": struct.pack("<Q", 10**6) + b"{}",
            "no tensors": struct.pack("<Q", 2) + b"{}",
            "overflowing strides": _safetensors([0, 2**40, 2**40]),
            "length past int64": _safetensors([0, 2**63]),
            "odd name": _safetensors([1], bytes(4)).replace(
                b"tok_emb.weight", b"\\n\\u001b[31m456"
            ),
        }.items()
    },
}


@pytest.mark.parametrize(("name", "data", "word"), DAMAGED_FILES.values(), ids=DAMAGED_FILES)
def test_a_damaged_file_is_named(name, data, word, tmp_path):
    base(tmp_path, weights="model-stable.pt")  # which is read last
    (tmp_path / name).write_bytes(data)
    text = refused(tmp_path)
    assert word in text
    assert name in text


REQUIRED = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
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
    base(tmp_path, **{field: value})
    assert field in refused(tmp_path)


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
    state_dict = base(tmp_path, **{field: value})
    try:
        model = load_encoder(tmp_path)
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


GOOD = {"model": random_state_dict(BASE)}
NOT_BUNDLES = {
    "empty": (b"",),
    "garbage": (b"\x00\x01garbage" * 100, "not a zip archive"),
    "zip": (b"PK\x03\x04" + b"\0" * 60,),
    "list": ([1, 2],),
    "tensor": (torch.zeros(3),),
    "no-model": ({"encoder_config": config_json(BASE)},),
    "model-is-a-list": ({"model": [torch.zeros(2)], "encoder_config": config_json(BASE)},),
    "model-of-numbers": ({"model": {"tok_emb.weight": 3}, "encoder_config": config_json(BASE)},),
    "model-of-odd-keys": ({"model": {3: torch.zeros(2)}, "encoder_config": config_json(BASE)},),
    "model-empty": ({"model": {}, "encoder_config": config_json(BASE)},),
    "no-config": (GOOD,),
    "config-is-a-list": (GOOD | {"encoder_config": [1]},),
    "training-config-is-a-list": (GOOD | {"training_config": [1]},),
    "training-config-without": (GOOD | {"training_config": {"lr": 1}},),
    "config-with-gap": (GOOD | {"encoder_config": config_json(BASE, hidden_size=None)},),
    "more than plain values": (
        GOOD
        | {"encoder_config": config_json(BASE), "rng": np.arange(3), "at": os.PathLike}
        | {"resume": {"rng": np.random.default_rng(0).bit_generator.state}},
        *("PathLike", "numpy", "save it again with 'model' and 'encoder_config'"),
    ),
}


@pytest.mark.parametrize("case", NOT_BUNDLES)
def test_a_bundle_that_is_not_one(case, tmp_path):
    content, *words = NOT_BUNDLES[case]
    path = tmp_path / "model.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    for init in (path, tmp_path):
        text = refused(init)
        assert all(word in text for word in words), text


MORE_WEIGHTS = {
    "policy_head": {"policy_head.weight": torch.ones(4, 32), "policy_head.bias": torch.zeros(4)},
    "value_head": {"value_head.weight": torch.zeros(1, 32), "value_head.bins": torch.arange(3)},
    "value_pre_pool_norm": {"value_pre_pool_norm.weight": torch.zeros(32)},
    "value_pre_pool_mlp": {"module.value_pre_pool_mlp.0.weight": torch.zeros(8, 32)},
}


@both_forms
def test_weights_without_a_module_are_left_out_with_one_warning(weights, tmp_path):
    state_dict = random_state_dict(BASE)
    more = {name: tensor for of in MORE_WEIGHTS.values() for name, tensor in of.items()}
    fields = config_json(BASE, value_head={"type": "mean"})
    save_checkpoint(tmp_path, state_dict | more, fields, weights=weights)
    with pytest.warns(DumpActivationsWarning) as caught:
        model = load_encoder(tmp_path)
    (warning,) = caught
    assert f"{', '.join(sorted(MORE_WEIGHTS))}: left out" in str(warning.message)
    assert_loads_as(model, state_dict)


def test_the_config_chooses_one_of_two_heads(tmp_path):
    policy = replace(BASE, head_type="action_policy")
    state_dict = random_state_dict(policy)
    both = random_state_dict(BASE, seed=1) | state_dict
    with pytest.warns(DumpActivationsWarning, match="ev_heads"):
        model = load_encoder(save_checkpoint(tmp_path / "both", both, config_json(policy)))
    assert_loads_as(model, state_dict, policy)


def test_a_trunk_without_a_head(tmp_path):
    state_dict = random_state_dict(BASE)
    save_checkpoint(tmp_path, without(state_dict, "ev_heads"), config_json(BASE))
    hidden, logits = load_encoder(tmp_path)(torch.from_numpy(BOARDS))
    assert_close(hidden.detach().numpy(), naive_forward(state_dict, BASE, BOARDS)[0])
    assert logits.shape == (len(BOARDS), 0)


@pytest.mark.parametrize("weights", ["model.safetensors", "model.pt", "step.pt"])
def test_transformer_engine_is_refused_by_its_name(weights, tmp_path):
    config = config_json(BASE, model_backend="transformer_engine")
    foreign = {"blocks.0.layer.qkv_weight": torch.zeros(3)}
    save_checkpoint(tmp_path, foreign, config, weights=weights)
    text = refused(tmp_path / weights if weights == "step.pt" else tmp_path)
    assert "model_backend transformer_engine" in text


def test_a_directory_without_weights_lists_those_it_does_not_take(tmp_path):
    names = ["model-step-00001000.pt", "model-step-00002000.pt", "ema.safetensors", "notes.txt"]
    for name in names:
        (tmp_path / name).write_bytes(b"not read")
    for _ in range(2):
        text = refused(tmp_path)
        assert all(name in text for name in names[:3])
        assert "notes.txt" not in text
        (tmp_path / "config.json").write_text(json.dumps(config_json(BASE)))


def save_shards(directory, state_dict):
    """Write a sharded checkpoint, and return the file of each weight."""
    save_checkpoint(directory, {}, config_json(BASE), weights="model-stable.safetensors")
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        names = list(state_dict)[i::3]
        save_file({name: state_dict[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_sharded_safetensors(tmp_path):
    state_dict = random_state_dict(BASE)
    wrapped = {f"_orig_mod.{name}": value for name, value in state_dict.items()}
    files = set(save_shards(tmp_path, wrapped).values())
    save_weights(tmp_path / "model.pt", random_state_dict(BASE, seed=1), config_json(BASE))
    model = load_encoder(tmp_path)
    assert_loads_as(model, state_dict)
    assert {path.name for path in model.checkpoint_files} == {"config.json", INDEX, *files}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("tok_emb.weight", "../a/model-00001-of-00003.safetensors"),
        ("tok_emb.weight", "model-00009-of-00003.safetensors"),
        ("tok_emb.weight", "model-00002-of-00003.safetensors"),
        ("tok_emb.weight", "config.json"),
        ("tok_emb.weight", 3),
        ("tok_emb.weight", ["model-00001-of-00003.safetensors"]),
        ("nothing", "model-00001-of-00003.safetensors"),
    ],
    ids=["elsewhere", "missing", "not-in-it", "config", "number", "list", "unknown"],
)
def test_an_index_that_lies(name, file, tmp_path):
    weight_map = save_shards(tmp_path / "a", random_state_dict(BASE))
    (tmp_path / "a" / INDEX).write_text(json.dumps({"weight_map": weight_map | {name: file}}))
    assert INDEX in refused(tmp_path / "a")


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
    base(tmp_path)
    assert load_encoder(tmp_path).tokenizer is None
    text = '{"bins": [0.5,\r\n 1],\t"name": "é"}'
    (tmp_path / "tokenizer.json").write_bytes(text.encode())
    for random_init in (False, True):
        assert load_encoder(tmp_path, random_init=random_init).tokenizer == text
    for unfit in (b" " * 70_000, b"\xff\xfe"):
        (tmp_path / "tokenizer.json").write_bytes(unfit)
        assert load_encoder(tmp_path).tokenizer is None


def test_the_config_is_found(tmp_path):
    """In a bundle, next to safetensors, where one has nulls, where `encoder_config` is empty."""
    own, other, nulls, old = (tmp_path / name for name in ("own", "other", "nulls", "old.pt"))
    base(own, seed=1, layer_norm_eps=0.5)
    save_weights(own / "best.pt", GOOD["model"], config_json(BASE))
    save_weights(other / "model.safetensors", GOOD["model"], {})
    save_weights(other / "model.pt", random_state_dict(BASE, seed=1), config_json(BASE))
    base(nulls, weights="model-stable.pt")
    torch.save(GOOD | {"encoder_config": {"layer_norm_eps": None}}, nulls / "model.pt")
    config = {"encoder_config": {}, "training_config": {"encoder": config_json(BASE)}}
    torch.save(GOOD | config, old)
    for init in (own / "best.pt", other, nulls, old):
        assert_loads_as(load_encoder(init), GOOD["model"])


@pytest.mark.parametrize(
    "name",
    ["9" * 5000 + ".x", "x" * 100_000, "\x1b[31m\nx", "x" * 300 + "\x1b\n"],
    ids=["number", "long", "control", "both"],
)
def test_names_from_the_file_are_quoted_in_one_short_line(name, tmp_path):
    within = GOOD["model"] | {f"blocks.{name}": torch.zeros(2)}
    text = refused(save_checkpoint(tmp_path / "within", within, config_json(BASE)))
    assert "unexpected" in text
    outside = GOOD["model"] | {name: torch.zeros(2)}
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
    base(tmp_path / "weightless", weights="model-step-1.safetensors")
    assert words in refused(tmp_path / name)
