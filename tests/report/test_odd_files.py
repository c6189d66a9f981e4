"""Files that no run writes: each is shown within bounds or refused in a line, without traceback.

Shape letters: N boards, M moves (4).
"""

import base64
import re
import warnings
from hashlib import sha256
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from dump_activations import ActivationsFile, OutputError, demo, dump, write_report
from dump_activations.progress import Reporter, reported_to
from dump_activations.report import data, render, sections
from dump_activations.report.charts import Chart

N = 7
BOARDS = {
    "boards": np.random.default_rng(0).integers(0, 12, (N, 16), np.uint8),
    "indices": np.arange(N),
}
POOLED = np.ones((N, 3), np.float32)
PROBS = np.full((N, 4, 5), 0.2, np.float32)
# No move changes it.
STUCK = np.tile(np.array([1, 2, 1, 2, 2, 1, 2, 1], np.uint8), (N, 2))
# Every move but up changes it.
NO_UP = np.zeros(16, np.uint8)
NO_UP[1] = 1


def stored(**replaced) -> dict[str, np.ndarray]:
    """Return statistics of `pooled`, plausible where they are not replaced."""
    names = ("count", "mean", "variance", "min", "max", "count_abs_gt_6", "norm_mean")
    per_feature = {"mean", "variance", "min", "max", "count_abs_gt_6"}
    values = {name: np.ones(3 if name in per_feature else 1) for name in names}
    return {**values, **{name: np.full_like(values[name], v) for name, v in replaced.items()}}


def write(tmp_path, tensors, metadata=None) -> str:
    """Write the page of a file, and return the texts on it, one per line."""
    save_file({**BOARDS, **tensors}, tmp_path / "odd.safetensors", metadata or {"layers": "0,1"})
    with warnings.catch_warnings(action="error"):
        write_report(tmp_path / "odd.safetensors", tmp_path / "report.html")
    return Text((tmp_path / "report.html").read_text()).text


