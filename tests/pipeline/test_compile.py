"""Compiling comes before the loop and before the file."""

import os
import stat
import time
from functools import partial

import pytest
import torch

from dump_activations import dump, load_encoder, stream
from dump_activations.errors import DeviceError, DumpActivationsWarning
from dump_activations.model import capture
from reference.dumps import read_dump

OPTIONS = {"n_samples": 40, "batch_size": 8, "device": "cpu", "allow_cpu": True, "compile": True}


@pytest.fixture
def compile_with(monkeypatch):
    """Return a function that makes torch compile by calling another with no arguments."""

    def use(called=lambda: None):
        def backend(graph, _inputs):
            called()
            return graph.forward

        monkeypatch.setattr(capture.torch, "compile", partial(torch.compile, backend=backend))

    return use


def raising(error):
    def fail():
        raise error

    return fail


@pytest.fixture
def dumped(demo_checkpoint, demo_dataset, tmp_path):
    """Return a function that runs a dump to `a.safetensors`."""

    def run(**options):
        path = tmp_path / "out" / "a.safetensors"
        path.parent.mkdir(exist_ok=True)
        return dump(demo_checkpoint, demo_dataset, path, **(OPTIONS | options))

    return run


@pytest.mark.parametrize("write", [True, False])
def test_the_model_is_compiled_once_and_first(write, compile_with, dumped, tmp_path, monkeypatch):
    batches, found = [], []
    run_batch = capture.Capture.run

    def run(self, tokens_BS, buffers):
        run_batch(self, tokens_BS, buffers)
        batches.append(len(tokens_BS))

    monkeypatch.setattr(capture.Capture, "run", run)
    compile_with(lambda: found.append((len(batches), [*(tmp_path / "out").iterdir()])))
    dumped(write=write)
    assert found == [(0, [])]
    assert batches == [8] * 6  # empty boards, then the run's


def test_its_time_is_set_up(compile_with, monkeypatch, dumped):
    clock, taken = time.perf_counter, []
    compile_with(lambda: taken.append(1e6))
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(taken))
    summary = dumped(write=False)
    assert summary.setup_seconds > 9e5 > summary.seconds + summary.stage_seconds["forward"]


def test_a_stream_is_compiled_when_the_call_returns(compile_with, demo_checkpoint, demo_dataset):
    found = []
    compile_with(lambda: found.append(1))
    batches = stream(demo_checkpoint, demo_dataset, **(OPTIONS | {"n_samples": 20}))
    assert len(found) == 1
    assert len([*batches]) == 3
    assert len(found) == 1


@pytest.mark.parametrize("write", [True, False])
def test_a_failure_leaves_no_file(write, compile_with, dumped, tmp_path):
    compile_with(raising(OSError("no compiler\nand more lines")))
    text = r"^compile: torch.compile fails here \(OSError: no compiler\); leave it out$"
    with pytest.raises(DeviceError, match=text):
        dumped(write=write)
    assert not [*(tmp_path / "out").iterdir()]


def test_a_failure_leaves_the_callers_model_alone(compile_with, demo_checkpoint, demo_dataset):
    compile_with(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")))
    model = load_encoder(demo_checkpoint).train()
    with pytest.raises(DeviceError, match="out of device memory"):
        stream(model, demo_dataset, **OPTIONS)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("variable", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_a_model_that_torch_does_not_compile_is_not_recorded_as_compiled(
    variable, dumped, tmp_path, monkeypatch
):
    monkeypatch.setenv(variable, "1")
    with pytest.warns(DumpActivationsWarning, match=f"compile: ignored, since {variable} is set"):
        dumped()
    assert read_dump(tmp_path / "out" / "a.safetensors").metadata["compile"] == "false"


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Return the directory in which a run keeps compiled code."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    # So that what a run sets is undone.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    return tmp_path / "caches" / "dump-activations" / "torch"


def test_compiled_code_is_kept_where_nobody_else_can_write(caches, compile_with, dumped):
    seen = []
    compile_with(lambda: seen.append(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
    dumped(write=False)
    assert seen == [str(caches)]
    assert stat.S_IMODE(caches.stat().st_mode) == 0o700


@pytest.mark.parametrize("planted", ["open", "link", "file"])
def test_a_cache_that_others_may_have_filled_is_refused(planted, caches, dumped, tmp_path):
    caches.parent.mkdir(parents=True)
    if planted == "open":
        caches.mkdir()
        caches.chmod(0o770)
    elif planted == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        caches.symlink_to(tmp_path / "theirs")
    else:
        caches.touch()
    with pytest.raises(DeviceError, match=rf"^compile: .*{caches}.*TORCHINDUCTOR_CACHE_DIR$"):
        dumped(write=False)


def test_a_cache_of_the_users_choice_is_taken(caches, compile_with, monkeypatch, dumped):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    compile_with()
    dumped(write=False)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
    assert not caches.exists()
