"""The page in a browser shows what NumPy finds in the file, and fetches nothing.

Shape letters: N boards, L layers, Q heads, S cells of queries, T cells of keys, M moves, H hidden.
"""

import json
import re
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conftest import N
from dump_activations import write_report
from dump_activations.report import data
from reference.checkpoints import BASE, config_json, random_state_dict, save_checkpoint
from reference.dumps import read_dump
from reference.game import MOVES, describe

PHONE, DESKTOP = (390, 844), (1280, 900)

# Section -> flags that it names where the dump lacks its values.
WITHOUT = {
    "moves": ["--outputs head_probs"],
    "attention": ["--outputs attn_pattern"],
    "examples": ["--outputs head_probs"],
    "boards": ["--labels move_dir", "--labels step_index"],
}

HELPERS = """
window.figure = (title) => [...document.querySelectorAll("figure")].find(
  (each) => each.querySelector("figcaption b")?.textContent === title);
window.tooltips = (title) => [...figure(title).querySelectorAll("title")].map((t) => t.textContent);
window.cells = (table) => [...table.rows].map((row) => [...row.cells].map((c) => c.textContent));
window.board = (element) => [...element.children].map((cell) => cell.textContent);
window.numbers = (name) => cells(document.querySelector(`[aria-label="${name}"] table`));
"""

# Levels of a heatmap, 19 rows of 19, read from its strokes.
LEVELS = """
[...document.querySelectorAll(".heatmap")].map((svg) => {
  const grid = Array.from({ length: 19 }, () => Array(19).fill(0));
  for (const path of svg.querySelectorAll("path")) {
    for (const [, x, y, width] of path.getAttribute("d").matchAll(/M(\\d+) (\\d+)h(\\d+)/g)) {
      grid[y].fill(Number(path.className.baseVal.slice(1)), Number(x), Number(x) + Number(width));
    }
  }
  return grid;
})
"""


def with_helpers(page, report):
    page.open(report)
    page.evaluate(HELPERS)
    return page


@pytest.fixture
def opened(page, demo_report):
    page.resize(*DESKTOP)
    page.emulate()
    return with_helpers(page, demo_report)


@pytest.fixture(scope="module")
def tensors(demo_dump):
    dump = read_dump(demo_dump)
    return {name: dump.numpy(name) for name in dump.tensors}


def ask(page, expression):
    return json.loads(page.evaluate(f"JSON.stringify({expression})"))


def largest_tiles(tensors):
    return 2 ** tensors["boards"].max(axis=1).astype(int)


def legal_moves(board):
    return np.array(describe(tuple(board.tolist()))["legal_moves"], bool)


def model_moves(tensors):
    """Return the legal move with the highest expected bin for each board, and these bins."""
    probs_NMO = tensors["head_probs"]
    bins_NM = probs_NMO @ np.arange(probs_NMO.shape[-1])
    legal_NM = np.array([legal_moves(board) for board in tensors["boards"]])
    assert legal_NM.any(axis=1).all()
    return np.where(legal_NM, bins_NM, -1).argmax(axis=1), bins_NM


def test_nothing_is_fetched_and_nothing_goes_wrong(page, demo_report):
    page.fetched.clear()
    page.complaints.clear()
    page.open(demo_report)
    page.evaluate("document.getElementById('theme').click()")
    assert {url for url in page.fetched if not url.startswith("data:")} == {demo_report.as_uri()}
    assert page.complaints == []


def test_the_largest_tiles(opened, tensors):
    found = ask(opened, "tooltips('Largest tile of a board')")
    tiles, counts = np.unique(largest_tiles(tensors), return_counts=True)
    names = [f"{tile // 1024}k" if tile >= 1024 else str(tile) for tile in tiles]
    shown = [text for text in found if not text.endswith(" 0 boards")]
    assert [(text.split(":")[0], text.split(", ")[1]) for text in shown] == [
        (name, f"{count} boards") for name, count in zip(names, counts, strict=True)
    ]


