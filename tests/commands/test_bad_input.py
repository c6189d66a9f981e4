"""Bad input: one line that names what is wrong, the right exit code, and nothing left behind."""

import io
import json
import os
import re
import struct
import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dump_activations import dump, stream
from dump_activations.commands.dump import main
from reference.checkpoints import BASE, config_json, random_state_dict, save_checkpoint
from reference.datasets import ROW_DTYPES, encode_rows, make_dataset, random_boards


@dataclass
class Place:
    """A good checkpoint and a good dataset, and an empty directory for the output."""

    root: object
    arguments: dict[str, str] = field(default_factory=dict)

    def run(self, capsys, *, code, names, **changes):
        """Run the command, and return the line it prints.

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
        # A warning would be one more line on stderr. A preview of the output is a note.
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
    "n-samples-not-a-number": ({"n_samples": "many"}, ["--n-samples", "many"]),
    "n-samples-fraction": ({"n_samples": "1.5"}, ["--n-samples", "1.5"]),
    "batch-size-zero": ({"batch_size": "0"}, ["--batch-size", "0"]),
    "seed-negative": ({"seed": "-1"}, ["--seed", "-1"]),
    "unknown-key": ({"outputs": "attn_paterns"}, ["--outputs", "attn_paterns", "attn_pattern"]),
    "like-no-key": ({"outputs": "zzz"}, ["--outputs", "zzz", "final_hidden", "attn_sinks"]),
    "layer-of-a-hook": (
        {"outputs": "blocks.0.hook_resid_mit"},
        ["blocks.0.hook_resid_mit", " hook_resid_mid"],
    ),
    "glob-of-what-the-model-lacks": ({"outputs": "attn_sink?"}, ["--outputs", "attn_sink?"]),
    "glob-of-attn-weights": ({"outputs": "attn_weight*"}, ["--outputs", "attn_weight*"]),
    "no-such-layer": ({"layers": "0,2"}, ["--layers", "no layer 2", "has 2"]),
    "no-such-layer-from-the-end": ({"layers": "-3"}, ["--layers", "no layer -3", "has 2"]),
    "no-layer-left": ({"layers": "2:"}, ["--layers", "none"]),
    "no-key": ({"outputs": ""}, ["--outputs"]),
    "attn-weights": (
        {"outputs": "final_hidden,attn_weights"},
        ["attn_weights", "implemented", "attn_pattern"],
    ),
    "suffix": ({"output": "out/a.h5"}, ["a.h5", ".safetensors", ".pt", ".npz"]),
    "no-suffix": ({"output": "out/a"}, ["out/a", ".safetensors", ".pt", ".npz"]),
    "only-a-suffix": ({"output": "out/.npz"}, ["out/.npz"]),
    "bf16-npz-first": (
        {"output": "out/a.npz", "dtype": "bf16", "init": "nowhere", "dataset": "nowhere"},
        ["bf16", ".npz"],
    ),
    "dtype": ({"dtype": "fp8"}, ["--dtype", "fp8", "fp16", "bf16"]),
    "cpu": ({"allow_cpu": None}, ["--device", "cpu", "--allow-cpu"]),
    "mps": ({"allow_cpu": None, "device": "mps"}, ["--device", "mps"]),
    "no-such-device": ({"device": "banana"}, ["--device", "'banana' is neither cuda"]),
    "device-without-a-colon": ({"device": "cuda0"}, ["'cuda0'", "did you mean 'cuda:0'?"]),
    "dtype-of-torch": ({"dtype": "float16"}, ["'float16'", "did you mean 'fp16'?"]),
    "precision-of-torch": ({"precision": "bfloat16"}, ["'bfloat16'", "did you mean 'bf16'?"]),
    "no-init": ({"init": None}, ["--init: required", "--demo", "--help"]),
    "no-dataset": ({"dataset": None}, ["--dataset: required"]),
    "neither": ({"init": None, "dataset": None}, ["--init and --dataset: required"]),
    "demo-and-init": ({"demo": True, "dataset": None}, ["--init", "--demo brings its own"]),
    "labels-of-no-dataset": ({"dataset": None, "list_labels": True}, ["--dataset: required"]),
    "layer-and-its-key": (
        {"outputs": "blocks.1.hook_resid_mid,resid_mid"},
        ["blocks.1.hook_resid_mid", "resid_mid", "leave one of them out"],
    ),
    "layer-and-layers": (
        {"outputs": "blocks.1.hook_resid_mid", "layers": "1"},
        ["--layers", "--outputs", "leave out one of them"],
    ),
    "no-indices-name": ({"indices": ""}, ["--indices", "empty"]),
    "no-output-name": ({"output": ""}, ["--output", "empty"]),
    "tf32-on-a-cpu": ({"precision": "tf32"}, ["--precision", "tf32", "CUDA"]),
    "where-typo": ({"where": "max_rnk > 1"}, ["--where", "mean 'max_rank'", "merges"]),
    "where-c": ({"where": "max_rank > 1 && merges"}, ["--where", "write 'and' for '&&'"]),
    "where-and-indices": ({"where": "max_rank > 1", "indices": "a.npy"}, ["--indices", "--where"]),
    "steps-empty": ({"steps": "50:50"}, ["--steps 50:50 takes no row", "101"]),
    "label-typo": ({"labels": "move_dr"}, ["--labels", "did you mean 'move_dir'?", "merges"]),
    "label-without-database": ({"labels": "run_seed"}, ["--labels", "run_seed", "metadata.db"]),
    "no-such-flag": ({"no_such_flag": True}, ["--no-such-flag"]),
    **{
        f"processes-{text}": ({"nproc_per_node": text}, ["--nproc-per-node", repr(text)])
        for text in ("0", "-1", "two", "")
    },
    "sinks-of-a-model-without": ({"outputs": "pooled,attn_sinks"}, ["attn_sinks"]),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_call(case, place, capsys):
    changes, names = WRONG_CALLS[case]
    place.run(capsys, code=2, names=names, **changes)


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


# --- Files and machines: exit code 1.


def write_dataset(root, **shards):
    """Write files of bytes, or rows as NumPy saves them, to a dataset, and return its path."""
    (root / "dataset").mkdir()
    for name, rows in shards.items():
        path = root / "dataset" / f"{name.replace('_', '-')}.npy"
        if isinstance(rows, bytes):
            path.write_bytes(rows)
        else:
            np.save(path, rows)
    return root / "dataset"


def write_config(root, *, name="bad", **changes):
    """Write a checkpoint without weights, and return its path."""
    (root / name).mkdir()
    (root / name / "config.json").write_text(json.dumps(config_json(BASE, **changes)))
    return root / name


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

# Fields and dtypes that are refused: tests/dataset/test_headers.py.
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
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shard(case, place, capsys):
    name = "steps" if len(case) % 2 else "steps_00001"
    first = {} if name == "steps" else {"steps_00000": good_rows()}
    dataset = write_dataset(place.root, **first, **{name: BAD_SHARDS[case]})
    line = place.run(capsys, code=1, names=[f"{name.replace('_', '-')}.npy"], dataset=dataset)
    assert case != "no-board" or ("board" in line and "run_id" in line)
    assert not (place.root / "canary").exists()


def other_layout(first, second):
    boards = random_boards(30, seed=3, largest=15)
    rows = [encode_rows(boards, layout) for layout in (first, second)]
    return lambda root: {"dataset": write_dataset(root, steps_00000=rows[0], steps_00001=rows[1])}


def beyond(exponent, *, at=33, layout="packed_46", vocab=None, **changes):
    """Put an exponent into one of 40 rows, all of which are read."""

    def make(root):
        boards = random_boards(40, seed=1, largest=15)
        boards[at, 7] = exponent
        np.save(root / "all.npy", np.arange(40))
        dataset = write_dataset(root, steps=encode_rows(boards, layout))
        made = {"dataset": dataset, "indices": root / "all.npy", **changes}
        if vocab:
            config = replace(BASE, vocab=vocab)
            state = random_state_dict(config)
            made["init"] = save_checkpoint(root / "small", state, config_json(config))
        return made

    return make


def partly_labelled(**selection):
    def make(root):
        rows = good_rows()
        bare = rows[["board", "tile_65536_mask"]]
        return {"dataset": write_dataset(root, steps_0=rows, steps_1=bare), **selection}

    return make


def made(root, name, *, content=None):
    """Make a file, or a directory without content, and return its path."""
    path = root / name
    path.mkdir(parents=True) if content is None else path.write_bytes(content)
    return path


def dangling(root):
    dataset = write_dataset(root, steps_00000=good_rows())
    (dataset / "steps-00001.npy").symlink_to(root / "gone.npy")
    return {"dataset": dataset}


# Checkpoints that are refused: tests/model/test_checkpoint.py.
# Changes of the call, or a function that makes files for them in a directory. Parts of the line.
FAILURES = {
    "no-init": ({"init": "none"}, ["none"]),
    "no-bundle": ({"init": "none.pt"}, ["none.pt"]),
    "no-dataset": ({"dataset": "none"}, ["none"]),
    "no-indices": ({"indices": "none.npy"}, ["none.npy"]),
    "dataset-a-file": (lambda root: {"dataset": made(root, "data", content=b"")}, ["data"]),
    "dataset-empty": (lambda root: {"dataset": write_dataset(root)}, ["dataset", "steps"]),
    "dataset-of-others": (
        lambda root: {
            "dataset": write_dataset(root, annotations_0=np.zeros(3), embeddings_0=np.zeros(3))
        },
        ["dataset", "steps"],
    ),
    "no-rows": (
        lambda root: {"dataset": write_dataset(root, steps=np.zeros(0, ROW_DTYPES["packed_46"]))},
        ["dataset"],
    ),
    "shard-a-directory": (
        lambda root: {"dataset": made(root, "d/steps-00000.npy").parent},
        ["steps-00000.npy"],
    ),
    "shard-dangling": (dangling, ["steps-00001.npy"]),
    "other-layout": (other_layout("packed_46", "selfplay_v1"), ["steps-00001.npy"]),
    "no-mask": (other_layout("packed_46", "legacy_move"), ["steps-00001.npy"]),
    "a-mask": (other_layout("legacy_move", "aligned_48"), ["steps-00001.npy"]),
    "no-row-passes": ({"where": "max_rank > 255"}, ["--where", "no row of"]),
    "division-by-zero": (
        {"where": "1 / (max_rank - max_rank) > 0"},
        ["--where", "divides by zero", "step 0"],
    ),
    "label-of-some-shards": (partly_labelled(labels="move_dir"), ["steps-1.npy", "move_dir"]),
    "labels-of-some-shards": (partly_labelled(labels="all"), ["steps-1.npy"]),
    "filter-of-some-shards": (partly_labelled(where="move_dir == 0"), ["steps-1.npy", "move_dir"]),
    "indices-a-directory": (lambda root: {"indices": made(root, "a.npy")}, ["a.npy"]),
    "vocabulary": (beyond(16, vocab=16), ["33", "16"]),
    "vocabulary-one-batch": (beyond(16, vocab=16, batch_size="1024"), ["33", "16"]),
    **{
        f"exponent-{e}": (beyond(e, at=12, layout="selfplay_v1"), ["12", str(e)])
        for e in (17, 64, 128, 255)
    },
    "no-weights": (lambda root: {"init": write_config(root)}, ["bad", "--random-init"]),
    "output-below-a-file": (
        lambda root: {"output": made(root, "file", content=b"here") / "a.pt"},
        ["file"],
    ),
    "output-a-directory": (lambda root: {"output": made(root, "taken.pt")}, ["taken.pt"]),
    "output-in-proc": ({"output": "/proc/a.npz"}, ["cannot write /proc"]),
    "output-too-long": ({"output": f"out/{'a' * 300}.pt"}, ["aaa"]),
    "output-of-a-run-that-cannot-begin": (
        {"output": "nowhere/a.pt", "dataset": "no-dataset"},
        ["no-dataset"],
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failure(case, place, capsys):
    changes, names = FAILURES[case]
    changes = changes(place.root) if callable(changes) else changes
    there = sorted(place.root.rglob("*"))
    place.run(capsys, code=1, names=names, **changes)
    assert sorted(place.root.rglob("*")) == there


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_output_directory(place, capsys):
    (place.root / "locked").mkdir(mode=0o500)
    place.run(capsys, code=1, names=["locked"], output=place.root / "locked" / "a.pt")


# Files without step indices: tests/api/test_step_indices.py.
@pytest.mark.parametrize("step", [-1, 101, 2**62])
def test_step_indices_outside_the_dataset(step, place, capsys):
    np.save(place.root / "indices.npy", np.array([3, step]))
    names = ["indices", str(step)]
    place.run(capsys, code=1, names=names, indices=place.root / "indices.npy")


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_dumps_without_indices(suffix, place, capsys):
    path = place.root / f"old{suffix}"
    tensors = {"boards": torch.zeros(2, 16, dtype=torch.uint8), "other": torch.ones(3)}
    if suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        (torch.save if suffix == ".pt" else save_file)(tensors, path)
    place.run(capsys, code=1, names=[path, "'indices'", "boards", "other"], indices=path)
    path.write_bytes(path.read_bytes()[:40])
    place.run(capsys, code=1, names=[path], indices=path)
    path.unlink()
    place.run(capsys, code=1, names=[path, "no such file"], indices=path)


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
    ("device", "allow_cpu"), [("cuda", None), ("cuda:0", None), ("cuda:0", True)]
)
def test_cuda_where_there_is_none(device, allow_cpu, place, capsys):
    names = ["--device", device, "--allow-cpu"]
    place.run(capsys, code=1, names=names, device=device, allow_cpu=allow_cpu)


@pytest.mark.cuda
def test_cuda_device_that_is_not_there(place, capsys):
    place.run(capsys, code=1, names=["cuda:99"], device="cuda:99", allow_cpu=None)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
def test_an_existing_target_survives_a_failure(suffix, place, capsys):
    """The failure comes with the last batch, when most of the file is written."""
    target = place.root / f"kept{suffix}"
    target.write_bytes(b"precious")
    changes = beyond(99, at=39, layout="selfplay_v1")(place.root)
    place.run(capsys, code=1, names=["39"], output=target, overwrite=True, **changes)
    assert target.read_bytes() == b"precious"
    assert not list(place.root.glob(f"kept{suffix}?*"))


# --- The same from Python: the builtin exception that a caller expects.


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"n_samples": 0}, ValueError),
        ({"outputs": ["nonsense"]}, ValueError),
        ({"dtype": "fp8"}, ValueError),
        ({"allow_cpu": False}, ValueError),
        ({"indices": np.array([500])}, IndexError),
        ({"indices": np.array([0.5])}, ValueError),
        ({"outputs": ["attn_sinks"]}, ValueError),
        ({"layers": [2]}, ValueError),
        ({"outputs": ["attn_weights"]}, NotImplementedError),
        ({"checkpoint": "nowhere"}, FileNotFoundError),
        ({"dataset": "nowhere"}, FileNotFoundError),
    ],
)
def test_exceptions_of_dump_and_stream(changes, kind, good_inputs, tmp_path):
    options = {"outputs": ["pooled"], "n_samples": 5, "device": "cpu", "allow_cpu": True} | changes
    inputs = [options.pop(name, good_inputs / name) for name in ("checkpoint", "dataset")]
    with pytest.raises(kind):
        dump(*inputs, tmp_path / "a.pt", **options)
    with pytest.raises(kind):
        list(stream(*inputs, **options))
    assert list(tmp_path.iterdir()) == []
