"""Filters against Python, row by row; their samples against NumPy; located rows against a dict."""

import ast
import math
import re
import threading
import time
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alarm import interrupted_soon
from dump_activations import StepsDataset
from dump_activations.dataset import columns
from dump_activations.errors import (
    DatasetError,
    DumpActivationsWarning,
    IndicesError,
    InvalidArgumentError,
)
from reference.datasets import ROW_DTYPES, encode_rows, random_boards, write_shards

N = 203
UNSIGNED_64 = [0, 1, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1]
FLOATS = [0.0, -0.0, 1.5, -2.25, math.inf, -math.inf, math.nan]


def made_rows(layout, seed):
    """Return rows whose values are small often enough for comparisons to go both ways."""
    boards = random_boards(N, seed=seed, largest=15)
    rows = encode_rows(boards, layout, seed=seed)
    rng = np.random.default_rng(seed)
    for name in rows.dtype.names:
        if name in ("board", "exps", "tile_65536_mask"):
            continue
        dtype, shape = rows.dtype[name].base, (N, *rows.dtype[name].shape)
        small = rng.integers(0, 4, shape)
        odd = rng.choice(FLOATS if dtype.kind == "f" else [0, 1, 2], shape)
        if name == "run_id" and dtype.itemsize == 8:
            odd = rng.choice(np.array(UNSIGNED_64, np.uint64), shape)
        chosen = rng.integers(0, 3, shape)
        rows[name] = np.where(
            chosen == 0, small.astype(dtype), np.where(chosen == 1, odd.astype(dtype), rows[name])
        )
    return rows


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Return datasets of one and several layouts and shards, as (dataset, values of each row)."""
    root = tmp_path_factory.mktemp("datasets")
    made = []
    for layout in ROW_DTYPES:
        rows = made_rows(layout, seed=1)
        write_shards(root / layout, rows, [70, 0, 1, N - 71])
        made.append((StepsDataset(root / layout), values_of(rows)))
    mixed = [made_rows("packed_46", seed=2), made_rows("aligned_48", seed=3)]
    write_shards(root / "mixed", mixed[0], [N])
    np.save(root / "mixed" / "steps-00001.npy", mixed[1])
    made.append((StepsDataset(root / "mixed"), [row for rows in mixed for row in values_of(rows)]))
    return made


def values_of(rows):
    """Name the numbers of each row as a filter does, as Python's own."""
    values = []
    for row in rows:
        named = {}
        for name in rows.dtype.names:
            if row[name].shape:
                named |= {f"{name}_{i}": value.item() for i, value in enumerate(row[name])}
            else:
                named[name] = row[name].item()
        values.append(named)
    return values


@st.composite
def integers(draw, names, depth=2):
    kind = draw(st.integers(0, 2 if depth == 0 else 6))
    if kind == 0:
        return str(draw(st.one_of(st.integers(0, 4), st.sampled_from([255, 2**31, *UNSIGNED_64]))))
    if kind <= 2:
        return draw(st.sampled_from(names))
    if kind == 3:
        return f"{draw(st.sampled_from('-+~'))}({draw(integers(names, depth - 1))})"
    op = draw(st.sampled_from(["+", "-", "*", "//", "%", "&", "|"]))
    return f"({draw(integers(names, depth - 1))} {op} {draw(integers(names, depth - 1))})"


@st.composite
def floats(draw, names, small, depth=2):
    kind = draw(st.integers(0, 1 if depth == 0 else 4))
    if kind == 0 or (kind == 1 and not names):
        return str(draw(st.sampled_from([0.0, 0.1, 1.5, 2.0])))
    if kind == 1:
        return draw(st.sampled_from(names))
    if kind == 2:
        return f"({draw(st.sampled_from(small))} / {draw(st.sampled_from([*small, '2']))})"
    op = draw(st.sampled_from(["+", "-", "*", "/", "//", "%"]))
    others = st.one_of(floats(names, small, depth - 1), st.sampled_from(small))
    return f"({draw(floats(names, small, depth - 1))} {op} {draw(others)})"