def shares(kinds, agrees=None):
    """Return the bars of each kind that occurs: the share of boards, or of those that agree."""
    counts = np.bincount(kinds)
    of = np.bincount(kinds, weights=agrees) / np.maximum(counts, 1) if agrees is not None else None
    return {
        int(kind): (100 * (counts[kind] / len(kinds) if of is None else of[kind]), counts[kind])
        for kind in np.flatnonzero(counts)
    }


def bars(page, title):
    """Read the bars with any boards: name -> percent and number of boards."""
    found = {}
    for text in ask(page, f"tooltips('{title}')"):
        name, percent, count = re.fullmatch(
            r"(\d+k?): (\S+)%?(?:,| of) ([\d,]+) boards", text
        ).groups()
        if count != "0":
            number = int(name[:-1]) * 1024 if name.endswith("k") else int(name)
            found[number] = (float(percent.strip("%")), int(count.replace(",", "")))
    return found


def test_the_bars_of_boards_and_of_agreement(opened, tensors):
    boards, steps = tensors["boards"], tensors["labels/step_index"]
    agrees = model_moves(tensors)[0] == tensors["labels/move_dir"]
    width = steps.max() // 12 + 1
    legal = np.array([sum(legal_moves(board)) for board in boards])
    expected = {
        "Empty cells of a board": shares((boards == 0).sum(axis=1)),
        "Moves that change a board": shares(legal),
        "Steps of the games": shares(steps // width * width),
        "Agreement by the largest tile": shares(largest_tiles(tensors), agrees),
        "Agreement by the step of the game": shares(steps // width * width, agrees),
    }
    for title, bars_of in expected.items():
        found = bars(opened, title)
        assert {kind: count for kind, (_, count) in found.items()} == {
            kind: count for kind, (_, count) in bars_of.items()
        }
        for kind, (percent, _) in bars_of.items():
            assert found[kind][0] == pytest.approx(percent, abs=0.5), title
    assert len(ask(opened, "tooltips('Steps of the games')")) == steps.max() // width + 1


def test_the_moves(opened, tensors):
    moves, played = model_moves(tensors)[0], tensors["labels/move_dir"]
    share = ask(opened, "document.getElementById('agreement').textContent")
    assert share == f"{(moves == played).mean():.1%}"
    made = ask(opened, "tooltips('Moves that the model makes')")
    assert [text.split(":")[0] for text in made] == [*MOVES]
    for text, count in zip(made, np.bincount(moves, minlength=4), strict=True):
        assert text.endswith(f", {count} boards")
    tables = ask(opened, "numbers('played')")
    for i, row in enumerate(tables[1:]):
        for j, text in enumerate(row[1:]):
            of_row = max((played == i).sum(), 1)
            expected = 100 * ((played == i) & (moves == j)).sum() / of_row
            assert float(text.strip("%")) == pytest.approx(expected, abs=0.5)


def test_the_mean_probabilities(opened, tensors):
    found = ask(opened, """tooltips("Mean probability of each bin, by the move's head")""")
    expected = tensors["head_probs"].mean(axis=0)
    for i, text in enumerate(found):
        values = [float(part.split()[-1]) for part in text.split(": ")[1].split(", ")]
        np.testing.assert_allclose(values, expected[:, i], rtol=1e-3)


def test_the_examples(opened, tensors):
    examples = ask(
        opened,
        "[...document.querySelectorAll('.examples li')].map((li) => "
        "[board(li.querySelector('.board')), li.querySelector('.about').innerText])",
    )
    assert len(examples) == 12
    moves, bins = model_moves(tensors)
    sums = []
    for shown, about in examples:
        tiles = [int(text) if text else 0 for text in shown]
        row = int(about.split("row ")[1].split(",")[0])
        exponents = tensors["boards"][row].astype(int)
        assert tiles == [1 << e if e else 0 for e in exponents]
        assert f"model: {'↑↓←→'[moves[row]]} {MOVES[moves[row]]}, bin " in about
        shown_bin = float(about.split(", bin ")[1].split()[0])
        assert shown_bin == pytest.approx(bins[row, moves[row]], abs=0.006)
        assert f"step {tensors['labels/step_index'][row]:,}" in about
        sums.append(sum(tiles))
    assert sums == sorted(sums)


def check_statistics(shown, x):
    """Compare a row of a key's table, quantiles left out, with NumPy on (..., H)."""
    x = x.reshape(-1, x.shape[-1])
    mean, *_, std, outliers, features = shown
    number = lambda text: float(text.strip("%").replace(",", ""))  # noqa: E731
    assert number(mean) == pytest.approx(np.sqrt((x**2).sum(axis=1)).mean(), rel=1e-3)
    assert number(std) == pytest.approx(np.sqrt(x.var(axis=0).mean()), rel=1e-3)
    assert number(outliers) == pytest.approx(100 * (abs(x) > 6).mean(), rel=0.06, abs=1e-6)
    largest = abs(x).max(axis=0)
    found = [int(text.split(":")[0]) for text in features.split(", ")]
    np.testing.assert_array_equal(largest[found], np.sort(largest)[::-1][: len(found)])


def test_the_figures_of_each_key_and_layer(opened, tensors):
    for key in ("layer_outputs", "attn_q", "attn_scores", "pooled"):
        stacked = tensors[key][:, None] if key == "pooled" else tensors[key]
        rows = ask(opened, f"numbers('{key} in numbers')")[1:]
        assert len(rows) == stacked.shape[1]
        for i, (_, *shown) in enumerate(rows):
            check_statistics(shown, stacked[:, i])
            norms = np.sqrt((stacked[:, i] ** 2).sum(axis=-1))
            quantiles = [float(text.replace(",", "")) for text in shown[1:4]]
            np.testing.assert_allclose(quantiles, np.quantile(norms, [0.05, 0.5, 0.95]), rtol=1e-3)


@pytest.mark.parametrize("split", [False, True])
def test_statistics_in_the_file_are_of_all_boards(page, make_dump, monkeypatch, split):
    path = make_dump(outputs=["resid_mid", "pooled"], layers=[3, 1], split_layers=split, stats=True)
    monkeypatch.setattr(data, "FEW_NBYTES", 1)
    write_report(path, path.with_name("report.html"))
    with_helpers(page, path.with_name("report.html"))
    dump = read_dump(path)
    for row, layer in zip(ask(page, "numbers('resid_mid in numbers')")[1:], (1, 3), strict=True):
        assert row[0] == str(layer)
        name, index = (f"resid_mid.{layer}", ()) if split else ("resid_mid", (layer // 2,))
        check_statistics(row[1:], dump.numpy(name)[(slice(None), *index)])
    check_statistics(ask(page, "numbers('pooled in numbers')")[1][1:], dump.numpy("pooled"))
    text = page.evaluate("document.getElementById('key-resid_mid').nextElementSibling.innerText")
    assert f"of all {N} boards; quantiles and cells of 1 of {N} boards" in text


@pytest.mark.parametrize(
    ("key", "axis"), [("mlp_post", 1), ("attn_scores", 2), ("final_hidden", 1)]
)
def test_the_cells(opened, tensors, key, axis):
    boards = ask(
        opened,
        f"[...figure('{key}: mean norm at each cell').querySelectorAll('.board')].map(board)",
    )
    values = tensors[key] if key != "final_hidden" else tensors[key][:, None]
    for i, shown in enumerate(boards):
        norms = np.sqrt((values[:, i] ** 2).sum(axis=-1))
        others = tuple(a for a in range(norms.ndim) if a != axis)
        expected = norms.mean(axis=others)
        np.testing.assert_allclose([float(text) for text in shown], expected, rtol=6e-3)


def test_attention_of_the_chosen_board(opened, tensors):
    pattern = tensors["attn_pattern"]
    for i in (0, 7):
        row = ask(
            opened,
            "(() => { const chosen = document.getElementById('chosen');"
            f"chosen.value = {i}; chosen.dispatchEvent(new Event('change'));"
            "return chosen.selectedOptions[0].textContent; })()",
        )
        row = int(row.removeprefix("row "))
        boards = ask(
            opened,
            "[...document.querySelectorAll('.head .board')].map((each) => board(each).map(Number))",
        )
        received = 100 * pattern[row].mean(axis=2).reshape(-1, 16)
        np.testing.assert_allclose(boards, received, atol=0.51)
        board = ask(opened, "board(document.querySelector('.chosen .board'))")
        assert [int(text or 0) for text in board] == [
            1 << int(e) if e else 0 for e in tensors["boards"][row]
        ]


def test_the_mean_patterns(opened, tensors):
    """Read a heatmap back: a small board of keys lies at the place of each query."""
    grids = ask(opened, LEVELS)
    mean = tensors["attn_pattern"].mean(axis=0)
    mean = mean.reshape(-1, *mean.shape[2:])
    assert len(grids) == len(mean)
    for grid, pattern in zip(grids, mean, strict=True):
        for query in range(16):
            for cell in range(16):
                y, x = 5 * (query // 4) + cell // 4, 5 * (query % 4) + cell % 4
                depth = 10 * np.sqrt(pattern[query, cell] / mean.max())
                assert grid[y][x] == pytest.approx(min(depth, 9.5) - 0.5, abs=0.5 + 1e-4)
        assert not np.any(grid[4::5])


def test_the_share_of_the_sink(page, make_dump, tmp_path):
    config = replace(BASE, sinks=True)
    init = save_checkpoint(tmp_path / "init", random_state_dict(config), config_json(config))
    path = make_dump(init=init, outputs=["attn_pattern"])
    write_report(path, path.with_name("sinks.html"))
    with_helpers(page, path.with_name("sinks.html"))
    sink = 1 - read_dump(path).numpy("attn_pattern").sum(axis=-1).mean(axis=(0, 3))
    for row, expected in zip(ask(page, "numbers('layer')")[1:], sink, strict=True):
        shown = [float(text.strip("%")) for text in row[1:]]
        np.testing.assert_allclose(shown, 100 * expected, atol=0.51)


def test_sections_name_the_flags_that_add_missing_values(page, make_dump):
    path = make_dump(outputs=["pooled"])
    write_report(path, path.with_name("r.html"))
    page.open(path.with_name("r.html"))
    for section, flags in WITHOUT.items():
        text = page.evaluate(f"document.getElementById('{section}').innerText")
        assert all(flag in text for flag in flags)


def test_a_policy_chooses_the_legal_move_of_the_highest_probability(page, make_dump, tmp_path):
    config = replace(BASE, head_type="action_policy", hidden=32)
    init = save_checkpoint(tmp_path / "init", random_state_dict(config), config_json(config))
    path = make_dump(init=init, outputs=["head_logits"], labels=["move_dir"], dtype="bf16")
    write_report(path, path.with_name("policy.html"))
    page.open(path.with_name("policy.html"))
    dump = read_dump(path)
    logits = dump.numpy("head_logits")
    legal = np.array([legal_moves(board) for board in dump.numpy("boards")])
    moves = np.where(legal, logits, -np.inf).argmax(axis=1)
    expected = (moves == dump.numpy("labels/move_dir")).mean()
    assert page.evaluate("document.getElementById('agreement').textContent") == f"{expected:.1%}"


def test_figures_of_some_boards_say_so(page, demo_dump, tensors, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_BOARDS", 30)
    monkeypatch.setattr(data, "MOST_NBYTES", 10 * tensors["layer_outputs"][0].size * 4)
    write_report(demo_dump, tmp_path / "some.html")
    with_helpers(page, tmp_path / "some.html")
    rows = (np.arange(30) * N // 30)[np.arange(10) * 30 // 10]
    x = tensors["layer_outputs"][rows][:, -1].reshape(-1, tensors["layer_outputs"].shape[-1])
    shown = ask(page, "numbers('layer_outputs in numbers')")[-1]
    assert float(shown[1]) == pytest.approx(np.sqrt((x**2).sum(axis=1)).mean(), rel=1e-3)
    text = page.evaluate(
        "document.getElementById('key-layer_outputs').nextElementSibling.innerText"
    )
    assert f"10 of {N} boards, evenly spaced" in text
    assert f"30 of {N} boards" in page.evaluate("document.getElementById('boards').innerText")


def test_text_of_the_file_is_text_on_the_page(page, tmp_path):
    act = "document.title='x'"
    nasty = f'<script>{act}</script><img src=x onerror="{act}">\u202e&amp;\'\0'
    path = tmp_path / "hostile.safetensors"
    tensors = {
        "boards": torch.ones(3, 16, dtype=torch.uint8),
        "indices": torch.arange(3),
        nasty: torch.ones(3, 16, 4),
        f"labels/{nasty}": torch.ones(3),
    }
    save_file(tensors, path, {"checkpoint": nasty, nasty: nasty, "tokenizer": "x" * 9999})
    write_report(path, tmp_path / "hostile.html")
    page.complaints.clear()
    page.open(tmp_path / "hostile.html")
    assert page.complaints == []
    assert page.evaluate("document.querySelectorAll('img, body script:not([src])').length") == 1
    text = page.evaluate("document.getElementById('facts').textContent")
    shown = nasty.replace("\u202e", r"\u202e").replace("\0", r"\x00")
    assert text.count(shown) >= 3
    assert "(9,999 characters)" in text
    assert page.evaluate("document.title") != "x"


@pytest.fixture(scope="module")
def short_report(make_dump):
    """Return a page with a figure of each kind."""
    keys = ["layer_outputs", "pooled", "head_probs", "attn_pattern"]
    path = make_dump(outputs=keys, layers=[0, 2], labels=["move_dir", "step_index"])
    write_report(path, path.with_name("short.html"))
    return path.with_name("short.html")


@pytest.mark.parametrize(("size", "scheme"), [(PHONE, "dark"), (DESKTOP, "light")])
def test_it_is_accessible(page, short_report, size, scheme):
    page.resize(*size)
    page.emulate(scheme=scheme)
    page.open(short_report)
    page.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
    page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text())
    violations = json.loads(
        page.evaluate("axe.run().then((found) => JSON.stringify(found.violations))")
    )
    assert [(each["id"], each["nodes"][0]["html"]) for each in violations] == []


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_is_never_wider_than_the_screen(page, demo_report, width):
    page.resize(width, 900)
    page.open(demo_report)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_light_dark_and_paper(page, demo_report):
    def background():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.emulate(scheme="light")
    page.open(demo_report)
    light = background()
    page.evaluate("document.getElementById('theme').click()")
    dark = background()
    assert dark != light
    page.emulate("print", scheme="dark")
    assert background() == light
    boards = "[...document.querySelectorAll('.board, .chosen, .examples li')]"
    assert page.evaluate(f"{boards}.every((b) => getComputedStyle(b).breakInside === 'avoid')")
    page.emulate(scheme="dark")
    page.open(demo_report)
    assert background() == dark
    page.evaluate("document.getElementById('theme').click()")
    assert background() == light


def test_a_page_is_small(make_dump, demo_report, tmp_path):
    assert demo_report.stat().st_size < 300_000
    config = replace(BASE, layers=12, heads=8, kv_heads=8, hidden=64, n_bins=34, sinks=True)
    init = save_checkpoint(tmp_path / "init", random_state_dict(config), config_json(config))
    path = make_dump(init=init, labels=["all"], n_samples=24)
    write_report(path, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 500_000
