"""Examples of the pages, run on a small dump of the demo."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from dump_activations import dump

ROOT = Path(__file__).parents[1]
LAYER = 3


@pytest.fixture(scope="module")
def activations(tmp_path_factory, demo_checkpoint, demo_dataset):
    path = tmp_path_factory.mktemp("examples") / "probe.safetensors"
    dump(
        demo_checkpoint,
        demo_dataset,
        path,
        outputs=["layer_outputs"],
        layers=[0, LAYER],
        labels=["move_dir", "run_id"],
        n_samples=700,
        dtype="fp16",
        device="cpu",
        allow_cpu=True,
    )
    return path


def test_the_sae_learns(activations, monkeypatch, capsys):
    example = ROOT / "docs" / "examples" / "sae.py"
    assert len(example.read_text().splitlines()) < 40
    monkeypatch.setattr(sys, "argv", ["sae.py", str(activations), str(LAYER)])
    torch.manual_seed(0)
    runpy.run_path(str(example))
    first, *_, last = map(float, re.findall(r": (0\.\d+) of the variance", capsys.readouterr().out))
    assert last < 0.75 * first < 0.5


def test_the_probe_of_the_readme_finds_the_move(activations, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n((?:(?!```).)*torch\.nn\.Linear.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(activations.parent)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})
    layers, accuracies = zip(*map(str.split, capsys.readouterr().out.splitlines()), strict=True)
    assert layers == ("0", str(LAYER))
    assert float(accuracies[1]) > 0.45
