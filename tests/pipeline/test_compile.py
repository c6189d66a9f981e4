"""Compiling comes before the loop and before the file."""

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


def test_the_time_it_takes_is_set_up(compile_with, monkeypatch, demo_checkpoint, demo_pool):
    clock, taken = time.perf_counter, [0.0]

    def backend(graph, _inputs):
        taken[0] = 1e6
        return graph.forward

    compile_with(backend)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + taken[0])
    options = {"n_samples": 40, "batch_size": 8, "device": "cpu", "allow_cpu": True}
    summary = dump(demo_checkpoint, demo_pool, write=False, compile=True, **options)
    assert summary.setup_seconds > 9e5 > summary.seconds + summary.stage_seconds["forward"]


@pytest.mark.parametrize("flags", [[], ["--no-write"]])
def test_a_failure_leaves_no_file(flags, compile_with, tmp_path, capsys):
    def backend(_graph, _inputs):
        raise OSError("no compiler\nand more lines")

    compile_with(backend)
    assert main([*DEMO, *flags, "-o", str(tmp_path / "a.pt")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--compile: torch.compile fails here (OSError: no compiler)" in line
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_callers_model_alone(compile_with, demo_checkpoint, demo_pool):
    def backend(_graph, _inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    compile_with(backend)
    model = load_encoder(demo_checkpoint).train()
    options = {"n_samples": 40, "batch_size": 8, "compile": True, "device": "cpu"}
    with pytest.raises(RuntimeError):
        next(stream(model, demo_pool, allow_cpu=True, **options))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
