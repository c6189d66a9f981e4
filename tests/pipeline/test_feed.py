"""Boards that are read ahead, in windows."""

from types import SimpleNamespace

import numpy as np
import pytest
from simulated.checks import AtOnce

from dump_activations import StepsDataset
from dump_activations.errors import VocabularyError
from dump_activations.pipeline import feed as feed_module
from dump_activations.progress import Stopwatch
from reference.datasets import encode_rows, random_boards

N = 200


@pytest.fixture
def boards():
    return random_boards(N, seed=1, largest=15)


@pytest.fixture
def feed(boards, tmp_path, monkeypatch):
    """Return a feed of all boards of a dataset; windows are of 20 boards at most."""
    monkeypatch.setattr(feed_module, "_LARGEST_WINDOW", 20)

    def begin(batch_size, ranges=None):
        np.save(tmp_path / "steps.npy", encode_rows(boards, "selfplay_v1"))
        plan = SimpleNamespace(
            dataset=StepsDataset(tmp_path),
            indices=np.arange(N),
            labels=None,
            options=SimpleNamespace(batch_size=batch_size),
            model=SimpleNamespace(config=SimpleNamespace(input_vocab_size=16)),
        )
        watches = {"reading": Stopwatch(), "waiting": Stopwatch()}
        return feed_module.feed_boards(plan, ranges, **watches)

    return begin


@pytest.mark.parametrize("batch_size", [1, 7, 20, 21, 150, 300])
@pytest.mark.parametrize("first", [0, 1])
def test_batches_are_whole_whatever_the_largest_window(first, batch_size, feed, boards):
    start = first * batch_size
    batches = [*feed(batch_size=batch_size, ranges=[range(start, N)])]
    assert [batch.first_row for batch in batches] == [*range(start, N, batch_size)]
    for batch in batches:
        rows = np.arange(N)[batch.first_row : batch.first_row + batch_size]
        assert np.array_equal(batch.indices, rows)
        assert np.array_equal(batch.boards_BS, boards[rows])


@pytest.fixture
def read(monkeypatch):
    """Let reads be done when they are asked for; return the list of their lengths."""
    lengths = []
    read_boards = StepsDataset.read_boards

    def remember(self, indices, *arguments, **options):
        lengths.append(len(indices))
        return read_boards(self, indices, *arguments, **options)

    monkeypatch.setattr(feed_module, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(StepsDataset, "read_boards", remember)
    return lengths


def test_how_many_boards_are_read_ahead(read, feed):
    """At the start as many boards as the largest window has, later no more than two of them."""
    for batch in feed(batch_size=2):
        done = batch.first_row + 2
        assert min(done + 18, N) <= sum(read) <= done + 20 + 2 * 20
    assert sum(read) == N


def test_at_most_one_range_is_pulled_ahead(read, feed):
    """A range may be a shard that another process could take; its boards are read meanwhile."""
    rows = [range(100, 104), range(0, 2), range(2, 3), range(50, 80), range(4, 6), range(7, 9)]
    taken = []

    def ranges():
        for each in rows:
            taken.append(each)
            yield each

    for batch in feed(batch_size=2, ranges=ranges()):
        at = next(i for i, each in enumerate(rows) if batch.first_row in each)
        ahead = rows[at + 1 : at + 2]
        if at != 3:  # Of the long one, not all is read yet.
            assert taken == rows[: at + 1] + ahead
            assert sum(read) > sum(map(len, rows[: at + 1])) or not ahead
        assert len(taken) <= at + 2
    assert sum(read) == sum(map(len, rows))


def test_an_exponent_outside_is_told_as_soon_as_it_is_read(read, feed, boards):
    boards[19, 3] = 16
    boards[[18, 150], 5] = 17
    batches = feed(batch_size=1)
    with pytest.raises(
        VocabularyError, match=r"step 18: exponent 17 .*\(as in 2 of the 20 boards from row 5 on\)"
    ):
        next(batches)
    assert read == [1, 4, 16, 20]  # the windows, and once more to count


@pytest.mark.parametrize(
    ("largest", "counted"),
    [(1000, "3 of the 160 boards from row 40 on"), (20, "1 of the 20 boards from row 56 on")],
)
def test_exponents_outside_are_counted_where_that_is_cheap(
    largest, counted, feed, boards, monkeypatch
):
    boards[[60, 130, 199], 0] = 16
    monkeypatch.setattr(feed_module, "_LARGEST_WINDOW", largest)
    with pytest.raises(
        VocabularyError, match=rf"step 60: .*\(as in {counted}.*where='max_exponent < 16'"
    ):
        for _ in feed(batch_size=8):
            pass
