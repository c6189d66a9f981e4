"""Every kind of checkpoint loads as the model it holds; no hostile one does harm."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dump_activations import load_encoder
from dump_activations.errors import DumpActivationsError
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
from reference.model import assert_close, naive_forward
from reference.pools import random_boards

BOARDS = random_boards(23, seed=6)


def forward(model, boards=BOARDS):
    with torch.no_grad():
        hidden, logits = model(torch.from_numpy(boards.astype(np.int64)))
    return hidden.double().numpy(), logits.double().numpy()


def assert_loads_as(model, checkpoint):
    expected_hidden, expected_logits = naive_forward(
        checkpoint.state_dict, checkpoint.config, BOARDS
    )
    hidden, logits = forward(model)
    assert_close(hidden, expected_hidden)
    assert_close(logits, expected_logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_equals_the_naive_one(variant, tmp_path):
    checkpoint = VARIANTS[variant](tmp_path / "checkpoint")
    model = load_encoder(checkpoint.init)
    assert_loads_as(model, checkpoint)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert set(model.state_dict()) == set(checkpoint.state_dict)


def test_demo_checkpoint(demo_checkpoint):
    assert_loads_as(load_encoder(str(demo_checkpoint)), load_demo(demo_checkpoint))


def test_a_copy_of_the_weights_is_kept(tmp_path):
    """The model does not map the file, so nobody can change the weights of a run."""
    checkpoint = VARIANTS["gqa-4-2"](tmp_path / "checkpoint")
    model = load_encoder(checkpoint.init)
    with (checkpoint.init / "model.safetensors").open("r+b") as file:
        file.write(bytes((checkpoint.init / "model.safetensors").stat().st_size))
    assert_loads_as(model, checkpoint)


def test_other_files_are_left_alone(tmp_path):
    checkpoint = VARIANTS["gqa-4-2"](tmp_path / "checkpoint")
    for name in ("optimizer.pt", "model-00001.safetensors", "latest.pt", "model-final.pt"):
        (checkpoint.init / name).write_bytes(b"not weights")
    assert_loads_as(load_encoder(checkpoint.init), checkpoint)


def test_random_init_gives_an_untrained_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json(BASE)))
    model = load_encoder(tmp_path, random_init=True)
    hidden, logits = forward(model)
    assert hidden.shape == (23, 16, BASE.hidden)
    assert logits.shape == (23, 4, BASE.n_bins)
    assert np.isfinite(logits).all()
    assert np.unique(logits).size > 23


def test_no_weights_is_an_error_that_names_random_init(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json(BASE)))
    with pytest.raises(FileNotFoundError, match="random_init=True") as caught:
        load_encoder(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("weights", ["model.safetensors", "model.pt"])
def test_misfits_are_listed(weights, tmp_path):
    state_dict = random_state_dict(BASE)
    del state_dict["blocks.1.mlp.w_up.weight"]
    state_dict["blocks.0.attn.extra"] = torch.zeros(3)
    state_dict["blocks.0.attn.wo.weight"] = torch.zeros(32, 31)
    save_checkpoint(tmp_path / "bad", state_dict, config_json(BASE), weights=weights)
    with pytest.raises(ValueError, match="missing") as caught:
        load_encoder(tmp_path / "bad")
    text = str(caught.value)
    for word in ("blocks.1.mlp.w_up.weight", "unexpected", "blocks.0.attn.extra"):
        assert word in text
    assert "blocks.0.attn.wo.weight" in text
    assert "32" in text
    assert "31" in text
    assert "\n" not in text


def test_only_the_first_few_misfits_are_listed(tmp_path):
    config = replace(BASE, layers=40, hidden=8, heads=2, kv_heads=2, mlp=8)
    small = random_state_dict(replace(config, layers=1))
    save_checkpoint(tmp_path / "bad", small, config_json(config))
    with pytest.raises(ValueError, match=r"blocks\.1\.") as caught:
        load_encoder(tmp_path / "bad")
    assert len(str(caught.value)) < 1500
    assert "\n" not in str(caught.value)


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


def _truncated(content, keep):
    return content[: int(len(content) * keep)]


@pytest.mark.parametrize("weights", WEIGHT_FILES)
@pytest.mark.parametrize("keep", [0, 0.001, 0.02, 0.5, 0.999])
def test_truncated_weights(weights, keep, tmp_path):
    save_checkpoint(tmp_path / "cut", random_state_dict(BASE), config_json(BASE), weights=weights)
    path = tmp_path / "cut" / weights
    path.write_bytes(_truncated(path.read_bytes(), keep))
    assert weights in refused(tmp_path / "cut")


@pytest.mark.parametrize("weights", ["model.safetensors", "model.pt"])
def test_flipped_header_bytes_load_or_are_refused(weights, tmp_path):
    save_checkpoint(tmp_path / "bits", random_state_dict(BASE), config_json(BASE), weights=weights)
    path = tmp_path / "bits" / weights
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        bad = bytearray(good)
        end = rng.choice([80, 3000, len(good)])
        for place in rng.integers(0, end, size=3):
            bad[place] = rng.integers(256)
        path.write_bytes(bad)
        try:
            load_encoder(tmp_path / "bits")
        except DumpActivationsError as error:
            assert "\n" not in str(error)  # noqa: PT017


def _safetensors(header, data=b""):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


HOSTILE_SAFETENSORS = {
    "giant-header": struct.pack("<Q", 2**63) + b"{}",
    "header-past-the-end": struct.pack("<Q", 10**6) + b"{}",
    "not-json": _safetensors(b"{'a': os}"),
    "list": _safetensors([1, 2]),
    "empty": _safetensors({}),
    "offsets-past-the-end": _safetensors(
        {"tok_emb.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0\0"
    ),
    "giant-shape": _safetensors(
        {"tok_emb.weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}},
        b"\0" * 8,
    ),
    "overflowing-strides": _safetensors(
        {"tok_emb.weight": {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}}
    ),
    "length-past-int64": _safetensors(
        {"tok_emb.weight": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}
    ),
    "odd-name": _safetensors(
        {"\n\x1b[31m": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4
    ),
}


@pytest.mark.parametrize("case", HOSTILE_SAFETENSORS)
def test_hostile_safetensors(case, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json(BASE)))
    (tmp_path / "model.safetensors").write_bytes(HOSTILE_SAFETENSORS[case])
    text = refused(tmp_path)
    assert str(tmp_path) in text
    assert "\x1b" not in text


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64])
def test_weights_of_a_dtype_that_is_none(dtype, tmp_path):
    state_dict = random_state_dict(BASE)
    state_dict["tok_emb.weight"] = state_dict["tok_emb.weight"].to(dtype)
    save_checkpoint(tmp_path / "ints", state_dict, config_json(BASE))
    assert "tok_emb.weight" in refused(tmp_path / "ints")


HOSTILE_CONFIGS = {
    "empty": "",
    "not-json": "{hidden_size: 32}",
    "cut": '{"hidden_size": 32,',
    "list": "[1, 2]",
    "number": "12",
    "null": "null",
    "not-text": b"\xff\xfe\x00\x01",
    "deep": "[" * 100_000,
    "deep-object": '{"a":' * 100_000 + "1" + "}" * 100_000,
}


@pytest.mark.parametrize("case", HOSTILE_CONFIGS)
def test_config_that_is_not_an_object(case, tmp_path):
    directory = save_checkpoint(tmp_path / "bad", random_state_dict(BASE), config_json(BASE))
    text = HOSTILE_CONFIGS[case]
    (directory / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "config.json" in refused(directory)


REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "layer_norm_eps",
)


@pytest.mark.parametrize("field", REQUIRED)
def test_missing_config_field(field, tmp_path):
    directory = save_checkpoint(
        tmp_path / "bad", random_state_dict(BASE), config_json(BASE, **{field: None})
    )
    assert field in refused(directory)


BAD_VALUES = [
    *[
        (field, value)
        for field in (*REQUIRED[:-1], "num_key_value_heads")
        for value in (0, -4, "32", 32.5, True, [4], {}, 10**30)
    ],
    *[
        (field, value)
        for field in ("input_vocab_size", "max_position_embeddings")
        for value in ("16", 2.5, [16])
    ],
    ("max_position_embeddings", 0),
    ("max_position_embeddings", -1),
    ("max_position_embeddings", 8),
    ("max_position_embeddings", 15),
    *[("layer_norm_eps", value) for value in ("1e-6", -1.0, [1e-6], True)],
    *[
        (field, value)
        for field in ("use_attention_sinks", "use_qk_norm")
        for value in ("yes", 2, [])
    ],
    ("num_key_value_heads", 3),
    ("num_attention_heads", 5),
    ("num_attention_heads", 3),
    ("hidden_size", 34),
]


@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
def test_bad_config_value(field, value, tmp_path):
    directory = save_checkpoint(
        tmp_path / "bad", random_state_dict(BASE), config_json(BASE, **{field: value})
    )
    text = refused(directory)
    assert str(directory) in text
    assert "config" in text or field in text


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
        assert_close(forward(model)[1], naive_forward(state_dict, BASE, BOARDS)[1])


def test_null_means_the_default(tmp_path):
    fields = config_json(replace(BASE, kv_heads=4)) | {"num_key_value_heads": None}
    state_dict = random_state_dict(replace(BASE, kv_heads=4))
    model = load_encoder(save_checkpoint(tmp_path / "null", state_dict, fields))
    expected = naive_forward(state_dict, replace(BASE, kv_heads=4), BOARDS)
    assert_close(forward(model)[0], expected[0])


@pytest.mark.parametrize("eps", ["NaN", "Infinity", "-Infinity", "1e400", "1" + "0" * 400])
def test_eps_that_is_no_number(eps, tmp_path):
    directory = save_checkpoint(tmp_path / "bad", random_state_dict(BASE), config_json(BASE))
    text = json.dumps(config_json(BASE)).replace(
        '"layer_norm_eps": 1e-06', f'"layer_norm_eps": {eps}'
    )
    assert eps in text
    (directory / "config.json").write_text(text)
    assert "layer_norm_eps" in refused(directory)


HUGE_SIZES = [
    {"num_hidden_layers": 10**9},
    {"hidden_size": 2**40, "num_attention_heads": 1, "num_key_value_heads": 1},
    {"intermediate_size": 2**50},
    {"input_vocab_size": 2**50},
    {"max_position_embeddings": 2**50},
]
LOAD_WITH_LITTLE_MEMORY = """
import resource, sys
import torch
from dump_activations import load_encoder
from dump_activations.errors import DumpActivationsError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for init in sys.argv[1:]:
    try:
        load_encoder(init)
    except DumpActivationsError as error:
        print(error)
