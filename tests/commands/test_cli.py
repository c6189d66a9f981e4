"""The command: its flags, defaults, and what it prints where."""

import json
import os
import re
import resource
import shlex
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dump_activations.__main__ import run_dump
from dump_activations.commands.console import mode
from dump_activations.commands.dump import dump_activations, main
from dump_activations.commands.inspect import main as inspect_main
from dump_activations.dataset.columns import BOARD_LABELS, LABEL_TEXTS
from dump_activations.dataset.runs import RUN_LABELS
from dump_activations.model.activations import ACTIVATIONS
from dump_activations.pipeline.options import PRECISIONS, DumpOptions, Group
from reference.checkpoints import load_demo
from reference.datasets import make_dataset, naive_boards, numpy_indices, read_dataset
from reference.dumps import read_dump
from reference.model import assert_close, naive_dump
from terminals import open_terminal

KEYS = [each.key for each in ACTIVATIONS]
CPU = ["--allow-cpu", "--device", "cpu"]
SEED_COMMAND = shlex.split("""
  --init inits/hf/2048former-50m-v0.1
  --dataset ./datasets/raws/d7_test_v1
  --n-samples 4096
  --batch-size 1024
  --seed 42
  --outputs final_hidden,layer_outputs,head_logits,attn_norm,mlp_input
  -o activations.safetensors
  --device cuda
""")
SEED_BENCHMARK = shlex.split("""
  --init inits/hf/2048former-50m-v0.1
  --dataset ./datasets/raws/d7_test_v1
  --n-samples 4096
  --batch-size 1024
  --outputs final_hidden,layer_outputs
  --no-write
  --device cuda
""")
SEED_GAMMAS = shlex.split("""
  --init inits/hf/2048former-50m-v0.1
  --dataset ./datasets/raws/d7_test_v1
  --n-samples 1
  --outputs rmsnorm_gammas
  -o activations_with_rmsnorms.safetensors
  --device cuda
""")


@pytest.fixture
def place(demo_checkpoint, demo_dataset, tmp_path, monkeypatch):
    """Work in a directory where the seed's own relative paths lead to the demo."""
    (tmp_path / "inits" / "hf").mkdir(parents=True)
    (tmp_path / "inits" / "hf" / "2048former-50m-v0.1").symlink_to(demo_checkpoint)
    (tmp_path / "datasets" / "raws").mkdir(parents=True)
    (tmp_path / "datasets" / "raws" / "d7_test_v1").symlink_to(demo_dataset)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def inputs(demo_checkpoint, demo_dataset):
    return ["--init", str(demo_checkpoint), "--dataset", str(demo_dataset)]


def made_files(directory):
    return sorted(path.name for path in directory.iterdir() if path.is_file())


def test_seed_command(place, demo_checkpoint, demo_dataset, capsys):
    assert main([*SEED_COMMAND, *CPU]) == 0
    printed = "".join(capsys.readouterr())
    assert "4096" in printed.replace(",", "").replace("_", "")
    assert "boards/s" in printed
    assert made_files(place) == ["activations.safetensors"]
    dump = read_dump(place / "activations.safetensors")
    rows, demo = read_dataset(demo_dataset), load_demo(demo_checkpoint)
    indices = numpy_indices(len(rows), 4096, 42)
    np.testing.assert_array_equal(dump.numpy("indices"), indices)
    np.testing.assert_array_equal(dump.numpy("boards"), naive_boards(rows[indices]))
    some = np.r_[0, 1, 1023, 1024, 2047, 2048, 4000, 4095]
    keys = ["final_hidden", "layer_outputs", "head_logits", "attn_norm", "mlp_input"]
    assert set(dump.tensors) == {*keys, "indices", "boards"}
    expected = naive_dump(demo.state_dict, demo.config, naive_boards(rows[indices[some]]), keys)
    for key in keys:
        assert dump.tensors[key].shape[0] == 4096
        assert_close(dump.tensors[key][some].double().numpy(), expected[key])
    assert dump.metadata["checkpoint"] == "inits/hf/2048former-50m-v0.1"
    assert dump.metadata["outputs"] == ",".join(sorted(keys))


