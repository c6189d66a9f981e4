"""Step indices that are not held, against lists of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dump_activations.dataset.matches import Matches, StepRange


@st.composite
def matches(draw):
    """Return matches put in by chunks in any order, and the list of them."""
    first, rows = draw(st.integers(0, 2**40)), draw(st.integers(0, 300))
    chunk_rows = draw(st.sampled_from([8, 64, 512]))
    density = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    holds = np.random.default_rng(draw(st.integers(0, 99))).random(rows) < density
    found = Matches(first, rows, chunk_rows=chunk_rows)
    for chunk in draw(st.permutations(range(-(-rows // chunk_rows)))):
        found.put(chunk, holds[chunk * chunk_rows : (chunk + 1) * chunk_rows])
    return found, [first + row for row in range(rows) if holds[row]]


ranges = st.builds(range, st.integers(0, 99), st.integers(0, 400), st.integers(1, 7))
cases = st.one_of(matches(), ranges.map(lambda steps: (StepRange(steps), list(steps))))


@given(cases, st.data())
def test_they_read_as_a_list(case, data):
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


def test_a_row_takes_one_bit():
    matches = Matches(0, 10**9, chunk_rows=1 << 18)
    held = sum(part.nbytes for part in vars(matches).values() if isinstance(part, np.ndarray))
    assert held == pytest.approx(10**9 / 8, rel=0.001)
