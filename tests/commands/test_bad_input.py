"""Bad input: one line that names what is wrong, the right exit code, and nothing left behind."""

import io
import json
import os
import pickle
import re
import struct
import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dump_activations import StepsDataset, dump, stream
from dump_activations.commands.dump import main
from reference.checkpoints import (
    BASE,
    bundle,
    config_json,
    random_state_dict,
    save_checkpoint,
)
from reference.datasets import ROW_DTYPES, encode_rows, make_dataset, random_boards

KEYS = (
    "final_hidden",
    "pooled",
    "head_logits",
    "head_probs",
    "layer_outputs",
    "attn_norm",
    "mlp_input",
    "rmsnorm_gammas",
    "attn_sinks",
)


@dataclass
class Place:
    """A good checkpoint and a good dataset, and an empty directory for the output."""

    root: object
    arguments: dict[str, str] = field(default_factory=dict)

    def run(self, capsys, *, code, names, **changes):
        """Run the command; return the one line it prints.

        Args:
            code: the exit code it must have.
            names: what the line must contain.
            **changes: flags to change, with _ for -; None takes one out.
        """
        arguments = self.arguments | {key.replace("_", "-"): v for key, v in changes.items()}
        line = []
        for flag, value in arguments.items():
            if value is True:
                line.append(f"--{flag}")
            elif value is not None:
                line.append(f"--{flag}={value}")
        capsys.readouterr()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            got = main(line)
        out, err = capsys.readouterr()
        # A warning would be one more line on stderr; what a run is going to write is a note.
        assert not [entry.message for entry in warned]
        assert "Traceback" not in out + err
        err = "".join(line for line in err.splitlines(True) if not line.startswith("note: "))
        assert len(err.splitlines()) == 1, err
        assert out == ""
        for name in names:
            assert str(name) in err, err
        assert got == code, err
        assert list((self.root / "out").iterdir()) == []
        return err


@pytest.fixture(scope="module")
def good_inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    save_checkpoint(root / "checkpoint", random_state_dict(BASE), config_json(BASE))
    make_dataset(root / "dataset", "packed_46", shards=3)
    return root