def test_seed_benchmark_command(place, capsys):
    assert main([*SEED_BENCHMARK, *CPU]) == 0
    assert made_files(place) == []
    assert "boards/s" in "".join(capsys.readouterr())


def test_seed_gammas_command(place, demo_checkpoint):
    assert main([*SEED_GAMMAS, *CPU]) == 0
    dump = read_dump(place / "activations_with_rmsnorms.safetensors")
    demo = load_demo(demo_checkpoint)
    norms = [f"blocks.{layer}.{norm}" for layer in range(4) for norm in ("attn_norm", "mlp_norm")]
    names = {f"rmsnorm_gammas/{name}" for name in [*norms, "final_ln"]}
    assert set(dump.tensors) == {*names, "indices", "boards"}
    for name in names:
        weight = demo.state_dict[name.removeprefix("rmsnorm_gammas/") + ".weight"]
        assert torch.equal(dump.tensors[name], weight.float())
    assert dump.tensors["boards"].shape == (1, 16)


def test_defaults(place, inputs):
    assert main([*inputs, *CPU]) == 0
    assert made_files(place) == ["activations.safetensors"]
    dump = read_dump(place / "activations.safetensors")
    assert set(dump.tensors) == {"final_hidden", "indices", "boards"}
    assert dump.tensors["final_hidden"].shape == (1024, 16, 64)
    assert dump.tensors["final_hidden"].dtype == torch.float32
    np.testing.assert_array_equal(dump.numpy("indices"), numpy_indices(14138, 1024, 0))
    assert dump.metadata["outputs"] == "final_hidden"
    assert dump.metadata["seed"] == "0"


