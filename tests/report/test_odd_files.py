"""Files that no run would write: each is shown, or refused in a line, and never a traceback."""

import warnings

import numpy as np
import pytest
from safetensors.numpy import save_file

from dump_activations import OutputError, write_report
from dump_activations.progress import reported_to
from dump_activations.report import writing
from dump_activations.storage.statistics import STATISTICS

N = 7
BOARDS = {
    "boards": np.random.default_rng(0).integers(0, 12, (N, 16), np.uint8),
    "indices": np.arange(N),
}
POOLED = np.ones((N, 3), np.float32)
PROBS = np.full((N, 4, 5), 0.2, np.float32)
# No move changes it.
STUCK = np.tile(np.array([1, 2, 1, 2, 2, 1, 2, 1], np.uint8), (N, 2))

SHOWN = {
    "nan": {"head_probs": np.full_like(PROBS, np.nan), "final_hidden": np.full((N, 16, 2), np.nan)},
    "infinite": {"pooled": np.full_like(POOLED, np.inf)},
    "nan-attention": {"attn_pattern": np.full((N, 2, 3, 16, 16), np.nan, np.float16)},
    "stuck": {"boards": STUCK, "head_probs": PROBS, "labels/move_dir": np.zeros(N, np.uint8)},
    "tiles-beyond-any": {"boards": np.full((N, 16), 255, np.uint8), "head_logits": PROBS},
    "labels-beyond-any": {
        "head_probs": PROBS,
        "labels/move_dir": np.array([9, -1, 2**62, 1, 200, 3, 0]),
        "labels/step_index": np.array([2**62, -(2**62), 0, 1, 2, 3, 4]),
    },
    "no-vectors": {"one": np.ones(N, np.float32), "none": np.ones((N, 0), np.float32)},
}

REFUSED = {
    "boards-of-floats": ({"boards": np.ones((N, 16), np.float32)}, "no boards"),
    "three-moves": ({"head_probs": np.ones((N, 3), np.float32)}, "head_probs are 7x3"),
    "no-layers": ({"attn_pattern": np.ones((N, 2, 16, 16), np.float32)}, "attn_pattern are 7x2x16"),
    "few-statistics": ({"pooled": POOLED, "stats/pooled/count": np.ones(1)}, "stats/pooled/"),
    "misshapen-statistics": (
        {"pooled": POOLED, **{f"stats/pooled/{each.name}": np.ones(5) for each in STATISTICS}},
        "stats/pooled/",
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_it_is_shown(tmp_path, name):
    path = tmp_path / "odd.safetensors"
    save_file({**BOARDS, **SHOWN[name]}, path, {"layers": "0,1"})
    with warnings.catch_warnings(action="error"):
        write_report(path, tmp_path / "report.html")


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(tmp_path, name):
    tensors, reason = REFUSED[name]
    save_file({**BOARDS, **tensors}, tmp_path / "odd.safetensors")
    with pytest.raises(OutputError, match=f"is no dump that can be shown: it.*{reason}"):
        write_report(tmp_path / "odd.safetensors", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_progress_is_of_keys(tmp_path):
    path = tmp_path / "two.safetensors"
    save_file({**BOARDS, "pooled": POOLED, "final_hidden": np.ones((N, 16, 2))}, path)
    calls = []
    write_report(path, tmp_path / "report.html", progress=lambda *call: calls.append(call))
    assert calls == [(1, 2), (2, 2)]


def test_progress_is_shown_where_that_is_asked_for(tmp_path, monkeypatch):
    class Listener:
        def begin(self, phase):
            told.append(phase.name)

        def advance(self, done, of):
            told.append((done, of))

    told = []
    monkeypatch.setattr(writing, "shown_progress", lambda: reported_to(Listener()))
    path = tmp_path / "a.safetensors"
    save_file({**BOARDS, "pooled": POOLED}, path)
    write_report(path, tmp_path / "report.html")
    assert told == []
    write_report(path, tmp_path / "report.html", progress=True)
    assert told == ["writing the report", (1, 1)]
