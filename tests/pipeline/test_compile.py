"""Compiling comes before the loop and before the file."""

import os
import stat
import time
from functools import partial

import pytest
import torch

from dump_activations import dump, load_encoder, stream
from dump_activations.commands.dump import main
from dump_activations.model import capture

DEMO = ["--demo", "--device", "cpu", "--n-samples", "40", "--batch-size", "8", "--compile"]


@pytest.fixture
def compile_with(monkeypatch):
    def use(backend):
        monkeypatch.setattr(capture.torch, "compile", partial(torch.compile, backend=backend))

    return use


@pytest.mark.parametrize("flags", [[], ["--no-write"]])
def test_the_model_is_compiled_once_and_first(flags, compile_with, tmp_path, monkeypatch, capsys):
    loops, found = [], []
    enter = capture.Capture.run

    def backend(graph, _inputs):
        found.append((len(loops), [*tmp_path.iterdir()]))
        return graph.forward

    def run(self, tokens_BS, buffers):
        enter(self, tokens_BS, buffers)
        loops.append(len(tokens_BS))

    monkeypatch.setattr(capture.Capture, "run", run)
    compile_with(backend)
    assert main([*DEMO, *flags, "-o", str(tmp_path / "a.pt")]) == 0
    assert found == [(0, [])]
    assert loops == [8] * 6  # empty boards, then the run's


def test_the_time_it_takes_is_set_up(compile_with, monkeypatch, demo_checkpoint, demo_dataset):
    clock, taken = time.perf_counter, [0.0]

    def backend(graph, _inputs):
        taken[0] = 1e6
        return graph.forward

    compile_with(backend)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + taken[0])
    options = {"n_samples": 40, "batch_size": 8, "device": "cpu", "allow_cpu": True}
    summary = dump(demo_checkpoint, demo_dataset, write=False, compile=True, **options)
    assert summary.setup_seconds > 9e5 > summary.seconds + summary.stage_seconds["forward"]


def test_a_stream_is_compiled_when_it_is_there(compile_with, demo_checkpoint, demo_dataset):
    found = []

    def backend(graph, _inputs):
        found.append(graph)
        return graph.forward

    compile_with(backend)
    options = {"n_samples": 20, "batch_size": 8, "compile": True}
    batches = stream(demo_checkpoint, demo_dataset, device="cpu", allow_cpu=True, **options)
    assert len(found) == 1
    assert len([*batches]) == 3
    assert len(found) == 1


@pytest.mark.parametrize("flags", [[], ["--no-write"]])
def test_a_failure_leaves_no_file(flags, compile_with, tmp_path, capsys):
    def backend(_graph, _inputs):
        raise OSError("no compiler\nand more lines")

    compile_with(backend)
    assert main([*DEMO, *flags, "-o", str(tmp_path / "a.pt")]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert "--compile: torch.compile fails here (OSError: no compiler)" in line
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_callers_model_alone(compile_with, demo_checkpoint, demo_dataset):
    def backend(_graph, _inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    compile_with(backend)
    model = load_encoder(demo_checkpoint).train()
    options = {"n_samples": 40, "batch_size": 8, "compile": True, "device": "cpu"}
    with pytest.raises(RuntimeError):
        stream(model, demo_dataset, allow_cpu=True, **options)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Return the directory in which a run keeps what torch compiles."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    # So that what a run sets is undone.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    return tmp_path / "caches" / "dump-activations" / "torch"


def test_what_is_compiled_is_kept_where_nobody_else_can_write(caches, compile_with, capsys):
    seen = []

    def backend(graph, _inputs):
        seen.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        return graph.forward

    compile_with(backend)
    assert main([*DEMO, "--no-write"]) == 0
    assert seen == [str(caches)]
    assert stat.S_IMODE(caches.stat().st_mode) == 0o700


@pytest.mark.parametrize("planted", ["open", "link", "file"])
def test_a_cache_that_others_may_have_filled_is_refused(planted, caches, tmp_path, capsys):
    caches.parent.mkdir(parents=True)
    if planted == "open":
        caches.mkdir()
        caches.chmod(0o770)
    elif planted == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        caches.symlink_to(tmp_path / "theirs")
    else:
        caches.touch()
    assert main([*DEMO, "--no-write"]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert "--compile" in line
    assert str(caches) in line
    assert "TORCHINDUCTOR_CACHE_DIR" in line


def test_a_cache_of_the_users_choice_is_taken(caches, compile_with, monkeypatch, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    compile_with(lambda graph, _inputs: graph.forward)
    assert main([*DEMO, "--no-write"]) == 0
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
    assert not caches.exists()