def sections(capsys):
    """Return the sections of the help by their titles."""
    assert main(["--help"]) == 0
    parts = re.split(r"^(\S.*):$", capsys.readouterr().out, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_help_shows_every_flag_and_default_in_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = "".join(sections(capsys).values())
    flags = "init dataset indices n-samples batch-size seed outputs output dtype no-write device"
    added = "allow-cpu demo random-init version help quiet"
    for flag in ["-o", "-h", "-V", "-q", *(f"--{name}" for name in f"{flags} {added}".split())]:
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", shown), flag
    for default in ("1024", "final_hidden", "activations.safetensors", "fp32", "cuda"):
        assert default in shown
    assert not re.search(r"\[default:\s+(True|False)\]", shown)
    assert max(map(len, shown.splitlines())) <= 80


def test_each_option_is_in_the_group_of_its_field(capsys):
    shown = sections(capsys)
    shown.pop("Examples")
    assert {*shown} >= {*Group}
    flags = {flag.name: flag.opts[-1] for flag in dump_activations.params}
    for each in fields(DumpOptions):
        if each.name in flags:
            found = [
                t for t, text in shown.items() if re.search(rf"^  {flags[each.name]} ", text, re.M)
            ]
            assert found == [each.metadata["group"]], each.name
    assert "--dtype [fp32|fp16|bf16]" in shown[Group.KEEP]
    assert f"--precision [{'|'.join(PRECISIONS)}]" in shown[Group.COMPUTE]


def test_the_examples_are_valid_calls(capsys):
    text = sections(capsys)["Examples"].replace("\\\n", "")
    calls = re.findall(r"^ +dump-activations (.*)$", text, re.M)
    assert len(calls) == 2
    known = {each.name for each in fields(DumpOptions)}
    for call in calls:
        with dump_activations.make_context("dump-activations", shlex.split(call)) as context:
            given = {name: value for name, value in context.params.items() if name in known}
            DumpOptions(**given | {"allow_cpu": True})


@pytest.mark.parametrize("command", [main, inspect_main])
def test_short_flags(command, capsys):
    for short, long in (("-h", "--help"), ("-V", "--version")):
        assert [command([short]), command([long])] == [0, 0]
        out = capsys.readouterr().out
        assert out == out[: len(out) // 2] * 2
    assert version("dump-activations") in out


@pytest.mark.parametrize(
    "outputs", [["--outputs= pooled, head_logits "], ["--outputs=pooled", "--outputs=head_logits"]]
)
def test_outputs_may_have_blanks_or_be_given_more_than_once(outputs, inputs, tmp_path):
    path = tmp_path / "out.pt"
    assert main([*inputs, *CPU, "--n-samples", "3", "-o", str(path), *outputs]) == 0
    assert set(read_dump(path).tensors) == {"pooled", "head_logits", "indices", "boards"}


def test_more_samples_than_rows_warn(demo_checkpoint, tmp_path, capsys):
    dataset = make_dataset(tmp_path / "dataset", "legacy_move", n=101)
    path = tmp_path / "out.npz"
    inputs = ["--init", str(demo_checkpoint), "--dataset", str(dataset.path)]
    arguments = [*inputs, *CPU, "--outputs", "pooled", "-o", str(path)]
    assert main([*arguments, "--n-samples", "102"]) == 0
    assert "replacement" in capsys.readouterr().err
    expected = np.random.default_rng(0).integers(0, 101, size=102, dtype=np.int64)
    np.testing.assert_array_equal(read_dump(path).numpy("indices"), expected)
    assert main([*arguments, "--n-samples", "101", "--overwrite"]) == 0
    assert "replacement" not in capsys.readouterr().err


@contextmanager
def file_size_limit(limit):
    """Let no file grow past `limit` bytes: a large dump then ends before its forward."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


# One board's layer_outputs take 4 x 16 x 64 values: 16 KiB in fp32.
@pytest.mark.parametrize(
    ("flags", "warns"),
    [
        ("--n-samples 524288 --outputs layer_outputs", True),
        ("--n-samples 1048576 --outputs layer_outputs,pooled --dtype fp16", True),
        ("--n-samples 1048575 --outputs layer_outputs --dtype fp16", False),
    ],
)
def test_warning_of_eight_gib(flags, warns, inputs, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with file_size_limit(2**20):
        assert main([*inputs, *CPU, *flags.split(), "-o", str(out / "a.pt")]) == 1
    printed = capsys.readouterr().err
    assert bool(re.search(r"layer_outputs.*GiB", printed)) == warns, printed
    assert list(out.iterdir()) == []


def test_demo_in_a_pipe(tmp_path):
    """The README's command. Without a CUDA device the demo runs on the CPU."""
    result = subprocess.run(
        [sys.executable, "-m", "dump_activations", "--demo", "-o", "activations.safetensors"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr
    assert made_files(tmp_path) == ["activations.safetensors"]
    printed = result.stdout + result.stderr
    assert "boards/s" in printed
    assert "\x1b" not in printed
    assert "\r" not in printed
    dump = read_dump(tmp_path / "activations.safetensors")
    assert dump.tensors["final_hidden"].shape == (1024, 16, 64)


def test_progress_on_a_terminal(tmp_path):
    call = [sys.executable, "-m", "dump_activations", "--demo", "--batch-size=16", "--no-write"]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    with open_terminal() as (file, close):
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), file)
        run = subprocess.run([*call, *CPU], cwd=tmp_path, env=environment, check=False, **streams)
        shown = close()
    assert run.returncode == 0, shown
    assert "\x1b[" in shown
    assert "boards/s" in shown
    assert "1,024/1,024" in shown


COMPLETED = {
    "--outputs pooled,attn_s": {"pooled,attn_scores", "pooled,attn_sinks"},
    "--outputs a": {"all"} | {key for key in KEYS if key.startswith("a")},
    "--dtype f": {"fp32", "fp16"},
    "--precision bf16-": {"bf16-true"},
    "--device c": {"cuda", "cpu"},
    "--list-": {"--list-outputs", "--list-labels"},
}


@pytest.mark.parametrize("words", COMPLETED)
def test_a_shell_completes(words, capsys, monkeypatch):
    monkeypatch.setenv("_DUMP_ACTIVATIONS_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"dump-activations {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.removeprefix("plain,") for line in lines} == COMPLETED[words]


@pytest.mark.parametrize("name", ["dump-activations", "inspect-activations"])
def test_bash_takes_the_script_that_completes(name, capsys, monkeypatch):
    command = {"dump-activations": main, "inspect-activations": inspect_main}[name]
    monkeypatch.setenv(f"_{name.upper().replace('-', '_')}_COMPLETE", "bash_source")
    assert command() == 0
    script = f"{capsys.readouterr().out}\ncomplete -p {name}"
    shown = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True)
    assert name in shown.stdout


def test_the_list_of_labels_is_what_a_dump_stores(demo_dataset, tmp_path, capsys):
    assert main(["--demo", "--list-labels", "--json"]) == 0
    listed = {each["label"]: each for each in json.loads(capsys.readouterr().out)}
    assert {"move_dir", "branch_evs", "legal_moves", "run_steps"} < listed.keys()
    path = tmp_path / "a.npz"
    labels = f"--labels={','.join(listed)}"
    assert main(["--demo", "--outputs=pooled", "--n-samples=3", labels, "-o", str(path)]) == 0
    dump = read_dump(path)
    for name, each in listed.items():
        stored = dump.tensors[f"labels/{name}"]
        dtype = str(stored.dtype).removeprefix("torch.")
        assert (each["dtype"], each["shape"]) == (dtype, [*stored.shape[1:]])
        assert each["text"]
    capsys.readouterr()
    assert main(["--dataset", str(demo_dataset), "--list-labels"]) == 0
    assert "played move: 0 up, 1 down, 2 left, 3 right" in capsys.readouterr().out


def test_all_labels_have_a_description():
    assert {*BOARD_LABELS, *RUN_LABELS} < LABEL_TEXTS.keys()


def test_all_outputs_are_the_models_own(capsys):
    keys = []
    for outputs in ("all", "*", "all,pooled"):
        given = ["--demo", "--dry-run", "--no-write", "--json", "--outputs", outputs]
        assert main(given) == 0
        keys.append(json.loads(capsys.readouterr().out)["keys"])
    assert keys[0] == keys[1] == keys[2] == [key for key in KEYS if key != "attn_sinks"]


def test_the_time_of_a_run_counts_from_the_commands_start(capsys, monkeypatch):
    later = SimpleNamespace(monotonic=lambda: mode.started + 1000)
    monkeypatch.setattr("dump_activations.commands.dump.time", later)
    assert main(["--demo", "--no-write", "--n-samples=9", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    parts = [summary[f"{part}seconds"] for part in ("setup_", "", "commit_")]
    assert summary["total_seconds"] == pytest.approx(sum(parts))
    assert 1000 < summary["total_seconds"] < 2000
    assert summary["keys"] == ["final_hidden"]


PROBE = """
import contextlib, io, sys
import dump_activations
from dump_activations.__main__ import run_dump
from dump_activations.commands.dump import main
heavy = {"torch", "numpy"}
assert {"StepsDataset", "dump", "load_encoder", "stream"} <= {*dump_activations.__all__}
assert not heavy & set(sys.modules), "import"
for arguments in ARGUMENTS:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(arguments)
    assert code == EXPECTED, (arguments, code)
    assert not heavy & set(sys.modules), arguments
"""
WRONG_CALLS = [
    [],
    ["--no-such-flag"],
    ["--init", "x"],
    ["--dataset", "x"],
    ["--n-samples", "many"],
    *[
        ["--init", "x", "--dataset", "y", *wrong]
        for wrong in (
            ["--n-samples", "0"],
            ["--outputs", "attn_weights"],
            ["--layers", "last"],
            ["--dtype", "fp8"],
            ["-o", "a.npz", "--dtype", "bf16"],
            ["--device", "cpu"],
            ["stray"],
        )
    ],
]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([["--help"], ["-h"], ["--version"]], 0),
        ([["--list-outputs", "--json"]], 0),
        (WRONG_CALLS, 2),
    ],
    ids=["help", "list-outputs", "wrong-calls"],
)
def test_neither_torch_nor_numpy_is_imported(arguments, code, tmp_path):
    script = PROBE.replace("ARGUMENTS", repr(arguments)).replace("EXPECTED", str(code))
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_installed_command_is_the_module():
    from importlib.metadata import entry_points

    (command,) = entry_points(group="console_scripts", name="dump-activations")
    assert command.load() is run_dump
