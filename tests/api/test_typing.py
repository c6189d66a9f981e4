"""Public names as type checkers and readers see them."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import dump_activations
from dump_activations.options import DumpOptions, StreamOptions, describe

CACHE = Path(__file__).parents[2] / ".mypy_cache" / "uses"
USES = """
import numpy as np
import torch
from torch.utils.data import DataLoader

from dump_activations import ActivationsFile, Batch, StepsDataset, Summary
from dump_activations import dump, load_encoder, stream
from dump_activations import strem  # wrong: no such name

ds = StepsDataset("dataset")
loader = DataLoader(ds, batch_size=1024, sampler=ds.sample_indices(65536).tolist())
summary: Summary = dump("checkpoint", ds, "a.pt", outputs=["pooled"], indices=np.arange(3))
dump(load_encoder("checkpoint"), "dataset", write=False, batch_size=512, stats=True)
dump("checkpoint", "dataset", batch_siz=512)  # wrong: no such option
dump("checkpoint", "dataset", batch_size="512")  # wrong: no number
stream("checkpoint", "dataset", write=False)  # wrong: of dump only
stream("checkpoint", "dataset", tensors="view")
stream("checkpoint", "dataset", tensors="borrowed")  # wrong: no such choice
stream("checkpoint", "dataset", dtype="float32")  # wrong: no such choice
dump("checkpoint", "dataset", tensors="view")  # wrong: of stream only
for batch in stream("checkpoint", ds, outputs="pooled"):
    each: Batch = batch
    batch["pooled"].shape, batch.indices, batch.boards, batch.keys()
acts = ActivationsFile("a.pt")
for cells in acts.cells("layer_outputs", layer=2, batch_size=2048, dtype=torch.float32):
    cells.values.float() * 2, cells.rows + cells.cells
for pairs in acts.cells(["mlp_input", "mlp_out"], 2, epochs=None):
    pairs.values["mlp_out"].float()
    pairs.values.float()  # wrong: a dict of several keys
acts.cells("layer_outputs", batch=2048)  # wrong: no such argument
"""


def test_right_uses_pass_and_wrong_ones_fail(tmp_path):
    (tmp_path / "uses.py").write_text(USES)
    command = [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={CACHE}", "uses.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = {int(line) for line in re.findall(r"^uses\.py:(\d+): error", run.stdout, re.MULTILINE)}
    wrong = {at for at, line in enumerate(USES.splitlines(), 1) if "# wrong" in line}
    assert found == wrong, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("function", "options"),
    [(dump_activations.dump, DumpOptions), (dump_activations.stream, StreamOptions)],
    ids=["dump", "stream"],
)
def test_a_signature_and_its_options_class_agree(function, options):
    parameters = inspect.signature(function, eval_str=True).parameters
    keywords = {p.name: p for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    fields = {described.name: described for described in describe(options)}
    assert [*keywords] == [*fields]
    _, arguments = inspect.getdoc(function).split("Args:\n")
    documented = re.findall(r"^    (\w+): ", arguments.split("\n\n")[0], re.MULTILINE)
    assert documented == [*parameters]
    for name, parameter in keywords.items():
        assert parameter.default == fields[name].default, name
        if fields[name].choices:
            assert get_args(parameter.annotation) == fields[name].choices, name


def test_every_public_name_is_there():
    for name in dump_activations.__all__:
        assert getattr(dump_activations, name).__module__.startswith("dump_activations")