@st.composite
def conditions(draw, values, depth=2):
    """Return a filter, and Python's expression of the same, where `~` of a condition is `not`."""
    if depth and draw(st.integers(0, 2)):
        kind = draw(st.sampled_from(["and", "or", "not", "&", "|", "~"]))
        left, expected = draw(conditions(values, depth - 1))
        if kind in ("not", "~"):
            return f"({kind} ({left}))", f"(not ({expected}))"
        right, other = draw(conditions(values, depth - 1))
        return f"(({left}) {kind} ({right}))", f"(({expected}) {kind} ({other}))"
    whole = [name for name, value in values.items() if isinstance(value, int)]
    fractions = [name for name, value in values.items() if isinstance(value, float)]
    small = [name for name in whole if name not in ("board", "run_id")]
    numbers = integers(whole)
    if small and draw(st.booleans()):
        numbers = floats(fractions, small)
    ops = draw(
        st.lists(st.sampled_from(["<", "<=", "==", "!=", ">", ">="]), min_size=1, max_size=2)
    )
    text = draw(numbers) + "".join(f" {op} {draw(numbers)}" for op in ops)
    return text, text


LIMITS = {"int64": (-(2**63), 2**63 - 1), "uint64": (0, 2**64 - 1)}
FAILURE = re.compile(r"where: (.*) (divides by zero|overflows (u?int64)) at step (\d+);")


@given(st.data(), st.sampled_from([8, 64, 1 << 18]))
@settings(max_examples=400)
def test_filters_mean_what_python_means(datasets, data, chunk_rows):
    ds, values = data.draw(st.sampled_from(datasets))
    where, reference = data.draw(conditions(values[0]))
    start = data.draw(st.integers(0, len(ds) - 1))
    steps = range(start, data.draw(st.integers(start + 1, len(ds))), data.draw(st.integers(1, 9)))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(columns, "CHUNK_ROWS", chunk_rows)
        warnings.simplefilter("ignore", SyntaxWarning)
        code = compile(reference, "reference", "eval")
        try:
            found = ds.find(where, slice(steps.start, steps.stop, steps.step))
        except DatasetError as error:
            assert_fails(FAILURE.match(str(error)), values, steps, code)
        else:
            assert found.dtype == np.int64
            assert found.tolist() == [step for step in steps if eval(code, {}, values[step])]


def assert_fails(failure, values, steps, code):
    """Check that Python comes to the operation at that step, and that it fails there."""
    operation, step = ast.literal_eval(failure[1]), int(failure[4])
    assert step in steps
    if failure[2] == "divides by zero":
        for expression in (operation, code):
            with pytest.raises(ZeroDivisionError):
                eval(expression, {}, values[step])
    else:
        least, most = LIMITS[failure[3]]
        assert not least <= eval(operation, {}, values[step]) <= most


@pytest.fixture(params=[8, 1 << 18])
def chunk_rows(request, monkeypatch):
    monkeypatch.setattr(columns, "CHUNK_ROWS", request.param)


@given(st.data(), st.integers(1, 300), st.integers(0, 2**64))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_filtered_samples_are_numpys(datasets, chunk_rows, data, n, seed):
    ds, values = data.draw(st.sampled_from(datasets))
    name = data.draw(st.sampled_from([name for name in values[0] if name != "board"]))
    where = f"{name} <= {data.draw(st.integers(0, 3))}"
    matches = np.flatnonzero([eval(where, {}, row) for row in values])
    rng = np.random.default_rng(seed)
    if len(matches) == 0:
        with pytest.raises(IndicesError, match=r"no row of .* matches"):
            ds.sample_indices(n, seed, where=where)
    elif n > len(matches):
        with pytest.warns(DumpActivationsWarning, match=f"{len(matches)} rows that match"):
            sampled = ds.sample_indices(n, seed, where=where)
        np.testing.assert_array_equal(sampled, matches[rng.integers(0, len(matches), n)])
    else:
        sampled = ds.sample_indices(n, seed, where=where)
        np.testing.assert_array_equal(sampled, rng.choice(matches, n, replace=False))


