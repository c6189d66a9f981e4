"""The extension's own interface, which trusts no caller: wrong arguments are exceptions."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from dump_activations import _rust
from dump_activations.dataset.shards import read_layout
from dump_activations.errors import InvalidArgumentError
from reference.datasets import make_dataset

ROWS = 10
BOARDS = (3, 16)
EVERY_OTHER = np.s_[::2]


@pytest.fixture
def dataset(tmp_path):
    make_dataset(tmp_path, "packed_46", n=ROWS)
    return _rust.Dataset(tmp_path, ["steps.npy"], read_layout)


@pytest.fixture
def fd(tmp_path):
    descriptor = os.open(tmp_path / "span", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "layout",
    [
        (46, 8, 20),
        (46, None, None, None),
        (46, 39, None, None),
        (46, None, None, 31),
        (46, 8, 45, None),
        (-1, 8, 20, None),
        (2**63, 8, 20, None),
        (46, 2**32, None, None),
    ],
)
def test_wrong_layouts(layout, tmp_path):
    make_dataset(tmp_path, "packed_46", n=ROWS)
    with pytest.raises((TypeError, ValueError, OverflowError)):
        _rust.Dataset(tmp_path, ["steps.npy"], lambda _path, _descr: layout)


STEPS = np.array([0, 1, 2])
SHARED = np.zeros(48, np.uint8)
WRONG_READS = [
    (STEPS.astype(np.int32), np.empty(BOARDS, np.uint8)),
    (STEPS.astype(">i8"), np.empty(BOARDS, np.uint8)),
    (STEPS[:, None], np.empty(BOARDS, np.uint8)),
    (np.arange(6)[EVERY_OTHER], np.empty(BOARDS, np.uint8)),
    (STEPS, np.empty(BOARDS, np.int8)),
    (STEPS, np.empty((4, 16), np.uint8)),
    (STEPS, np.empty((3, 15), np.uint8)),
    (STEPS, np.empty((3, 0), np.uint8)),
    (STEPS, np.empty(48, np.uint8)),
    (STEPS, np.empty((6, 16), np.uint8)[EVERY_OTHER]),
    (STEPS, np.empty((16, 3), np.uint8).T),
    (STEPS, read_only(np.empty(BOARDS, np.uint8))),
    (SHARED[:24].view(np.int64), SHARED.reshape(BOARDS)),
    (np.frombuffer(bytearray(25), np.int64, 3, 1), np.empty(BOARDS, np.uint8)),
    (np.array([0, -1, 2]), np.empty(BOARDS, np.uint8)),
    (np.array([0, ROWS, 2]), np.empty(BOARDS, np.uint8)),
    (np.array([0, 2**63 - 1, -(2**63)]), np.empty(BOARDS, np.uint8)),
]


@pytest.mark.parametrize(("indices", "out"), WRONG_READS)
def test_wrong_reads(indices, out, dataset):
    with pytest.raises((TypeError, ValueError, IndexError)):
        dataset.read_boards(indices, out)
    with pytest.raises((TypeError, ValueError, IndexError)):
        dataset.read_rows(indices, out)


@pytest.mark.parametrize(
    "fields",
    [[], [[], []], [[(0, 47)]], [[(46, 1)]], [[(-1, 2)]], [[(0, 2**32)]]],
)
def test_wrong_selections(fields, dataset):
    with pytest.raises((TypeError, ValueError, OverflowError)):
        _rust.Selection(dataset, fields)


def test_selections_of_rows_of_several_layouts(tmp_path):
    for number, layout in enumerate(["packed_46", "aligned_48"]):
        rows = make_dataset(tmp_path / layout, layout, n=3).rows
        np.save(tmp_path / f"steps-{number}.npy", rows)
    dataset = _rust.Dataset(tmp_path, ["steps-0.npy", "steps-1.npy"], read_layout)
    for fields in ([[(0, 4)]], [[(0, 4)], []], [[(0, 4)], [(0, 2)]], [[(0, 4)], [(46, 4)]]):
        with pytest.raises(InvalidArgumentError):
            _rust.Selection(dataset, fields)
    _rust.Selection(dataset, [[(0, 4)], [(44, 4)]])


FIELDS = [(0, 4), (25, 1)]
SCRATCH = np.empty(46, np.uint8)
WRONG_SCANS = [
    ((8, 11), SCRATCH, BOARDS, [(3, 4), (3, 1)]),
    ((2**64 - 2, 2**64 - 1), SCRATCH, BOARDS, [(3, 4), (3, 1)]),
    ((-1, 2), SCRATCH, BOARDS, [(3, 4), (3, 1)]),
    ((0, 2), SCRATCH, BOARDS, [(3, 4), (3, 1)]),
    ((0, 3), SCRATCH, (3, 15), [(3, 4), (3, 1)]),
    ((0, 3), SCRATCH, BOARDS, [(3, 4)]),
    ((0, 3), SCRATCH, BOARDS, [(3, 4), (3, 1), (3, 1)]),
    ((0, 3), SCRATCH, BOARDS, [(3, 1), (3, 4)]),
    ((0, 3), SCRATCH, BOARDS, [(12,), (3, 1)]),
    ((0, 3), np.empty(45, np.uint8), BOARDS, [(3, 4), (3, 1)]),
    ((0, 3), np.empty(99, np.int8), BOARDS, [(3, 4), (3, 1)]),
    ((0, 3), np.empty(99, np.uint8)[EVERY_OTHER], BOARDS, [(3, 4), (3, 1)]),
    ((0, 3), read_only(np.empty(99, np.uint8)), BOARDS, [(3, 4), (3, 1)]),
    ((3, 0), SCRATCH, (0, 16), [(0, 4), (0, 1)]),
]


@pytest.mark.parametrize("case", WRONG_SCANS)
def test_wrong_scans(case, dataset):
    rows, scratch, boards, out = case
    selection = _rust.Selection(dataset, [FIELDS])
    arrays = [np.empty(shape, np.uint8) for shape in out]
    with pytest.raises((TypeError, ValueError, OverflowError)):
        selection.scan(rows, scratch, np.empty(boards, np.uint8), arrays)


def test_scans_into_wrong_arrays(dataset):
    selection = _rust.Selection(dataset, [FIELDS])
    one = np.empty((3, 1), np.uint8)
    for out in (np.empty((4, 3), np.uint8).T, np.empty((3, 8), np.uint8)[:, ::2], SHARED[:12]):
        with pytest.raises((TypeError, ValueError)):
            selection.scan((0, 3), SCRATCH, None, [out, one])
    with pytest.raises(ValueError, match="borrowed"):
        selection.scan((0, 3), SCRATCH, None, [SHARED[:12].reshape(3, 4), SHARED[9:12, None]])
    with pytest.raises(InvalidArgumentError):
        selection.read(STEPS, np.empty((3, 20), np.uint8))


@pytest.mark.parametrize("path", [None, "nul\0byte", "none", "\ud800"])
def test_wrong_paths(path, tmp_path):
    for arguments in [(path, ["steps.npy"]), (tmp_path, [path]), (tmp_path, []), (tmp_path, path)]:
        with pytest.raises((TypeError, ValueError, OSError)):
            _rust.Dataset(*arguments, read_layout)


@pytest.mark.parametrize(
    ("population", "state", "increment", "n"),
    [
        (4, 1, 1, 5),
        (0, 1, 1, 1),
        (2**63, 1, 1, 1),
        (2**64 - 1, 1, 1, 1),
        (10**12, 1, 1, 5),
        (9, -1, 1, 3),
        (9, 1, 2**128, 3),
    ],
)
def test_wrong_samples(population, state, increment, n):
    with pytest.raises((TypeError, ValueError, OverflowError)):
        _rust.shuffle_tail(population, state, increment, np.empty(n, np.int64))


@pytest.mark.parametrize(
    "out",
    [
        np.empty(2),
        np.empty((2, 1), np.int64),
        np.empty(2, ">i8"),
        np.empty(4, np.int64)[EVERY_OTHER],
        read_only(np.empty(2, np.int64)),
        np.frombuffer(bytearray(17), np.int64, 2, 1),
    ],
)
def test_samples_into_wrong_arrays(out):
    with pytest.raises((TypeError, ValueError)):
        _rust.shuffle_tail(9, 1, 1, out)


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        (b"bytes", "uint8"),
        (np.empty(4, np.int8), "uint8"),
        (np.empty((2, 2), np.uint8), "uint8"),
        (np.empty(4, np.uint8)[EVERY_OTHER], "uint8"),
        (np.zeros(4, np.uint8), "float128"),
        (np.zeros(4, np.uint8), "<f4"),
    ],
)
def test_wrong_data(data, dtype, fd):
    with pytest.raises((TypeError, ValueError)):
        _rust.write_span(fd, None, 0, data, dtype)


@pytest.mark.parametrize("offset", [-1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 0.0])
def test_spans_where_no_file_has_bytes(offset, fd):
    data = np.zeros(1 << 20, np.uint8)
    for call in (
        lambda: _rust.write_span(fd, None, offset, data[:4], "uint8"),
        lambda: _rust.write_span(fd, fd, offset, data, "uint8"),
        lambda: _rust.digest_span(fd, offset, 4, "uint8"),
        lambda: _rust.digest_span(fd, 4, offset, "uint8"),
        lambda: _rust.reserve(fd, max(offset, 2**63) if offset != -1 else offset),
    ):
        with pytest.raises((TypeError, OverflowError, OSError)):
            call()
    assert os.fstat(fd).st_size == 0


@pytest.mark.parametrize("wrong", [-1, -(2**31), 2**31 - 1])
def test_wrong_descriptors(wrong, fd):
    data = np.zeros(1 << 20, np.uint8)
    for call in (
        lambda: _rust.write_span(wrong, None, 0, data, "uint8"),
        lambda: _rust.write_span(fd, wrong, 0, data, "uint8"),
        lambda: _rust.digest_span(wrong, 0, 4, "uint8"),
        lambda: _rust.reserve(wrong, 4),
    ):
        with pytest.raises(OSError, match="Bad file descriptor"):
            call()


def test_a_descriptor_of_the_wrong_kind(tmp_path):
    directory = os.open(tmp_path, os.O_RDONLY)
    reader, writer = os.pipe()
    try:
        for descriptor in (directory, reader, writer):
            with pytest.raises(OSError, match=r"descriptor|directory|seek"):
                _rust.digest_span(descriptor, 0, 4, "uint8")
            with pytest.raises(OSError, match=r"descriptor|directory|seek"):
                _rust.write_span(descriptor, None, 0, np.zeros(4, np.uint8), "uint8")
    finally:
        for descriptor in (directory, reader, writer):
            os.close(descriptor)


def test_an_array_cannot_be_resized_while_it_is_filled():
    out = np.full(20_000_001, -1, np.int64)
    refusals = []

    def resize(_number, _frame):
        try:
            out.resize(1)
        except ValueError as error:
            refusals.append(str(error))

    before = signal.signal(signal.SIGALRM, resize)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        _rust.shuffle_tail(10**9, 1, 1, out)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert (out != -1).all()
    assert "cannot resize" in refusals[0]


LITTLE_MEMORY = """
    import resource
    import sys
    from pathlib import Path

    import numpy as np
    from dump_activations import _rust
    from dump_activations.dataset.shards import read_layout
    from dump_activations.errors import DatasetError

    def leave(megabytes):
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (megabytes << 20),) * 2)
"""


def run_with_little_memory(code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(LITTLE_MEMORY) + textwrap.dedent(code)]
    done = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_sample_without_enough_memory():
    printed = run_with_little_memory(
        """
        out = np.empty(30_000_000, np.int64)
        leave(64)
        try:
            _rust.shuffle_tail(10**9, 1, 1, out)
        except MemoryError as error:
            print(error)
        """
    )
    assert printed.startswith("cannot sample: not enough memory for ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("megabytes", [64, 160])
def test_a_read_without_enough_memory(megabytes, tmp_path):
    make_dataset(tmp_path, "packed_46", n=ROWS)
    printed = run_with_little_memory(
        """
        indices, out = np.zeros(1 << 24, np.int64), np.empty((1 << 24, 16), np.uint8)
        dataset = _rust.Dataset(sys.argv[1], ["steps.npy"], read_layout)
        leave(int(sys.argv[2]))
        try:
            dataset.read_boards(indices, out)
        except DatasetError as error:
            print(error)
        """,
        os.fspath(tmp_path),
        str(megabytes),
    )
    assert printed.startswith(f"{tmp_path}: its rows cannot be read: not enough memory for ")
    assert printed.count("\n") == 1
