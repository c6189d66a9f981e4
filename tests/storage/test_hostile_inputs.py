"""Named pipes and devices where files belong."""

import os
import signal

import pytest

from dump_activations.commands import inspect as inspect_cli
from dump_activations.commands.dump import main
from reference.datasets import make_dataset

CPU = ["--allow-cpu", "--device", "cpu"]
DEADLINE = 60


@pytest.fixture(autouse=True)
def deadline():
    """Fail a test that waits for the other end of a pipe, which would be for ever."""

    def hangs(*_):
        pytest.fail("it hangs")

    previous = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(DEADLINE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def place(tmp_path, monkeypatch, demo_checkpoint):
    for name in ("dataset", "configured"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint").symlink_to(demo_checkpoint)
    (tmp_path / "configured" / "model.safetensors").symlink_to(
        demo_checkpoint / "model.safetensors"
    )
    make_dataset(tmp_path / "boards", "packed_46")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SPECIAL_FILES = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
}
PLACES = {
    "indices": ("indices.npy", ["--demo", "--indices", "indices.npy"]),
    "shard": ("dataset/steps-00000.npy", ["--dataset", "dataset", "--init", "checkpoint"]),
    "config": ("configured/config.json", ["--init", "configured", "--dataset", "boards"]),
    "bundle": ("bundle.pt", ["--init", "bundle.pt", "--dataset", "boards"]),
}


@pytest.mark.parametrize("kind", SPECIAL_FILES)
@pytest.mark.parametrize("case", PLACES)
def test_special_files_are_refused(case, kind, place, capsys):
    name, arguments = PLACES[case]
    SPECIAL_FILES[kind](place / name)
    assert main([*arguments, *CPU]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line
    assert "not a regular file" in line or "not an ordinary file" in line


@pytest.mark.parametrize("kind", SPECIAL_FILES)
def test_inspection_of_special_files(kind, place, capsys):
    SPECIAL_FILES[kind](place / "a.safetensors")
    assert inspect_cli.main(["a.safetensors"]) == 1
    assert capsys.readouterr().err == "error: a.safetensors: not an ordinary file\n"
