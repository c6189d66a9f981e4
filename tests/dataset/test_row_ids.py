"""Rows found by their self-play run and their step in it, against a dict of all rows."""

import numpy as np
import pytest

from dump_activations import IndicesError, InvalidArgumentError, StepsDataset
from dump_activations.dataset import scan
from reference.datasets import encode_rows, random_boards, write_shards

N = 3000


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
def test_rows_are_those_of_their_runs_and_steps(layout, step, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK_ROWS", 256)
    rows = made_rows(layout, step, runs=runs)
    write_shards(tmp_path, rows, [1000, 0, N - 1000])
    ids = zip(rows["run_id"].tolist(), rows[step].tolist(), strict=True)
    expected = {(run, at): row for row, (run, at) in enumerate(ids) if run < 2**63}
    wanted = [*expected][::-3] * 2
    located = StepsDataset(tmp_path).locate(*zip(*wanted, strict=True))
    assert located.dtype == np.int64
    assert located.tolist() == [expected[each] for each in wanted]


def test_rows_that_are_not_there_or_there_twice(tmp_path):
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


def test_what_names_no_rows(tmp_path):
    write_shards(tmp_path / "a", made_rows("packed_46", "step_index", runs=[1]), [N])
    ds = StepsDataset(tmp_path / "a")
    assert ds.locate([], []).tolist() == []
    with pytest.raises(InvalidArgumentError, match="indices: 2 runs, but 1 steps"):
        ds.locate([1, 2], [0])
    with pytest.raises(IndicesError, match="must be integers, not float64"):
        ds.locate([1.5], [0])
    rows = encode_rows(random_boards(5, seed=0, largest=15), "legacy_move")
    write_shards(tmp_path / "b", rows, [5])
    with pytest.raises(InvalidArgumentError, match="indices: no 'step_index' in"):
        StepsDataset(tmp_path / "b").locate([1], [0])
    odd = np.zeros(5, [("board", "<u8"), ("run_id", "<f4"), ("step_index", "<u4")])
    write_shards(tmp_path / "c", odd, [5])
    with pytest.raises(InvalidArgumentError, match=r"'run_id' .* is no whole number"):
        StepsDataset(tmp_path / "c").locate([1], [0])