def test_a_filter_over_labels_and_runs(demo_dataset):
    ds = StepsDataset(demo_dataset)
    labels = ds.read_labels(range(len(ds)), "empty_cells,legal_moves,run_seed,max_in_corner")
    where = "empty_cells > 6 and legal_moves_0 == 0 and run_seed != 44 or max_in_corner == 0"
    expected = (labels["empty_cells"] > 6) & (labels["legal_moves"][:, 0] == 0)
    expected = (expected & (labels["run_seed"] != 44)) | (labels["max_in_corner"] == 0)
    np.testing.assert_array_equal(ds.find(where), np.flatnonzero(expected))
    assert 0 < expected.sum() < len(ds)


@pytest.mark.parametrize(
    "where",
    [
        "max_rank in (3, 5, 2 + 5)",
        "max_rank not in [3, -1, 5.0]",
        "0 < step_index in {4, run_id}",
        "max_rank in ()",
        "max_rank > 4\n  and max_rank < 7",
        "max_rank > 4  # late\nor\tstep_index == 0 # first",
        "max_rank != 3 and 12 // (max_rank - 3) == 4",
        "max_rank == 3 or 12 // (max_rank - 3) == 4",
        "0 != max_rank - 3 != 12 // (max_rank - 3)",
        "max_rank < 0 and (1 // 0 == 1 or board * 99 > 1)",
    ],
)
def test_lists_line_breaks_and_operations_not_reached(where, datasets):
    ds, values = datasets[0]
    expected = [step for step, row in enumerate(values) if eval(f"({where}\n)", {}, row)]
    assert ds.find(where).tolist() == expected


@pytest.mark.parametrize(
    ("where", "failure"),
    [
        ("100 // x > 7", "'100 // x' divides by zero at step 20;"),
        ("(x != 0) & (100 % x == 7)", "'100 % x' divides by zero at step 20;"),
        ("x > 1 and 1 / (x - 4) > 0", "'1 / (x - 4)' divides by zero at step 31;"),
        ("1 // 0 == 1", "'1 // 0' divides by zero at step 3;"),
        ("big + x > 0", "'big + x' overflows int64 at step 5;"),
        ("-low > 0", "'-low' overflows int64 at step 9;"),
        ("low // -1 > 0", "'low // -1' overflows int64 at step 9;"),
        ("unsigned * 2 > 0", "'unsigned * 2' overflows uint64 at step 40;"),
        ("unsigned - 1 > 0", "'unsigned - 1' overflows int64 at step 40;"),
    ],
)
def test_the_first_step_that_fails_is_named(where, failure, tmp_path, monkeypatch):
    """Although later chunks fail too, on other threads."""
    monkeypatch.setattr(columns, "CHUNK_ROWS", 8)
    names = [("x", "u1"), ("big", "<i8"), ("low", "<i8"), ("unsigned", "<u8")]
    rows = np.ones(500, [("board", "<u8"), *names])
    rows["x"][20:], rows["x"][31:] = 0, 4
    rows["big"][5::2], rows["low"][9:], rows["unsigned"][40:] = 2**63 - 1, -(2**63), 2**64 - 1
    np.save(tmp_path / "steps.npy", rows)
    ds = StepsDataset(tmp_path)
    for _ in range(10):
        with pytest.raises(DatasetError) as caught:
            ds.find(where, slice(3, None, 2) if "big" in where else slice(3, None))
        assert failure in str(caught.value)


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("", ["must be an expression"]),
        ("max_rank >=", ["max_rank >=", "invalid syntax"]),
        ("max_rank = 3", ["max_rank = 3", "write '==' for '='"]),
        ("max_rank > 3 && step_index > 1", ["write 'and' for '&&'"]),
        ("max_rank > 3 || step_index > 1", ["write 'or' for '||'"]),
        ("max_rank > 3 AND step_index > 1", ["write 'and' for 'AND'"]),
        ("!(max_rank > 3)", ["write 'not' for '!'"]),
        ("max_rank <> 3", ["write '!=' for '<>'"]),
        *((w, ["must be an expression"]) for w in ("max_rank >= 11; 1", "(" * 5000, "x > 1\0")),
        ("~" * 5000 + "max_rank > 1", ["where"]),
        (" + ".join(["max_rank"] * 5000) + " > 1", ["too long"]),
        ("__import__('os').system('true')", ["__import__", "only compares"]),
        *(
            (f"({wrong}) > 1", [wrong])
            for wrong in ("max_rank.real", "max_rank[0]", "lambda: 1", "x := 3", "max_rank ** 2")
        ),
        ("max_rank if 1 else 2", ["if 1 else 2"]),
        ("max_rank is 3", ["max_rank is 3"]),
        *((f"max_rank {of}", ["in (1, 2)"]) for of in ("in 3", "in (1, 2) in (3, 4)")),
        *((f"max_rank {of}", ["(1, 2)"]) for of in ("== (1, 2)", "in ((1, 2), 3)")),
        *((f"max_rank > {value}", [value]) for value in ("'1'", "1j")),
        ("max_rank == True", ["'True'", "1 or 0"]),
        ("max_rank / 1" + "0" * 400 + " > 1", ["below 2**64"]),
        ("max_rnk > 1", ["no 'max_rnk' (did you mean 'max_rank'?)", "branch_evs", "run_seed"]),
        ("legal_move_0 > 1", ["did you mean 'legal_moves'?"]),
        ("branch_evs > 1", ["branch_evs_0 to branch_evs_3"]),
        *((f"{name} > 1", [name]) for name in ("branch_evs_4", "branch_evs_0_0")),
        ("max_rank", ["this is a number"]),
        ("max_rank and 1 < 2", ["'max_rank': must be a condition"]),
        ("not max_rank", ["'max_rank': must be a condition"]),
        *(
            (f"(max_rank > 1) {rest}", ["parentheses"])
            for rest in ("& step_index", "+ 1 > 1", "== 1", "in (1, 2)")
        ),
        ("-(max_rank > 1) == 1", ["no sign"]),
        ("~branch_evs_0 > 1", ["~ takes"]),
        ("branch_evs_0 & 1 > 0", ["parentheses"]),
    ],
)
def test_wrong_filters(where, names, demo_dataset):
    with pytest.raises(InvalidArgumentError) as caught:
        StepsDataset(demo_dataset).find(where)
    for name in ["where", *names]:
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_empty_range(demo_dataset):
    ds = StepsDataset(demo_dataset)
    with pytest.raises(InvalidArgumentError, match=f"steps='5:5' takes no row of .* {len(ds)}"):
        ds.find("max_rank > 1", slice(5, 5))
    assert ds.find("max_rank > 99").tolist() == []


