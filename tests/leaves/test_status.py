"""Figures of a phase, from times that are given."""

from dump_activations.progress import BYTES, Phase, Status


def test_boards_with_all_their_figures():
    status = Status(Phase("", "boards", of=4000, nbytes=8 * 10**9), now=100.0)
    assert status.text() == "0/4,000 boards"
    assert status.figures(103.0) == ["3 s"]
    status.advance(1000, 4000, now=110.0)
    assert status.fraction == 0.25
    assert status.text() == "1,000/4,000 boards"
    assert status.figures(110.0) == ["10 s", "30 s left", "100 boards/s", "200 MB/s of 8.00 GB"]


def test_boards_of_an_earlier_run_count_as_done_and_not_as_fast():
    status = Status(Phase("", "boards", start=3000, of=4000), now=0.0)
    status.advance(3100, 4000, now=10.0)
    assert status.figures(10.0) == ["10 s", "1 min 30 s left", "10 boards/s"]


def test_the_rate_is_that_of_the_last_half_minute():
    status, done = Status(Phase("", "boards", of=10_000), now=0.0), 0
    for second in range(1, 101):
        done += 10 if second <= 60 else 1
        status.advance(done, 10_000, second)
    assert status.figures(100.0)[2] == "1 boards/s"


def test_a_download():
    status = Status(Phase("downloading hf://a/b", BYTES), now=0.0)
    status.advance(1_500_000, 0, now=2.0)
    assert status.fraction is None
    assert status.text() == "downloading hf://a/b: 1.50 MB"
    assert status.figures(2.0) == ["2 s", "750 kB/s"]
    status.advance(3_000_000, 6_000_000, now=4.0)
    assert status.text() == "downloading hf://a/b: 3.00 MB/6.00 MB"
    assert status.figures(4.0) == ["4 s", "4 s left", "750 kB/s"]


def test_what_is_not_counted():
    status = Status(Phase("loading the checkpoint"), now=0.0)
    assert status.text() == "loading the checkpoint"
    assert status.figures(3700.0) == ["1 h 1 min"]
