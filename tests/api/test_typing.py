"""Public names as type checkers, editors and readers see them."""

import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import jedi
import pytest

import dump_activations
from dump_activations.pipeline.options import DumpOptions, StreamOptions

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "dump_activations"
CACHE = Path(__file__).parents[2] / ".mypy_cache" / "uses"
USES = """
import numpy as np
import torch
from torch.utils.data import DataLoader

from dump_activations import ActivationsFile, Batch, StepsDataset, Summary
from dump_activations import demo, dump, load_encoder, stream
from dump_activations import strem  # wrong: no such name

ds = StepsDataset("dataset")
loader = DataLoader(ds, batch_size=1024, sampler=ds.sample_indices(65536).tolist())
summary: Summary = dump("checkpoint", ds, "a.pt", outputs=["pooled"], indices=np.arange(3))
dump(load_encoder("checkpoint"), "dataset", write=False, batch_size=512, stats=True)
dump("checkpoint", "dataset", batch_siz=512)  # wrong: no such option
dump("checkpoint", "dataset", batch_size="512")  # wrong: no number
dump("checkpoint", "dataset", dtype="float16")  # wrong: no such choice
dump("checkpoint", "dataset", layers=-1), dump("checkpoint", "dataset", layers=[0, 1])
dump("checkpoint", "dataset", layers=0.5)  # wrong: no layer
summary = demo.dump("a.pt", outputs="pooled", layers="0,-1", dtype="fp16")
demo.dump("a.pt", dtype="float16")  # wrong: no such choice
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

# Reading torch and NumPy would take most of the time.
SETTINGS = "[mypy]\nstrict = true\n[mypy-torch.*,numpy.*]\nfollow_imports = skip\n"


def test_right_uses_pass_and_wrong_ones_fail(tmp_path):
    (tmp_path / "uses.py").write_text(USES)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    command = [sys.executable, "-m", "mypy", f"--cache-dir={CACHE}", "uses.py"]
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
    described = {each.name: each for each in fields(options)}
    assert [*keywords] == [*described]
    _, arguments = inspect.getdoc(function).split("Args:\n")
    documented = re.findall(r"^    (\w+): ", arguments.split("\n\n")[0], re.MULTILINE)
    assert documented == [*parameters]
    for name, parameter in keywords.items():
        assert parameter.default == described[name].default, name
        if choices := described[name].metadata.get("choices"):
            assert get_args(parameter.annotation) == choices, name


def test_stream_cells_takes_options_of_streams_by_their_names():
    own = "init dataset key layer epoch epochs rank world_size window drop_last boards_per_pass"
    taken = {*inspect.signature(dump_activations.stream_cells).parameters} - {*own.split()}
    assert taken <= {each.name for each in fields(StreamOptions)}


def test_every_public_name_is_there():
    names = dir(dump_activations)
    assert set(names) == {"__version__", *dump_activations.__all__}
    for name in dump_activations.__all__:
        value = getattr(dump_activations, name)
        assert getattr(value, "__module__", value.__name__).startswith("dump_activations")


def test_the_version_is_the_crates(tmp_path):
    """Also where no distribution is installed."""
    code = "import dump_activations; print(dump_activations.__version__)"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert f'version = "{done.stdout.strip()}"' in (ROOT / "Cargo.toml").read_text()


IMPORTS = "from dump_activations import ActivationsFile, StepsDataset, demo, dump, stream"


def script(code):
    return jedi.Script(f"{IMPORTS}\n{code}", project=jedi.Project(PACKAGE.parent))


@pytest.mark.parametrize(
    ("call", "function"),
    [
        ("dump", dump_activations.dump),
        ("stream", dump_activations.stream),
        ("demo.dump", dump_activations.demo.dump),
        ("StepsDataset('a').sample_indices", dump_activations.StepsDataset.sample_indices),
        ("StepsDataset('a').find", dump_activations.StepsDataset.find),
        ("StepsDataset('a').read_boards", dump_activations.StepsDataset.read_boards),
        ("ActivationsFile('a').read", dump_activations.ActivationsFile.read),
    ],
)
def test_an_editor_shows_names_types_choices_and_a_line_per_parameter(call, function):
    (signature,) = script(f"{call}(").get_signatures()
    shown = {parameter.name: parameter.to_string() for parameter in signature.params}
    parameters = inspect.signature(function).parameters
    assert [*shown] == [name for name in parameters if name != "self"]
    documentation = signature.docstring()
    for name, text in shown.items():
        assert f"{name}: " in text, "a type"
        choices = re.findall(r"Literal\[(.*?)\]", str(parameters[name].annotation))
        assert [each.replace("'", '"') for each in choices] == re.findall(r"Literal\[(.*?)\]", text)
        assert re.search(rf"^    {name}: \w", documentation, re.MULTILINE), name
    assert script(call).help(2, len(call))[0].docstring() == documentation


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("dump(bat", ["batch_size="]),
        ("dump('a', 'b').boards_", ["boards_per_second"]),
        ("for batch in stream('a', 'b'):\n    batch.lab", ["labels"]),
        ("StepsDataset('a').read_", ["read_boards", "read_labels", "read_rows"]),
        ("import dump_activations\ndump_activations.load", ["load_encoder"]),
        ("demo.", ["CHECKPOINT", "DATASET", "dump"]),
    ],
)
def test_an_editor_completes(code, names):
    assert {*names} <= {each.name for each in script(code).complete()}
