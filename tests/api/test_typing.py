"""What type checkers and readers see of the public names."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import dump_activations

CACHE = Path(__file__).parents[2] / ".mypy_cache" / "uses"
USES = """
import numpy as np
from torch.utils.data import DataLoader

from dump_activations import Batch, StepsDataset, Summary, dump, load_encoder, stream
from dump_activations import strem  # wrong: no such name

ds = StepsDataset("dataset")
loader = DataLoader(ds, batch_size=1024, sampler=ds.sample_indices(65536).tolist())
summary: Summary = dump("checkpoint", ds, "a.pt", outputs=["pooled"], indices=np.arange(3))
dump(load_encoder("checkpoint"), "dataset", write=False, batch_size=512, resume=True)
dump("checkpoint", "dataset", batch_siz=512)  # wrong: no such option
dump("checkpoint", "dataset", batch_size="512")  # wrong: no number
stream("checkpoint", "dataset", write=False)  # wrong: of dump only
stream("checkpoint", "dataset", tensors="borrowed")
dump("checkpoint", "dataset", tensors="borrowed")  # wrong: of stream only
for batch in stream("checkpoint", ds, outputs="pooled"):
    each: Batch = batch
    batch["pooled"].shape, batch.indices, batch.boards
"""


def test_right_uses_pass_and_wrong_ones_fail(tmp_path):
    (tmp_path / "uses.py").write_text(USES)
    command = [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={CACHE}", "uses.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = {int(line) for line in re.findall(r"^uses\.py:(\d+): error", run.stdout, re.MULTILINE)}
    wrong = {at for at, line in enumerate(USES.splitlines(), 1) if "# wrong" in line}
    assert found == wrong, run.stdout + run.stderr


def test_signatures_name_every_option():
    for function in (dump_activations.dump, dump_activations.stream):
        text = str(inspect.signature(function))
        assert "batch_size: int = 1024" in text
        assert text.startswith("(init_or_model: str | PathLike[str] | Encoder, dataset_or_path")
        assert max(map(len, inspect.getdoc(function).splitlines())) <= 100


def test_every_public_name_is_there():
    for name in dump_activations.__all__:
        assert getattr(dump_activations, name).__module__.startswith("dump_activations")