@pytest.fixture
def place(good_inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    return Place(
        tmp_path,
        {
            "init": str(good_inputs / "checkpoint"),
            "dataset": str(good_inputs / "dataset"),
            "n-samples": "20",
            "batch-size": "8",
            "output": str(tmp_path / "out" / "a.safetensors"),
            "device": "cpu",
            "allow-cpu": True,
        },
    )


def test_the_good_inputs_are_good(place, capsys):
    assert main([f"--{k}" if v is True else f"--{k}={v}" for k, v in place.arguments.items()]) == 0
    assert [path.name for path in (place.root / "out").iterdir()] == ["a.safetensors"]


# --- Wrong calls: exit code 2.

WRONG_CALLS = {
    "n-samples-zero": ({"n_samples": "0"}, ["--n-samples", "0"]),
    "n-samples-negative": ({"n_samples": "-5"}, ["--n-samples", "-5"]),
    "n-samples-not-a-number": ({"n_samples": "many"}, ["--n-samples", "many"]),
    "n-samples-fraction": ({"n_samples": "1.5"}, ["--n-samples", "1.5"]),
    "batch-size-zero": ({"batch_size": "0"}, ["--batch-size", "0"]),
    "batch-size-negative": ({"batch_size": "-1"}, ["--batch-size", "-1"]),
    "seed-negative": ({"seed": "-1"}, ["--seed", "-1"]),
    "seed-not-a-number": ({"seed": "x"}, ["--seed", "x"]),
    "unknown-key": ({"outputs": "attn_paterns"}, ["--outputs", "attn_paterns", "attn_pattern"]),
    "like-no-key": ({"outputs": "zzz"}, ["--outputs", "zzz", *KEYS]),
    "layer-of-a-hook": (
        {"outputs": "blocks.0.hook_resid_mit"},
        ["blocks.0.hook_resid_mit", " hook_resid_mid"],
    ),
    "glob-of-nothing": ({"outputs": "pooled,attn_x*"}, ["--outputs", "attn_x*"]),
    "glob-of-what-the-model-lacks": ({"outputs": "attn_sink?"}, ["--outputs", "attn_sink?"]),
    "glob-of-attn-weights": ({"outputs": "attn_weight*"}, ["--outputs", "attn_weight*"]),
    "no-such-layer": ({"layers": "0,2"}, ["--layers", "no layer 2", "has 2"]),
    "no-such-layer-from-the-end": ({"layers": "-3"}, ["--layers", "no layer -3", "has 2"]),
    "no-layer-left": ({"layers": "2:"}, ["--layers", "none"]),
    "no-layers": ({"layers": ""}, ["--layers"]),
    "layers-not-numbers": ({"layers": "0,last"}, ["--layers", "0,last"]),
    "layers-of-four-parts": ({"layers": "0:1:1:1"}, ["--layers", "0:1:1:1"]),
    "step-of-zero": ({"layers": "::0"}, ["--layers", "step"]),
    "no-key": ({"outputs": ""}, ["--outputs"]),
    "only-a-comma": ({"outputs": ","}, ["--outputs"]),
    "attn-weights": (
        {"outputs": "final_hidden,attn_weights"},
        ["attn_weights", "implemented", "attn_pattern"],
    ),
    "suffix": ({"output": "out/a.h5"}, ["a.h5", ".safetensors", ".pt", ".npz"]),
    "suffix-upper-case": ({"output": "out/a.PTH"}, ["a.PTH", ".safetensors", ".pt", ".npz"]),
    "no-suffix": ({"output": "out/a"}, ["out/a", ".safetensors", ".pt", ".npz"]),
    "only-a-suffix": ({"output": "out/.npz"}, ["out/.npz"]),
    "bf16-npz": ({"output": "out/a.npz", "dtype": "bf16"}, ["bf16", ".npz"]),
    "bf16-npz-first": (
        {"output": "out/a.npz", "dtype": "bf16", "init": "nowhere", "dataset": "nowhere"},
        ["bf16", ".npz"],
    ),
    "dtype": ({"dtype": "fp8"}, ["--dtype", "fp8", "fp16", "bf16"]),
    "cpu": ({"allow_cpu": None}, ["--device", "cpu", "--allow-cpu"]),
    "mps": ({"allow_cpu": None, "device": "mps"}, ["--device", "mps"]),
    "no-such-device": ({"device": "banana"}, ["--device", "banana"]),
    "no-init": ({"init": None}, ["--init"]),
    "no-dataset": ({"dataset": None}, ["--dataset"]),
    "no-indices-name": ({"indices": ""}, ["--indices", "empty"]),
    "no-output-name": ({"output": ""}, ["--output", "empty"]),
    "tf32-on-a-cpu": ({"precision": "tf32"}, ["--precision", "tf32", "CUDA"]),
    "where-no-expression": ({"where": "max_rank >="}, ["--where", "max_rank >="]),
    "where-call": ({"where": "print(1) > 0"}, ["--where", "print(1)"]),
    "where-typo": ({"where": "max_rnk > 1"}, ["--where", "max_rnk", "max_rank", "merges"]),
    "where-and-indices": ({"where": "max_rank > 1", "indices": "a.npy"}, ["--indices", "--where"]),
    "steps-no-range": ({"steps": "many"}, ["--steps", "many", "START:STOP"]),
    "steps-backwards": ({"steps": "::-1"}, ["--steps", "backwards"]),
    "steps-empty": ({"steps": "50:50"}, ["--steps", "50:50:1", "101 rows"]),
    "steps-past-the-end": ({"steps": "101:"}, ["--steps", "101 rows"]),
    "steps-and-indices": ({"steps": ":", "indices": "a.npy"}, ["--indices", "--steps"]),
    "label-typo": ({"labels": "move_dr"}, ["--labels", "move_dr", "move_dir", "merges"]),
    "label-no-match": ({"labels": "mve*"}, ["--labels", "mve*", "move_dir"]),
    "label-without-database": ({"labels": "run_seed"}, ["--labels", "run_seed", "metadata.db"]),
    "no-such-flag": ({"no_such_flag": True}, ["--no-such-flag"]),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_call(case, place, capsys):
    changes, names = WRONG_CALLS[case]
    place.run(capsys, code=2, names=names, **changes)


def test_stray_argument(place, capsys):
    assert main(["stray", "--init", "x", "--dataset", "y"]) == 2
    err = capsys.readouterr().err
    assert "stray" in err
    assert len(err.strip().splitlines()) == 1


# --- Files and machines: exit code 1.


@pytest.mark.parametrize(
    ("flag", "name"),
    [("init", "none"), ("init", "none.pt"), ("dataset", "none"), ("indices", "none.npy")],
)
def test_nothing_at_a_path(flag, name, place, capsys):
    place.run(capsys, code=1, names=[place.root / name], **{flag: place.root / name})


def test_a_dataset_that_is_a_file(place, capsys):
    (place.root / "dataset").write_bytes(b"")
    place.run(capsys, code=1, names=[place.root / "dataset"], dataset=place.root / "dataset")


@pytest.mark.parametrize("others", [[], ["annotations-0.npy", "embeddings-0.npy", "steps.npz"]])
def test_dataset_without_shards(others, place, capsys):
    dataset = place.root / "dataset"
    dataset.mkdir()
    for name in others:
        np.save(dataset / name.replace(".npz", ""), np.zeros(3))
    place.run(capsys, code=1, names=[dataset, "steps"], dataset=dataset)


def test_dataset_without_rows(place, capsys):
    dataset = place.root / "dataset"
    dataset.mkdir()
    np.save(dataset / "steps.npy", np.zeros(0, ROW_DTYPES["packed_46"]))
    place.run(capsys, code=1, names=[dataset], dataset=dataset)


def npy(header, data=b"", *, version=(1, 0), magic=b"\x93NUMPY"):
    """Return a .npy file around a header given as text or bytes."""
    if not isinstance(header, bytes):
        header = header.encode()
    width = "<H" if version == (1, 0) else "<I"
    return magic + bytes(version) + struct.pack(width, len(header)) + header + data


def saved(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def good_rows(layout="packed_46", n=30):
    return encode_rows(random_boards(n, seed=3), layout)


def header(descr="[('board', '<u8')]", *, fortran="False", shape="(4,)"):
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


BOARD_DATA = bytes(4 * 8)

BAD_SHARDS = {
    "empty": b"",
    "magic-only": b"\x93NUMPY",
    "not-npy": b"PK\x03\x04" + bytes(200),
    "rows-cut": saved(good_rows())[:-1],
    "rows-missing": saved(good_rows())[:-460],
    "header-cut": saved(good_rows())[:100],
    "version-4": npy(header(), BOARD_DATA, version=(4, 0)),
    "version-0": npy(header(), BOARD_DATA, version=(0, 0)),
    "header-longer-than-the-file": npy(header(), version=(2, 0))[:8] + b"\xff\xff\xff\x7f",
    "header-not-a-dict": npy("[1, 2]\n", BOARD_DATA),
    "header-not-closed": npy("{'descr': [('board', '<u8')], 'shape': (4,", BOARD_DATA),
    "header-code": npy("{'descr': __import__('os').mkdir('canary')}\n", BOARD_DATA),
    "header-not-text": npy(b"\xff\xfe\x00{}\n", BOARD_DATA),
    "header-deep": npy("(" * 30_000 + "\n", BOARD_DATA),
    "header-without-descr": npy("{'fortran_order': False, 'shape': (4,)}\n", BOARD_DATA),
    "header-without-shape": npy(
        "{'descr': [('board', '<u8')], 'fortran_order': False}\n", BOARD_DATA
    ),
    "shape-negative": npy(header(shape="(-4,)"), BOARD_DATA),
    "shape-huge": npy(header(shape="(2305843009213693952,)"), BOARD_DATA),
    "shape-beyond-64-bits": npy(header(shape="(340282366920938463463374607431768211456,)")),
    "shape-a-number": npy(header(shape="4"), BOARD_DATA),
    "shape-empty": npy(header(shape="()"), BOARD_DATA),
    "pickled": saved(np.array([{"a": 1}, None], dtype=object), allow_pickle=True),
    "pickled-field": npy(header("[('board', '<u8'), ('note', '|O')]"), bytes(64)),
    "two-dimensional": saved(good_rows().reshape(5, 6)),
    "plain-numbers": saved(np.arange(10)),
    "no-board": saved(np.zeros(4, [("run_id", "<u4"), ("boards", "<u8")])),
    "board-float": saved(np.zeros(4, [("board", "<f8")])),
    "board-signed": saved(np.zeros(4, [("board", "<i4")])),
    "board-narrow": saved(np.zeros(4, [("board", "<u4")])),
    "board-text": saved(np.zeros(4, [("board", "S8")])),
    "board-array": saved(np.zeros(4, [("board", "<u8", (2,))])),
    "board-nested": saved(np.zeros(4, [("board", [("a", "<u8")])])),
    "mask-wide": saved(np.zeros(4, [("board", "<u8"), ("tile_65536_mask", "<f4")])),
    "exps-short": saved(np.zeros(4, [("exps", "u1", (15,))])),
    "exps-long": saved(np.zeros(4, [("exps", "u1", (17,))])),
    "exps-scalar": saved(np.zeros(4, [("exps", "u1")])),
    "exps-float": saved(np.zeros(4, [("exps", "<f4", (16,))])),
    "exps-wide": saved(np.zeros(4, [("exps", "<u2", (16,))])),
    "itemsize-huge": npy(header("[('board', '<u8'), ('x', '|V9223372036854775807')]"), BOARD_DATA),
    "sub-array-huge": npy(
        header("[('board', '<u8'), ('x', '<u8', (4294967296, 4294967296, 4))]"), BOARD_DATA
    ),
}


@pytest.mark.parametrize("name", ["steps.npy", "steps-00001.npy"])
@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shard(case, name, place, capsys):
    dataset = place.root / "dataset"
    dataset.mkdir()
    if name != "steps.npy":
        np.save(dataset / "steps-00000.npy", good_rows())
    (dataset / name).write_bytes(BAD_SHARDS[case])
    line = place.run(capsys, code=1, names=[name], dataset=dataset)
    if case == "no-board":
        assert "board" in line
        assert "run_id" in line
    assert not (place.root / "canary").exists()


@pytest.mark.parametrize(
    ("first", "second"),
    [("packed_46", "selfplay_v1"), ("packed_46", "legacy_move"), ("legacy_move", "aligned_48")],
)
def test_shards_that_differ(first, second, place, capsys):
    dataset = place.root / "dataset"
    dataset.mkdir()
    boards = random_boards(30, seed=3, largest=15)
    np.save(dataset / "steps-00000.npy", encode_rows(boards, first))
    np.save(dataset / "steps-00001.npy", encode_rows(boards, second))
    place.run(capsys, code=1, names=["steps-00001.npy"], dataset=dataset)


def test_a_shard_that_is_a_directory(place, capsys):
    dataset = place.root / "dataset"
    (dataset / "steps-00000.npy").mkdir(parents=True)
    place.run(capsys, code=1, names=["steps-00000.npy"], dataset=dataset)


def test_a_shard_that_is_a_dangling_link(place, capsys):
    dataset = place.root / "dataset"
    dataset.mkdir()
    np.save(dataset / "steps-00000.npy", good_rows())
    (dataset / "steps-00001.npy").symlink_to(place.root / "gone.npy")
    place.run(capsys, code=1, names=["steps-00001.npy"], dataset=dataset)


BAD_INDICES = {
    "negative": (np.array([3, -1, 5]), ["-1"]),
    "past-the-end": (np.array([3, 101]), ["101"]),
    "far-past-the-end": (np.array([2**62]), [str(2**62)]),
    "unsigned-beyond": (np.array([2**64 - 1], dtype=np.uint64), []),
    "float": (np.array([1.0, 2.5]), ["float64"]),
    "empty": (np.zeros(0, np.int64), []),
    "empty-rows": (np.zeros((0, 5), np.int64), []),
    "bool": (np.array([True, False]), ["bool"]),
    "complex": (np.array([1j]), ["complex128"]),
    "text": (np.array(["1", "2"]), []),
    "structured": (np.zeros(2, [("a", "<i8")]), []),
    "dates": (np.array(["2020-01-01"], dtype="M8[D]"), []),
}


@pytest.mark.parametrize("case", BAD_INDICES)
def test_bad_indices(case, place, capsys):
    array, names = BAD_INDICES[case]
    path = place.root / "indices.npy"
    np.save(path, array)
    place.run(capsys, code=1, names=["indices", *names], indices=path)


BAD_INDEX_FILES = {
    "empty": b"",
    "text": b"1\n2\n3\n",
    "cut": saved(np.arange(50))[:-7],
    "pickled": saved(np.array([1, None], dtype=object), allow_pickle=True),
    "npz": b"PK\x03\x04" + bytes(60),
    "claims-too-much": npy(header("'<i8'", shape="(1000000000000,)"), bytes(16)),
}


@pytest.mark.parametrize("case", BAD_INDEX_FILES)
def test_bad_indices_file(case, place, capsys):
    path = place.root / "indices.npy"
    path.write_bytes(BAD_INDEX_FILES[case])
    place.run(capsys, code=1, names=["indices.npy"], indices=path)


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({"RANK": "one"}, ["RANK", "'one'"]),
        ({"RANK": "0", "WORLD_SIZE": "-2"}, ["WORLD_SIZE", "'-2'"]),
        ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK", "WORLD_SIZE", "2"]),
    ],
)
def test_a_launchers_wrong_variables(variables, names, place, capsys, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place.run(capsys, code=2, names=names)


@pytest.mark.parametrize("processes", ["0", "-1", "two", ""])
def test_processes_that_cannot_be_started(processes, place, capsys):
    names = ["--nproc-per-node", repr(processes)]
    place.run(capsys, code=2, names=names, nproc_per_node=processes)


def test_a_filter_that_no_row_passes(place, capsys):
    place.run(capsys, code=1, names=["--where", "no row of"], where="max_rank > 255")


def test_a_filter_that_divides_by_zero(place, capsys):
    where = "1 / (max_rank - max_rank) > 0"
    place.run(capsys, code=1, names=["--where", "divides by zero", "step 0"], where=where)


def test_labels_that_only_some_shards_have(place, capsys):
    rows = good_rows()
    (place.root / "dataset").mkdir()
    np.save(place.root / "dataset" / "steps-0.npy", rows)
    np.save(place.root / "dataset" / "steps-1.npy", rows[["board", "tile_65536_mask"]])
    for selection in ({"labels": "move_dir"}, {"labels": "all"}, {"where": "move_dir == 0"}):
        names = ["steps-1.npy", *(["move_dir"] if "all" not in selection.values() else [])]
        place.run(capsys, code=1, names=names, dataset=place.root / "dataset", **selection)


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_dumps_without_indices(suffix, place, capsys):
    path = place.root / f"old{suffix}"
    tensors = {"boards": torch.zeros(2, 16, dtype=torch.uint8), "other": torch.ones(3)}
    if suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    place.run(capsys, code=1, names=[path, "'indices'", "boards", "other"], indices=path)
    path.write_bytes(path.read_bytes()[:40])
    place.run(capsys, code=1, names=[path], indices=path)
    path.unlink()
    place.run(capsys, code=1, names=[path, "no such file"], indices=path)


def test_indices_that_are_a_directory(place, capsys):
    (place.root / "indices.npy").mkdir()
    place.run(capsys, code=1, names=["indices.npy"], indices=place.root / "indices.npy")


BAD_CONFIGS = {
    **{
        f"without-{name}": ({name: None}, [name])
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "layer_norm_eps",
        )
    },
    "heads-do-not-divide": ({"num_attention_heads": 5}, ["num_attention_heads"]),
    "kv-heads-do-not-divide": ({"num_key_value_heads": 3}, ["num_key_value_heads"]),
    "few-positions": ({"max_position_embeddings": 8}, ["max_position_embeddings"]),
    "text-for-a-number": ({"hidden_size": "32"}, ["hidden_size"]),
    "negative-layers": ({"num_hidden_layers": -1}, ["num_hidden_layers"]),
    "more-layers": ({"num_hidden_layers": 3}, ["blocks.2."]),
    "fewer-layers": ({"num_hidden_layers": 1}, ["blocks.1."]),
    "other-width": ({"hidden_size": 64}, ["tok_emb.weight"]),
    "other-mlp": ({"intermediate_size": 64}, ["mlp"]),
    "sinks-missing": ({"use_attention_sinks": True}, ["sinks"]),
    "norms-missing": ({"use_qk_norm": True}, ["q_norm"]),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config(case, place, capsys):
    changes, names = BAD_CONFIGS[case]
    init = place.root / "bad"
    save_checkpoint(init, random_state_dict(BASE), config_json(BASE, **changes))
    place.run(capsys, code=1, names=[init, *names], init=init)


@pytest.mark.parametrize("part", ["sinks", "qk_norm"])
def test_weights_that_the_config_does_not_mention(part, place, capsys):
    config = replace(BASE, **{part: True})
    init = place.root / "bad"
    save_checkpoint(init, random_state_dict(config), config_json(BASE))
    name = {"sinks": "attn.sinks", "qk_norm": "attn.q_norm.weight"}[part]
    place.run(capsys, code=1, names=[init, f"blocks.0.{name}"], init=init)


@pytest.mark.parametrize("bins", [None, 0, -3])
def test_untrained_model_without_bins(bins, place, capsys):
    init = place.root / "bad"
    init.mkdir()
    fields = config_json(BASE) | {"output_n_bins": bins}
    (init / "config.json").write_text(json.dumps(fields))
    place.run(capsys, code=1, names=["output_n_bins"], init=init, random_init=True)


def test_unknown_head_type_without_weights(place, capsys):
    init = place.root / "bad"
    init.mkdir()
    (init / "config.json").write_text(json.dumps(config_json(BASE, head_type="value")))
    place.run(capsys, code=1, names=["head_type", "value"], init=init, random_init=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "hidden_size: 32"])
def test_config_that_is_no_object(text, place, capsys):
    init = place.root / "bad"
    save_checkpoint(init, random_state_dict(BASE), {})
    (init / "config.json").write_text(text)
    place.run(capsys, code=1, names=["config.json"], init=init)


def test_no_weights(place, capsys):
    init = place.root / "bare"
    init.mkdir()
    (init / "config.json").write_text(json.dumps(config_json(BASE)))
    place.run(capsys, code=1, names=[init, "--random-init"], init=init)


def test_empty_checkpoint_directory(place, capsys):
    init = place.root / "bare"
    init.mkdir()
    place.run(capsys, code=1, names=[init], init=init)


def test_weights_without_a_config(place, capsys):
    init = place.root / "bare"
    save_checkpoint(init, random_state_dict(BASE), {})
    (init / "config.json").unlink()
    place.run(capsys, code=1, names=[init, "config.json"], init=init)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"model": {}},
        {"weights": random_state_dict(BASE)},
        {"model": random_state_dict(BASE)},
        bundle(random_state_dict(BASE), config_json(BASE)) | {"model": 3},
    ],
    ids=["list", "empty-model", "no-model", "no-config", "model-a-number"],
)
def test_bad_bundle(content, place, capsys):
    torch.save(content, place.root / "bundle.pt")
    place.run(capsys, code=1, names=["bundle.pt"], init=place.root / "bundle.pt")


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", b"PK\x03\x04nonsense", *[pickle.dumps({}, protocol=p) for p in (0, 2, 5)]],
)
def test_bundle_of_garbage(content, place, capsys):
    (place.root / "bundle.pt").write_bytes(content)
    place.run(capsys, code=1, names=["bundle.pt"], init=place.root / "bundle.pt")


