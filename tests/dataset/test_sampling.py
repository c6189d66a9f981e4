"""Sampled step indices equal NumPy's, and those without a list read as one."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alarm import interrupted_soon
from dump_activations import _rust
from dump_activations.dataset import sampling
from dump_activations.dataset.dataset import StepsDataset
from dump_activations.dataset.sampling import StepRange
from dump_activations.errors import DatasetError, InvalidArgumentError
from reference.datasets import write_shards

SAMPLES = Path(__file__).parents[1] / "data" / "samples"

seeds = st.one_of(st.integers(0, 2**32), st.integers(0, 2**200))


def numpy_sample(rows, n, seed, *, replace=False):
    rng = np.random.default_rng(seed)
    if replace:
        return rng.integers(0, rows, size=n, dtype=np.int64)
    return rng.choice(rows, size=n, replace=False)


@st.composite
def small_samples(pick):
    """Any n, and n around the fiftieth of the rows at which NumPy changes its method."""
    rows = pick(st.one_of(st.integers(1, 300), st.integers(9_900, 10_100), st.integers(1, 200_000)))
    edge = min(max(rows // 50 + pick(st.integers(-2, 2)), 1), rows)
    return rows, pick(st.one_of(st.just(edge), st.just(rows), st.integers(1, rows)))


@given(small_samples(), seeds)
@settings(deadline=None)
def test_samples_of_any_share(sizes, seed):
    np.testing.assert_array_equal(sampling.sample(*sizes, seed), numpy_sample(*sizes, seed))


@pytest.mark.parametrize(
    ("rows", "n"),
    [
        (2_000_000, 40_000),  # the most that NumPy samples by Floyd's method
        (2_000_000, 40_001),  # the fewest that it samples by a shuffle
        (2_000_000, 1_999_999),
        (2_000_000, 2_000_000),
        (10**10, 300_000),
    ],
)
def test_long_samples(rows, n):
    np.testing.assert_array_equal(sampling.sample(rows, n, 5), numpy_sample(rows, n, 5))


@pytest.mark.parametrize("name", ["vectors.txt", "digests.txt"])
def test_committed_samples(name):
    for line in (SAMPLES / name).read_text().splitlines()[1:]:
        call, values = line.split(": ")
        seed, _, _, rows, n = call.split()
        sample = sampling.sample(int(rows), int(n), int(seed, 16)).astype(np.uint64)
        if name == "digests.txt":
            sample = np.sum(np.arange(1, len(sample) + 1, dtype=np.uint64) * sample, keepdims=True)
        assert sample.tolist() == [int(value) for value in values.split()], call


def test_indices_of_a_dataset(demo_dataset):
    ds = StepsDataset(demo_dataset)
    for n, seed in [(4096, 42), (7, 0), (np.int32(7), np.uint64(2**64 - 1))]:
        indices = ds.sample_indices(n, seed)
        assert indices.dtype == np.int64
        np.testing.assert_array_equal(indices, numpy_sample(len(ds), n, seed))


def test_more_samples_than_rows_repeat_rows(demo_dataset):
    ds = StepsDataset(demo_dataset)
    n = len(ds) + 1
    with pytest.warns(UserWarning, match=rf"{len(ds)} rows, .* {n} samples: sampled with repl"):
        indices = ds.sample_indices(n, seed=3)
    np.testing.assert_array_equal(indices, numpy_sample(len(ds), n, 3, replace=True))
    assert len(ds.sample_indices(len(ds))) == len(ds)  # no warning, which would be an error


@pytest.mark.parametrize(
    ("n", "seed", "error", "text"),
    [
        *((n, 0, InvalidArgumentError, f"got {n}") for n in (0, -5)),
        *((n, 0, InvalidArgumentError, "must fit into memory") for n in (10**15, 2**63, 2**100)),
        (5, -1, InvalidArgumentError, "got -1"),
        *((n, seed, TypeError, None) for n, seed in [(1.0, 0), (5, 0.5), ("5", 0)]),
    ],
)
def test_impossible_samples(n, seed, error, text, demo_dataset):
    with pytest.raises(error, match=text):
        StepsDataset(demo_dataset).sample_indices(n, seed=seed)


def test_a_dataset_without_rows(tmp_path):
    np.save(tmp_path / "steps.npy", np.zeros(0, [("board", "<u8")]))
    with pytest.raises(DatasetError, match="no rows"):
        StepsDataset(tmp_path).sample_indices(1)


def test_a_signal_interrupts_a_sample():
    out = np.full(20_000_001, -1, np.int64)
    state = np.random.default_rng(0).bit_generator.state["state"]
    with interrupted_soon():
        _rust.shuffle_tail(10**9, state["state"], state["inc"], out)
    assert (out == -1).any()


# Step indices without a list


def test_a_range_takes_no_memory():
    steps = StepRange(range(3, 10**12, 2))
    assert len(steps) == (10**12 - 2) // 2
    assert steps[10**11 : 10**11 + 2].tolist() == [2 * 10**11 + 3, 2 * 10**11 + 5]


def test_a_row_takes_one_bit(tmp_path):
    rows = 100_000
    write_shards(tmp_path, np.zeros(rows, [("board", "<u8"), ("x", "u1")]), [rows])
    held = pickle.dumps(StepsDataset(tmp_path).matches("x == 0"))
    assert len(held) < rows / 8 + 1000
