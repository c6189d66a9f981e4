"""Step indices without a list, rows located by run and step, and scans that are interrupted."""

import pickle
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alarm import interrupted_soon
from dump_activations import IndicesError, InvalidArgumentError, StepsDataset
from dump_activations.dataset import columns
from dump_activations.dataset.sampling import Matches, StepRange
from reference.datasets import encode_rows, random_boards, write_shards

N = 3000


@st.composite
def matches(draw):
    """Return matches in chunks of any length, and the list of them."""
    first, rows = draw(st.integers(0, 2**40)), draw(st.integers(0, 300))
    density = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    holds = np.random.default_rng(draw(st.integers(0, 99))).random(rows) < density
    cuts = [0, *sorted(draw(st.lists(st.integers(0, rows), max_size=5))), rows]
    chunks = [
        (first + start, np.packbits(holds[start:stop]), np.count_nonzero(holds[start:stop]))
        for start, stop in pairwise(cuts)
    ]
    return Matches(chunks), [first + row for row in range(rows) if holds[row]]


ranges = st.builds(range, st.integers(0, 99), st.integers(0, 400), st.integers(1, 7))
cases = st.one_of(matches(), ranges.map(lambda steps: (StepRange(steps), list(steps))))


@given(cases, st.data())
def test_steps_read_as_a_list(case, data):
    steps, expected = case
    assert len(steps) == len(expected)
    start, stop = data.draw(st.tuples(st.integers(0, 320), st.integers(0, 320)))
    cut = steps[start:stop]
    assert cut.dtype == np.int64
    assert cut.tolist() == expected[start:stop]
    assert steps[:].tolist() == expected
    if expected:
        places = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=30))
        taken = steps.take(np.array(places, np.int64))
        assert taken.dtype == np.int64
        assert taken.tolist() == [expected[place] for place in places]


def test_a_range_takes_no_memory():
    steps = StepRange(range(3, 10**12, 2))
    assert len(steps) == (10**12 - 2) // 2
    assert steps[10**11 : 10**11 + 2].tolist() == [2 * 10**11 + 3, 2 * 10**11 + 5]


def test_a_row_takes_one_bit(tmp_path):
    rows = 100_000
    write_shards(tmp_path, np.zeros(rows, [("board", "<u8"), ("x", "u1")]), [rows])
    held = pickle.dumps(StepsDataset(tmp_path).matches("x == 0"))
    assert len(held) < rows / 8 + 1000


# Rows located by their run and step, against a dict of all rows


def made_rows(layout, step, *, runs):
    """Return rows in no order, each another step of one of the runs."""
    rng = np.random.default_rng(0)
    rows = encode_rows(random_boards(N, seed=0), layout)
    numbers = rng.permutation(N)
    rows["run_id"] = np.array(runs, rows["run_id"].dtype)[numbers % len(runs)]
    rows[step] = 7 * (numbers // len(runs)) + 2**31
    return rows


@pytest.mark.parametrize(
    ("layout", "step", "runs"),
    [
        ("packed_46", "step_index", [5, 0, 2**32 - 1, 17]),
        ("selfplay_v1", "step_idx", [2**63 - 1, 2**63 + 5, 3, 2**64 - 1, 0]),
    ],
)
def test_rows_are_located_by_run_and_step(layout, step, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "CHUNK_ROWS", 256)
    rows = made_rows(layout, step, runs=runs)
    write_shards(tmp_path, rows, [1000, 0, N - 1000])
    ids = zip(rows["run_id"].tolist(), rows[step].tolist(), strict=True)
    expected = {(run, at): row for row, (run, at) in enumerate(ids) if run < 2**63}
    wanted = [*expected][::-3] * 2
    located = StepsDataset(tmp_path).locate(*zip(*wanted, strict=True))
    assert located.dtype == np.int64
    assert located.tolist() == [expected[each] for each in wanted]


def test_steps_that_are_missing_or_there_twice(tmp_path):
    rows = made_rows("selfplay_v1", "step_idx", runs=[2**64 - 1, 4, 9])
    rows["run_id"][10], rows["step_idx"][10] = rows["run_id"][20], rows["step_idx"][20] = 4, 1
    write_shards(tmp_path, rows, [N])
    ds = StepsDataset(tmp_path)
    there = [(4, 2**31), (9, 2**31), (9, 2**31 + 7)]
    for missing in [(4, 2), (9, 1), (-1, 2**31), (5, 2**31), (4, -1), (10, 0)]:
        with pytest.raises(IndicesError, match=rf"no rows .* are step {missing[1]} of run") as info:
            ds.locate(*zip(*there, missing, (4, 3), strict=True))
        assert str(info.value).endswith(f"of run {missing[0]}")
    with pytest.raises(IndicesError, match=r"2 rows .* are step 1 of run 4$"):
        ds.locate(*zip(*there, (4, 1), (4, 2), strict=True))


def test_wrong_runs_and_steps(tmp_path):
    write_shards(tmp_path / "a", made_rows("packed_46", "step_index", runs=[1]), [N])
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
    ds.find(
        "max_rank > 1",
        progress=lambda done, of: reports.append((done, of, threading.current_thread())),
    )
    assert reports[-1] == (len(ds), len(ds), threading.current_thread())
    assert [done for done, _, _ in reports] == sorted(done for done, _, _ in reports)


def test_a_signal_interrupts_a_scan(demo_dataset, monkeypatch):
    threads = threading.active_count()
    monkeypatch.setattr(columns, "CHUNK_ROWS", 8)
    ds = StepsDataset(demo_dataset)
    with interrupted_soon():
        for _ in range(1000):
            ds.find("merges_0 + merges_2 > 100")
    for _ in range(100):  # one whose start was interrupted may have to end yet
        if threading.active_count() == threads:
            break
        time.sleep(0.05)
    assert threading.active_count() == threads