def test_misfitting_weights(place, capsys):
    state_dict = random_state_dict(BASE)
    del state_dict["final_ln.weight"]
    state_dict["final_ln.extra"] = torch.zeros(1)
    state_dict["blocks.0.attn.wq.weight"] = torch.zeros(2, 2)
    init = place.root / "bad"
    save_checkpoint(init, state_dict, config_json(BASE))
    names = [
        init,
        "final_ln.weight",
        "final_ln.extra",
        "blocks.0.attn.wq.weight",
        "missing",
        "unexpected",
    ]
    place.run(capsys, code=1, names=names, init=init)


@pytest.mark.parametrize("batch_size", ["8", "1024"])
def test_exponent_outside_the_vocabulary(batch_size, place, capsys):
    small = replace(BASE, vocab=16)
    init, dataset = place.root / "small", place.root / "dataset"
    save_checkpoint(init, random_state_dict(small), config_json(small))
    boards = random_boards(40, seed=1, largest=15)
    boards[33, 7] = 16
    dataset.mkdir()
    np.save(dataset / "steps.npy", encode_rows(boards, "packed_46"))
    np.save(place.root / "all.npy", np.arange(40))
    place.run(
        capsys,
        code=1,
        names=["33", "16"],
        init=init,
        dataset=dataset,
        indices=place.root / "all.npy",
        batch_size=batch_size,
    )