"""


def test_sizes_that_the_weights_do_not_justify(tmp_path):
    """Neither the memory nor the time of a model that the config alone claims is spent."""
    state_dict = random_state_dict(BASE)
    directories = [
        save_checkpoint(tmp_path / next(iter(change)), state_dict, config_json(BASE, **change))
        for change in HUGE_SIZES
    ]
    result = subprocess.run(
        [sys.executable, "-c", LOAD_WITH_LITTLE_MEMORY, *map(str, directories)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(directories)
    assert all(str(directory) in line for directory, line in zip(directories, lines, strict=True))


NOT_BUNDLES = {
    "empty": b"",
    "garbage": b"\x00\x01garbage" * 100,
    "text": b"not a bundle",
    "zip": b"PK\x03\x04" + b"\0" * 60,
}
NOT_BUNDLE_OBJECTS = {
    "list": [1, 2],
    "number": 3,
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


@pytest.mark.parametrize("case", [*NOT_BUNDLES, *NOT_BUNDLE_OBJECTS])
@pytest.mark.parametrize("place", ["file", "directory"])
def test_a_bundle_that_is_not_one(case, place, tmp_path):
    path = tmp_path / "model.pt"
    if case in NOT_BUNDLES:
        path.write_bytes(NOT_BUNDLES[case])
    else:
        torch.save(NOT_BUNDLE_OBJECTS[case], path)
    init = path if place == "file" else tmp_path
    assert str(init) in refused(init)


def test_both_heads_in_one_checkpoint_are_refused(tmp_path):
    state_dict = random_state_dict(BASE) | {
        "policy_head.weight": torch.zeros(4, 32),
        "policy_head.bias": torch.zeros(4),
    }
    text = refused(save_checkpoint(tmp_path / "both", state_dict, config_json(BASE)))
    assert "policy_head" in text


def test_no_head_at_all_is_refused(tmp_path):
    state_dict = {
        name: value for name, value in random_state_dict(BASE).items() if "ev_heads" not in name
    }
    text = refused(save_checkpoint(tmp_path / "headless", state_dict, config_json(BASE)))
    assert "ev_heads" in text


def test_embedding_smaller_than_the_vocabulary_is_refused(tmp_path):
    state_dict = random_state_dict(replace(BASE, vocab=16))
    text = refused(save_checkpoint(tmp_path / "short", state_dict, config_json(BASE)))
    assert "tok_emb" in text or "input_vocab_size" in text


def test_two_keys_that_are_one_without_their_prefix(tmp_path):
    """Neither copy may win in silence."""
    state_dict = random_state_dict(BASE)
    other = random_state_dict(BASE, seed=1)["tok_emb.weight"]
    save_file(state_dict | {"module.tok_emb.weight": other}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_json(BASE)))
    assert "tok_emb.weight" in refused(tmp_path)


def test_weights_saved_beside_a_config_of_the_bundle(tmp_path):
    """A bundle file given by its path uses its own config, not that of its directory."""
    save_checkpoint(tmp_path, random_state_dict(BASE, seed=1), config_json(replace(BASE, eps=0.5)))
    checkpoint_state = random_state_dict(BASE)
    save_weights(tmp_path / "model-best.pt", checkpoint_state, config_json(BASE))
    expected = naive_forward(checkpoint_state, BASE, BOARDS)
    assert_close(forward(load_encoder(tmp_path / "model-best.pt"))[0], expected[0])


def test_safetensors_beside_a_bundle_that_has_the_config(tmp_path):
    state_dict = random_state_dict(BASE)
    save_file(state_dict, tmp_path / "model.safetensors")
    torch.save(bundle(random_state_dict(BASE, seed=1), config_json(BASE)), tmp_path / "model.pt")
    expected = naive_forward(state_dict, BASE, BOARDS)
    assert_close(forward(load_encoder(tmp_path))[0], expected[0])


def test_an_empty_config_of_a_bundle_and_nulls_in_it_are_none(tmp_path):
    state_dict = random_state_dict(BASE)
    expected = naive_forward(state_dict, BASE, BOARDS)
    (tmp_path / "config.json").write_text(json.dumps(config_json(BASE)))
    content = bundle(state_dict, config_json(BASE)) | {"encoder_config": {"layer_norm_eps": None}}
    torch.save(content, tmp_path / "model.pt")
    assert_close(forward(load_encoder(tmp_path))[0], expected[0])
    old = {"model": state_dict, "encoder_config": {}}
    torch.save(old | {"training_config": {"encoder": config_json(BASE)}}, tmp_path / "old.pt")
    assert_close(forward(load_encoder(tmp_path / "old.pt"))[0], expected[0])


def test_a_bundle_of_more_than_plain_values_says_of_what(tmp_path):
    content = bundle(random_state_dict(BASE), config_json(BASE))
    content["resume"] = {"rng": np.random.default_rng(0).bit_generator.state, "at": tmp_path}
    torch.save(content | {"numbers": np.arange(3)}, tmp_path / "model.pt")
    text = refused(tmp_path / "model.pt")
    for word in ("PosixPath", "numpy", "save it again with 'model' and 'encoder_config'"):
        assert word in text


@pytest.mark.parametrize("member", ["data.pkl", "data/0"])
def test_a_bundle_that_inflates_is_refused_unread(member, tmp_path):
    torch.save(bundle(random_state_dict(BASE), config_json(BASE)), tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as inflating,
    ):
        for info in plain.infolist():
            more = 200 << 20 if info.filename.endswith(member) else 0
            inflating.writestr(info.filename, plain.read(info) + bytes(more))
    assert "compressed" in refused(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "name",
    ["blocks." + "9" * 5000 + ".x", "x" * 100_000, "\x1b[31m\nx", "x" * 300 + "\x1b\n"],
    ids=["number", "long", "control", "both"],
)
def test_names_from_the_file_are_quoted_in_one_short_line(name, tmp_path):
    state_dict = random_state_dict(BASE) | {name: torch.zeros(2)}
    text = refused(save_checkpoint(tmp_path / "odd", state_dict, config_json(BASE)))
    assert "unexpected" in text
    assert text.isprintable()
    assert len(text) < 1000


def test_a_path_that_no_file_system_has(tmp_path):
    assert "name too long" in refused(tmp_path / ("a" * 300))


@pytest.mark.parametrize("name", ["nowhere", "nowhere.pt", "nowhere/model.pt"])
def test_no_such_checkpoint(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_encoder(tmp_path / name)


def test_an_empty_directory(tmp_path):
    assert str(tmp_path) in refused(tmp_path)


def test_a_file_that_is_not_a_bundle_by_its_name(tmp_path):
    save_file(random_state_dict(BASE), tmp_path / "model.safetensors")
    assert "model.safetensors" in refused(tmp_path / "model.safetensors")