class Text(HTMLParser):
    """The texts of a page outside styles and scripts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.tags = "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.lasttag not in ("style", "script") or not data.strip():
            self.text += f"{data}\n"


# Tensors, and a sentence on the page.
SHOWN = {
    "one-board": ({"boards": BOARDS["boards"][:1], "indices": np.arange(1)}, "all 1 boards"),
    "nan": ({"head_probs": np.full_like(PROBS, np.nan)}, "model: every score is NaN"),
    "nan-cells": ({"final_hidden": np.full((N, 16, 2), np.nan)}, "not finite"),
    "infinite": ({"pooled": np.full_like(POOLED, np.inf)}, "not finite"),
    "huge": ({"pooled": np.full((N, 3), 3e38, np.float32)}, r"5\.196e\+38"),
    "huge-float64": ({"pooled": np.full((N, 3), 1e308)}, "not finite"),
    "tiny": ({"pooled": np.full((N, 2, 3), 5e-324)}, "pooled"),
    "nan-attention": ({"attn_pattern": np.full((N, 2, 3, 16, 16), np.nan, np.float16)}, "Layer 1"),
    "stuck": ({"boards": STUCK, "head_probs": PROBS}, "model: no move is legal"),
    "tiles-beyond-any": (
        {"boards": np.full((N, 16), 255, np.uint8), "head_logits": PROBS},
        r"2\^255",
    ),
    "huge-policy": ({"head_probs": np.full((N, 4), 1e30, np.float32)}, r"1e\+32%"),
    "moves-of-another-shape": (
        {"labels/move_dir": np.zeros((N, 2), np.uint8)},
        "move_dir must be one int64 or uint8 per board",
    ),
    "moves-of-another-dtype": (
        {"labels/move_dir": np.zeros(N, np.int16)},
        "move_dir must be one int64 or uint8 per board",
    ),
    "negative-labels": (
        {
            "head_probs": PROBS,
            "labels/move_dir": np.full(N, -1),
            "labels/step_index": np.full(N, -(2**63)),
        },
        "label move_dir has no value from 0 to 3(.|\n)*label step_index has no value from 0 to",
    ),
    "labels-beyond-any": (
        {
            "head_probs": PROBS,
            "labels/move_dir": np.array([9, -1, 2**62, 1, 200, 3, 0]),
            "labels/step_index": np.array([2**62, -(2**62), 0, 2**52, 2, 3, 4]),
        },
        "step of the game, 375,299,968,947,542 per bar",
    ),
    "no-vectors": (
        {"one": np.ones(N, np.float32), "none": np.ones((N, 0), np.float32)},
        "one has no vectors",
    ),
    "unreadable-dtype": ({"odd": np.ones((N, 2), np.complex64)}, "odd has a dtype"),
    "layers-without-numbers": (
        {"attn_pattern": np.ones((N, 3, 2, 16, 16), np.float16)},
        "attn_pattern has layers that the metadata does not number",
    ),
    "wide-head": (
        {"head_probs": np.full((N, 4, 5000), 1 / 5000, np.float32)},
        "The mean of 5000 bins has no chart(.|\n)*Moves that the model makes",
    ),
    "many-heads": (
        {"attn_pattern": np.full((N, 2, 100, 16, 16), 1 / 16, np.float16)},
        "100 more heads are left out",
    ),
    "more-heads-than-a-page-shows": (
        {"attn_pattern": np.full((N, 2, 130, 16, 16), 1 / 16, np.float16)},
        "132 more heads are left out",
    ),
    "some-statistics": (
        {"pooled": POOLED, "stats/pooled/count": np.ones(1)},
        "stored statistics are incomplete",
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_it_is_shown(tmp_path, name):
    tensors, sentence = SHOWN[name]
    assert re.search(sentence, write(tmp_path, tensors))
    assert "-heads" in name or (tmp_path / "report.html").stat().st_size < 100_000


@pytest.mark.parametrize(
    "replaced", [{"variance": -1}, {"count": 0}, {"count": -5}, {"count_abs_gt_6": -1}]
)
def test_impossible_statistics_are_not_used(tmp_path, monkeypatch, replaced):
    monkeypatch.setattr(ActivationsFile, "stats", lambda file, key: stored(**replaced))
    text = write(tmp_path, {"pooled": POOLED})
    assert "The stored statistics are impossible and not used." in text
    assert text.count("1.732\n") == 4


@pytest.mark.parametrize("value", [1e308, 5e-324, np.nan, np.inf])
def test_extreme_statistics_are_shown(tmp_path, monkeypatch, value):
    def stats(file, key):
        return {name: np.stack([each, each]) for name, each in stored(norm_mean=value).items()}

    monkeypatch.setattr(ActivationsFile, "stats", stats)
    text = write(tmp_path, {"resid_pre": np.ones((N, 2, 3), np.float32)})
    assert ("not finite" if value > 1e308 or np.isnan(value) else f"{value:.4g}") in text
    assert max(map(len, text.split("\n"))) < 500


def test_an_enormous_head_is_left_out(tmp_path):
    text = write(tmp_path, {"head_probs": np.zeros((N, 4, 1_000_000), np.float16)})
    assert text.count("head_probs has 4,000,000 values per board") >= 2
    assert "--outputs head_probs" not in text
    assert (tmp_path / "report.html").stat().st_size < 100_000


def test_twenty_thousand_keys_are_bounded(tmp_path):
    tensors = {f"key{i}": np.ones((N, 1), np.float16) for i in range(20_000)}
    text = write(tmp_path, {**tensors, "head_probs": PROBS})
    assert f"{20_001 - 64 - 10} more keys are left out" in text  # after ten by their names
    assert "Moves that the model makes" in text
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


REFUSED = {
    "boards-of-floats": (
        {"boards": np.ones((N, 16), np.float32)},
        "boards must be uint8; got float32",
    ),
    "fifteen-cells": (
        {"boards": np.ones((N, 15), np.uint8)},
        r"boards must have shape \(7, 16\); got \(7, 15\)",
    ),
    "three-moves": (
        {"head_probs": np.ones((N, 3), np.float32)},
        r"head_probs must have shape \(7, 4\) or \(7, 4, any\); got \(7, 3\)",
    ),
    "no-layers": (
        {"attn_pattern": np.ones((N, 2, 16, 16), np.float32)},
        r"must have shape \(7, any, any, 16, 16\); got \(7, 2, 16, 16\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(tmp_path, name):
    tensors, reason = REFUSED[name]
    with pytest.raises(OutputError, match=f"cannot show .*: .*{reason}"):
        write(tmp_path, tensors)
    assert not (tmp_path / "report.html").exists()


def test_a_file_without_boards_is_refused(tmp_path):
    save_file({"weight": np.ones((3, 4))}, tmp_path / "a.safetensors")
    with pytest.raises(OutputError):
        write_report(tmp_path / "a.safetensors", tmp_path / "report.html")


@pytest.mark.parametrize(
    ("scores", "move"),
    [
        ([np.nan, np.nan, 0.5, 0.4], 2),  # An illegal NaN and a legal one lose.
        ([9, np.nan, -np.inf, np.nan], 2),  # An illegal move loses to one that scores -inf.
        ([9, np.inf, 5, 5], 1),
        ([9, np.nan, np.nan, np.nan], data.UNKNOWN),
    ],
)
def test_neither_nan_nor_an_illegal_move_wins(scores, move):
    assert data.model_moves(np.array([scores]), NO_UP[None]) == [move]


def test_nan_of_one_move_leaves_the_policy_of_the_others(tmp_path):
    logits = np.tile(np.array([0, np.nan, 3, 1], np.float32), (N, 1))
    text = write(tmp_path, {"boards": np.tile(NO_UP, (N, 1)), "head_logits": logits})
    softmax = np.exp(3) / (1 + np.exp(3) + np.exp(1))
    assert f"model: ← left, {softmax:.0%}" in text


def test_boards_without_a_played_move_do_not_count_as_disagreement(tmp_path):
    probs = np.tile(np.array([0.1, 0.2, 0.3, 0.4], np.float32), (N, 1))
    played = np.array([3, 3, 3, -1, 255, 2, -1])
    boards = np.tile(NO_UP, (N, 1))
    text = write(tmp_path, {"boards": boards, "head_probs": probs, "labels/move_dir": played})
    assert "75.0%" in text


@pytest.mark.parametrize(
    "name", ["<script>x</script>", "a\"b'c&amp;", "\u202e\0\x1b[31m", "{{ 1 }}"]
)
def test_names_from_a_file_are_text(tmp_path, name):
    tensors = {name: np.ones((N, 16, 4), np.float32), f"labels/{name}": np.ones(N)}
    text = write(tmp_path, tensors, {"checkpoint": name, name: name})
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    assert text.count(f"{shown}\n") >= 5
    page = Text((tmp_path / "report.html").read_text())
    assert [tag for tag, _ in page.tags].count("script") == 1


def test_each_entry_of_metadata_has_its_group(tmp_path):
    path = tmp_path / "a.safetensors"
    options = {"labels": ["move_dir"], "where": "max_rank > 3", "stats": True, "n_samples": 3}
    dump(demo.CHECKPOINT, demo.DATASET, path, device="cpu", allow_cpu=True, **options)
    write_report(path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h3>Run</h3>" in page
    assert "<h3>More</h3>" not in page


def test_progress_counts_keys_and_is_shown_if_asked_for(tmp_path, monkeypatch):
    listener, calls = Reporter(), []
    monkeypatch.setattr(render, "shown_progress", lambda: reported_to(listener))
    path, report = tmp_path / "a.safetensors", tmp_path / "report.html"
    save_file({**BOARDS, "pooled": POOLED, "final_hidden": np.ones((N, 16, 2))}, path)
    write_report(path, report, progress=lambda *call: calls.append(call))
    assert (calls, listener.phase.text()) == ([(1, 2), (2, 2)], "starting")
    write_report(path, report, progress=True)
    assert listener.phase.text() == "writing the report: 2/2 keys"


def test_the_page_may_load_nothing_and_run_only_its_own_script(demo_report):
    page = demo_report.read_text()
    (policy,) = [
        attributes["content"]
        for _, attributes in Text(page).tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]

    def digest(tag):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"

    assert dict(part.strip().split(" ", 1) for part in policy.split(";")) == {
        "default-src": "'none'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "style-src": digest("style"),
        "script-src": digest("script"),
    }


def test_pictures_have_a_role_and_a_name(demo_report):
    tags = Text(demo_report.read_text()).tags
    pictures = [attributes for tag, attributes in tags if tag == "svg"][1:]  # The first is hidden.
    pictures += [each for _, each in tags if (each.get("aria-label") or "").startswith("board:")]
    assert len(pictures) > 40
    assert all(each.get("role") == "img" and each["aria-label"] for each in pictures)


def test_thousands_of_entries_of_metadata_are_bounded(tmp_path):
    text = write(tmp_path, {}, {f"key{i:04}": "x" for i in range(5000)})
    assert "4,900 more entries of metadata are not listed." in text
    assert len(re.findall(r"\bkey\d{4}\b", text)) == 100


def test_an_empty_cell_is_no_tile_in_the_order_of_the_examples(tmp_path):
    boards = np.zeros((3, 16), np.uint8)
    boards[0, :10] = 1  # 20 in all
    boards[1, 0] = 4  # 16, in a board with more empty cells
    boards[2, 0] = 5
    save_file({"boards": boards, "indices": np.arange(3)}, tmp_path / "a.safetensors")
    source = data.Source(ActivationsFile(tmp_path / "a.safetensors"))
    assert source.examples.tolist() == [1, 0, 2]


@given(st.floats(1e-9, 1e12))
def test_an_axis_ends_at_the_first_tick_that_no_value_is_beyond(top):
    ticks = Chart(title="", labels="ab", x_label="", lines={"": np.array([0, top])}).ticks
    assert ticks[0] == 0
    assert ticks[-2] < top <= ticks[-1] * (1 + 1e-8)
    assert len(ticks) <= 5


@pytest.mark.parametrize(("share", "percent"), [(3.0, 100), (-1.0, 0), (np.nan, 0), (0.25, 25)])
def test_attention_is_from_0_to_100_percent(tmp_path, share, percent):
    pattern = np.full((N, 2, 1, 16, 16), share, np.float32)
    save_file({**BOARDS, "attn_pattern": pattern}, tmp_path / "a.safetensors", {"layers": "0,1"})
    source = data.Source(ActivationsFile(tmp_path / "a.safetensors"))
    received = sections.attention(source)["received"]
    assert {*"".join(received)} == {chr(ord("?") + percent)}


def test_a_value_that_is_not_finite_has_no_height():
    values = np.array([np.nan, np.inf, -1.0, 2.0])
    chart = Chart(title="", labels="abcd", x_label="", lines={"": values})
    assert chart.heights(values) == [None, None, 0.0, 1.0]