@pytest.mark.parametrize("exponent", [17, 64, 128, 255])
def test_impossible_exponents_of_unpacked_rows(exponent, place, capsys):
    boards = random_boards(40, seed=1)
    boards[12, 0] = exponent
    dataset = place.root / "dataset"
    dataset.mkdir()
    np.save(dataset / "steps.npy", encode_rows(boards, "selfplay_v1"))
    np.save(place.root / "all.npy", np.arange(40))
    place.run(
        capsys,
        code=1,
        names=["12", str(exponent)],
        dataset=dataset,
        indices=place.root / "all.npy",
    )


def test_sinks_of_a_model_without_sinks(place, capsys):
    place.run(capsys, code=2, names=["attn_sinks"], outputs="pooled,attn_sinks")


def test_a_directory_is_not_made_for_a_run_that_cannot_begin(place, capsys):
    output = place.root / "nowhere" / "a.pt"
    place.run(
        capsys, code=1, names=["no-dataset"], output=output, dataset=place.root / "no-dataset"
    )
    assert not (place.root / "nowhere").exists()


def test_output_directory_that_is_a_file(place, capsys):
    (place.root / "file").write_bytes(b"here")
    place.run(capsys, code=1, names=[place.root / "file"], output=place.root / "file" / "a.pt")
    assert (place.root / "file").read_bytes() == b"here"