def test_a_shard_cut_short_after_it_was_opened(tmp_path):
    rows = made_rows("packed_46", seed=0)
    write_shards(tmp_path, rows, [N])
    ds = StepsDataset(tmp_path)
    path = tmp_path / "steps-00000.npy"
    path.write_bytes(path.read_bytes()[: -46 * 10 + 3])
    with pytest.raises(DatasetError, match=rf"steps-00000\.npy: step {N - 10} cannot be read"):
        ds.find("max_rank > 1")


# Rows located by their run and step, against a dict of all rows


M = 3000


def played_rows(layout, step, *, runs):
    """Return rows in no order, each another step of one of the runs."""
    rng = np.random.default_rng(0)
    rows = encode_rows(random_boards(M, seed=0), layout)
    numbers = rng.permutation(M)
    rows["run_id"] = np.array(runs, rows["run_id"].dtype)[numbers % len(runs)]
    rows[step] = 7 * (numbers // len(runs)) + 2**31
    return rows


LOCATED = [
    ("packed_46", "step_index", [5, 0, 2**32 - 1, 17]),
    ("selfplay_v1", "step_idx", [2**63 - 1, 2**63 + 5, 3, 2**64 - 1, 0]),
]


@pytest.mark.parametrize(("layout", "step", "runs"), LOCATED)
def test_rows_are_located_by_run_and_step(layout, step, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "CHUNK_ROWS", 256)
    rows = played_rows(layout, step, runs=runs)
    write_shards(tmp_path, rows, [1000, 0, M - 1000])
    ids = zip(rows["run_id"].tolist(), rows[step].tolist(), strict=True)
    expected = {(run, at): row for row, (run, at) in enumerate(ids) if run < 2**63}
    wanted = [*expected][::-3] * 2
    located = StepsDataset(tmp_path).locate(*zip(*wanted, strict=True))
    assert located.dtype == np.int64
    assert located.tolist() == [expected[each] for each in wanted]


def test_steps_that_are_missing_or_there_twice(tmp_path):
    rows = played_rows("selfplay_v1", "step_idx", runs=[2**64 - 1, 4, 9])
    rows["run_id"][10], rows["step_idx"][10] = rows["run_id"][20], rows["step_idx"][20] = 4, 1
    write_shards(tmp_path, rows, [M])
    ds = StepsDataset(tmp_path)
    there = [(4, 2**31), (9, 2**31), (9, 2**31 + 7)]
    for missing in [(4, 2), (9, 1), (-1, 2**31), (5, 2**31), (4, -1), (10, 0)]:
        with pytest.raises(IndicesError, match=rf"no rows .* are step {missing[1]} of run") as info:
            ds.locate(*zip(*there, missing, (4, 3), strict=True))
        assert str(info.value).endswith(f"of run {missing[0]}")
    with pytest.raises(IndicesError, match=r"2 rows .* are step 1 of run 4$"):
        ds.locate(*zip(*there, (4, 1), (4, 2), strict=True))


def test_wrong_runs_and_steps(tmp_path):
    write_shards(tmp_path / "a", played_rows("packed_46", "step_index", runs=[1]), [M])
    ds = StepsDataset(tmp_path / "a")
    assert ds.locate([], []).tolist() == []
    with pytest.raises(InvalidArgumentError, match="must have one length; got 2 and 1"):
        ds.locate([1, 2], [0])
    with pytest.raises(IndicesError, match="must be integers; got float64"):
        ds.locate([1.5], [0])
    rows = encode_rows(random_boards(5, seed=0, largest=15), "legacy_move")
    write_shards(tmp_path / "b", rows, [5])
    with pytest.raises(InvalidArgumentError, match=r"indices: .* has no 'step_index'"):
        StepsDataset(tmp_path / "b").locate([1], [0])
    odd = np.zeros(5, [("board", "<u8"), ("run_id", "<f4"), ("step_index", "<u4")])
    write_shards(tmp_path / "c", odd, [5])
    with pytest.raises(InvalidArgumentError, match=r"'run_id' .* must be an integer"):
        StepsDataset(tmp_path / "c").locate([1], [0])


# Scans


def test_progress_is_reported_in_the_callers_thread(demo_dataset, monkeypatch):
    monkeypatch.setattr(columns, "CHUNK_ROWS", 64)
    ds = StepsDataset(demo_dataset)
    reports = []
    report = lambda *counts: reports.append((*counts, threading.current_thread()))  # noqa: E731
    ds.find("max_rank > 1", slice(5000, None), progress=report)
    assert reports[-1] == (len(ds) - 5000, len(ds) - 5000, threading.current_thread())
    assert [done for done, _, _ in reports] == sorted(done for done, _, _ in reports)


def test_an_error_ends_a_scan(demo_dataset, monkeypatch):
    """The chunk that is read is cancelled, and those that have not begun are dropped."""
    monkeypatch.setattr(columns, "CHUNK_ROWS", 64)
    cancels, new_cancel, begun = [], columns._rust.Cancel, []
    monkeypatch.setattr(columns._rust, "Cancel", lambda: cancels.append(new_cancel()) or cancels[0])
    monkeypatch.setattr(columns, "fetch_rows", lambda *_: begun.append(time.sleep(0.01)))
    ds = StepsDataset(demo_dataset)
    with pytest.raises(ZeroDivisionError):
        ds.find("max_rank > 1", progress=lambda done, _of: done // 0)
    assert len(begun) < len(ds) // 64 // 2
    with pytest.raises(DatasetError, match="interrupted"):
        ds.read_boards([0], cancel=cancels[0])


def test_a_signal_interrupts_a_scan(demo_dataset, monkeypatch):
    threads = threading.active_count()
    monkeypatch.setattr(columns, "CHUNK_ROWS", 8)
    ds = StepsDataset(demo_dataset)
    with interrupted_soon():
        for _ in range(20):
            ds.find("merges_0 + merges_2 > 100")
    deadline = time.monotonic() + 5  # One whose start was interrupted may have to end yet.
    while threading.active_count() > threads:
        assert time.monotonic() < deadline
