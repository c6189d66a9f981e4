"""The pages' code runs, on a small dump of the demo, and run_page.py notices where it does not."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dump_activations import dump

ROOT = Path(__file__).parents[1]
RUN_PAGE = ROOT / "docs" / "run_page.py"
LAYER = 3


@pytest.fixture(scope="module")
def activations(tmp_path_factory, demo_checkpoint, demo_dataset):
    path = tmp_path_factory.mktemp("examples") / "activations.safetensors"
    dump(
        demo_checkpoint,
        demo_dataset,
        path,
        outputs=["layer_outputs", "head_probs"],
        layers=[0, LAYER],
        labels=["move_dir", "run_id", "legal_moves"],
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


@pytest.mark.parametrize(
    ("found_by", "pattern", "lowest"),
    [("torch.nn.Linear", rf"layer {LAYER}: (\S+)", 0.45), ("expected_bin", r"(\S+)", 0.6)],
    ids=["probe", "model's move"],
)
def test_the_answers_of_the_readme(found_by, pattern, lowest, *, activations, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if found_by in block]
    monkeypatch.chdir(activations.parent)
    exec(compile(code, "README.md", "exec"), {})
    assert float(re.findall(pattern, capsys.readouterr().out)[-1]) > lowest


PAGE = """
```bash
echo made
```

```text
made
```

<!-- not run -->
```python
raise SystemExit(1)
```

```python
number = 2
print(number, "lines,", 0.5004)
```

```text
{output}
```

```python
print(number)
```
"""


@pytest.mark.parametrize(
    ("name", "output", "fails_with"),
    [
        ("page.md", "2 lines, 0.52", ""),
        ("page.md", "3 lines, 0.50", "3 lines"),
        ("page.md", "2 lines, 0.80", "0.80"),
        ("page.md", "2 ..., 0.52", ""),
        ("page.md", "2 ... 0.80", "0.80"),
        ("README.md", "2 lines, 0.50", "NameError"),
    ],
)
def test_a_page_runs_and_prints_what_it_shows(name, output, fails_with, tmp_path):
    page = tmp_path / name
    page.write_text(PAGE.format(output=output))
    command = [sys.executable, RUN_PAGE, page]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == (not fails_with), result.stderr
    assert fails_with in result.stderr
    if "3 lines" in output:
        subprocess.run([*command, "--update"], check=True)
        assert page.read_text().count("2 lines, 0.5004") == 1