def test_output_that_is_a_directory(place, capsys):
    (place.root / "taken.pt").mkdir()
    place.run(capsys, code=1, names=[place.root / "taken.pt"], output=place.root / "taken.pt")
    assert list((place.root / "taken.pt").iterdir()) == []
    assert not list(place.root.glob("*.partial*"))


def test_output_directory_where_nothing_can_be_made(place, capsys):
    place.run(capsys, code=1, names=["/proc/a.npz"], output="/proc/a.npz")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_output_directory(place, capsys):
    (place.root / "locked").mkdir(mode=0o500)
    place.run(capsys, code=1, names=["locked"], output=place.root / "locked" / "a.pt")


def test_output_name_too_long(place, capsys):
    place.run(capsys, code=1, names=["aaa"], output=place.root / "out" / ("a" * 300 + ".pt"))


@pytest.mark.parametrize("flag", ["init", "dataset", "indices", "output"])
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("a" * 300, "too long"),
        ("a/" * 2500 + "b", "too long"),
        ("loop/a", "symbolic links"),
        ("file/a", "director"),
    ],
    ids=["name", "path", "loop", "file"],
)
def test_paths_that_lead_nowhere(path, reason, flag, place, capsys):
    (place.root / "loop").symlink_to(place.root / "loop")
    (place.root / "file").write_bytes(b"")
    suffix = {"init": "", "dataset": "", "indices": ".npy", "output": ".pt"}[flag]
    line = place.run(capsys, code=1, names=[path[:4]], **{flag: place.root / f"{path}{suffix}"})
    assert reason.lower() in line.lower() or "no such checkpoint" in line or "no directory" in line
    assert not re.search(r"\w+(Error|Exception)\b", line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    "reason",
    [
        "The NVIDIA driver on your system is too old (found version 11040).\nPlease update",
        "Found no NVIDIA driver on your system.",
    ],
)
def test_why_cuda_cannot_be_used(reason, place, capsys, monkeypatch):
    def fail():
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.cuda, "init", fail)
    names = [reason.partition("\n")[0], "--device cpu --allow-cpu"]
    place.run(capsys, code=1, names=names, device="cuda", allow_cpu=None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize("allow_cpu", [True, None])
def test_cuda_where_there_is_none(device, allow_cpu, place, capsys):
    names = ["--device", device, "--allow-cpu"]
    place.run(capsys, code=1, names=names, device=device, allow_cpu=allow_cpu)


@pytest.mark.cuda
def test_cuda_device_that_is_not_there(place, capsys):
    place.run(capsys, code=1, names=["cuda:99"], device="cuda:99", allow_cpu=None)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
def test_an_existing_target_survives_a_failure(suffix, place, capsys):
    """The failure comes with the last batch, when most of the file is written."""
    boards = random_boards(40, seed=1)
    boards[39, 0] = 99
    dataset = place.root / "dataset"
    dataset.mkdir()
    np.save(dataset / "steps.npy", encode_rows(boards, "selfplay_v1"))
    np.save(place.root / "all.npy", np.arange(40))
    target = place.root / f"kept{suffix}"
    target.write_bytes(b"precious")
    place.run(
        capsys,
        code=1,
        names=["39"],
        dataset=dataset,
        indices=place.root / "all.npy",
        output=target,
        overwrite=True,
    )
    assert target.read_bytes() == b"precious"
    assert not list(place.root.glob(f"kept{suffix}?*"))


# --- The same from Python: the builtin exception that a caller expects.


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"n_samples": 0}, ValueError),
        ({"batch_size": 0}, ValueError),
        ({"seed": -1}, ValueError),
        ({"outputs": ["nonsense"]}, ValueError),
        ({"outputs": []}, ValueError),
        ({"dtype": "fp8"}, ValueError),
        ({"allow_cpu": False}, ValueError),
        ({"indices": np.array([500])}, IndexError),
        ({"indices": np.array([-1])}, IndexError),
        ({"indices": np.array([0.5])}, ValueError),
        ({"indices": []}, ValueError),
        ({"outputs": ["attn_sinks"]}, ValueError),
        ({"layers": [2]}, ValueError),
        ({"layers": [0.5]}, ValueError),
        ({"layers": 1}, ValueError),
        ({"layers": []}, ValueError),
        ({"layers": [slice(0, 2, 0)]}, ValueError),
        ({"outputs": ["attn_weights"]}, NotImplementedError),
    ],
)
def test_exceptions_of_dump_and_stream(changes, kind, good_inputs, tmp_path):
    options = {"outputs": ["pooled"], "n_samples": 5, "device": "cpu", "allow_cpu": True} | changes
    inputs = good_inputs / "checkpoint", good_inputs / "dataset"
    with pytest.raises(kind):
        dump(*inputs, tmp_path / "a.pt", **options)
    with pytest.raises(kind):
        list(stream(*inputs, **options))
    assert list(tmp_path.iterdir()) == []


def test_missing_files_from_python(good_inputs, tmp_path):
    options = {"outputs": ["pooled"], "device": "cpu", "allow_cpu": True}
    with pytest.raises(FileNotFoundError):
        dump(tmp_path / "nowhere", good_inputs / "dataset", tmp_path / "a.pt", **options)
    with pytest.raises(FileNotFoundError):
        dump(good_inputs / "checkpoint", tmp_path / "nowhere", tmp_path / "a.pt", **options)
    with pytest.raises(FileNotFoundError):
        StepsDataset(tmp_path / "nowhere")
