"""StepsDataset: layouts, shards, indices, errors, and what it is used from."""

import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alarm import interrupted_soon
from dump_activations.dataset.dataset import StepsDataset
from dump_activations.dataset.shards import Shard
from dump_activations.errors import (
    DatasetError,
    DatasetNotFoundError,
    DumpActivationsWarning,
    IndicesError,
    InvalidArgumentError,
    StepIndexError,
)
from reference.datasets import make_dataset, naive_boards, write_shards

pytestmark = pytest.mark.filterwarnings("ignore:.*in the order of their names")

LAYOUT_NAMES = ["packed_46", "aligned_48", "legacy", "selfplay_v1"]


@pytest.fixture(params=LAYOUT_NAMES)
def layout(request, layouts):
    return layouts / request.param


@pytest.fixture
def three_shards(tmp_path):
    """Return a dataset of 5,000 random rows in shards whose names do not sort as numbers."""
    dataset = make_dataset(tmp_path / "made", "packed_46", n=5000)
    names = ["steps-10.npy", "steps-2.npy", "steps-3.npy"]
    write_shards(tmp_path / "dataset", dataset.rows, [1000, 1, 3999], names=names)
    return tmp_path / "dataset", dataset


def evict(directory):
    """Drop a dataset from the page cache, as far as the file system lets it."""
    for path in directory.iterdir():
        with path.open("rb+") as file:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# Layouts and shards


def test_every_row_layout(layout):
    expected = np.load(layout / "boards.expected.npy")
    rows = np.load(layout / "steps.npy")
    ds = StepsDataset(layout)
    assert len(ds) == len(rows)
    assert ds.dtype == rows.dtype
    assert ds.path == layout
    assert ds.shards == (Shard(layout / "steps.npy", len(rows), 0),)
    indices = np.random.default_rng(0).integers(0, len(rows), 1000)
    np.testing.assert_array_equal(ds.read_boards(indices), expected[indices])
    np.testing.assert_array_equal(ds.read_rows(indices), rows[indices])


scalars = st.sampled_from(
    ["<u1", "<i2", ">i4", "<f4", "<f8", "<c8", "?", "S3", "<U2", "V5", "<M8[s]"]
)
shapes = st.sampled_from([(), (), (1,), (4,), (2, 3)])
nested = np.dtype([("a", "u1"), ("b", "<u8")], align=True)
others = st.one_of(st.tuples(scalars, shapes), st.tuples(st.just(nested), shapes))
BOARD_FIELDS = [
    [("board", "<u8")],
    [("board", "<u8"), ("tile_65536_mask", "<u2")],
    [("exps", "u1", (16,))],
    [("exps", "u1", (16,)), ("board", "<u8")],
]


@st.composite
def row_dtypes(draw):
    """A structured dtype with a board: any order, extra and nested fields, padding, titles."""
    fields = [(f"field {i}", *other) for i, other in enumerate(draw(st.lists(others, max_size=6)))]
    titled = draw(st.sampled_from([[], [(("a title", "näme"), "<i4")]]))
    fields = draw(st.permutations([*fields, *titled, *draw(st.sampled_from(BOARD_FIELDS))]))
    dtype = np.dtype(fields, align=draw(st.booleans()))
    if draw(st.booleans()):
        return dtype
    names, formats = dtype.names, [dtype[name] for name in dtype.names]
    gaps = draw(st.lists(st.integers(0, 9), min_size=len(names) + 1, max_size=len(names) + 1))
    *offsets, end = np.cumsum(gaps) + np.cumsum([0, *(each.itemsize for each in formats)])
    spread = {"names": names, "formats": formats, "offsets": offsets, "itemsize": end}
    return np.dtype(spread)


@given(row_dtypes(), st.integers(1, 40), st.integers(0, 2**32), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_row_layout(tmp_path, dtype, n, seed, data):
    content = np.random.default_rng(seed).bytes(n * dtype.itemsize)
    rows = np.frombuffer(content, dtype)
    version = data.draw(st.sampled_from([(1, 0), (2, 0), (3, 0)]))
    with (tmp_path / "steps.npy").open("wb") as file:
        np.lib.format.write_array(file, rows, version=version)
    content = (tmp_path / "steps.npy").read_bytes()[-n * dtype.itemsize :]
    ds = StepsDataset(tmp_path)
    assert ds.dtype == dtype
    indices = data.draw(st.lists(st.integers(0, n - 1), max_size=60))
    np.testing.assert_array_equal(ds.read_boards(indices), naive_boards(rows)[indices])
    size = dtype.itemsize
    expected = b"".join(content[i * size : (i + 1) * size] for i in indices)
    assert ds.read_rows(indices).tobytes() == expected


def test_shards_come_in_lexicographic_order(three_shards):
    directory, dataset = three_shards
    np.save(directory / "steps.npy", dataset.rows[:7])
    np.save(directory / "annotations-0.npy", np.zeros(3))
    (directory / "metadata.db").write_bytes(b"not read")
    ds = StepsDataset(directory)
    assert [(shard.path.name, shard.rows, shard.first) for shard in ds.shards] == [
        ("steps-10.npy", 1000, 0),
        ("steps-2.npy", 1, 1000),
        ("steps-3.npy", 3999, 1001),
    ]
    indices = np.random.default_rng(1).permutation(5000)
    np.testing.assert_array_equal(ds.read_boards(indices), dataset.boards[indices])
    assert ds.read_rows(indices).tobytes() == dataset.rows[indices].tobytes()


def test_the_order_of_names_is_that_of_their_bytes(tmp_path):
    names = [b"steps-\xf0\x90\x80\x80.npy", b"steps-\xff.npy"]
    dataset_of(tmp_path, map(os.fsdecode, reversed(names)))
    assert [os.fsencode(shard.path.name) for shard in StepsDataset(tmp_path).shards] == names


def test_the_digest_of_the_layout(tmp_path):
    """It covers the names, the rows and their fields, and not the values."""

    def digest(name, rows):
        path = tmp_path / name
        path.parent.mkdir()
        np.save(path, rows)
        return StepsDataset(path.parent).layout_sha256

    rows, other = np.zeros(3, [("board", "<u8")]), np.zeros(3, [("board", "<u8"), ("x", "u1")])
    first = digest("a/steps-0.npy", rows)
    assert digest("b/steps-0.npy", np.ones(3, rows.dtype)) == first
    others = [digest("c/steps-00.npy", rows), digest("d/steps-0.npy", rows[:2])]
    assert len({first, *others, digest("e/steps-0.npy", other)}) == 4


def dataset_of(directory, names):
    for name in names:
        np.save(directory / name, np.zeros(1, [("board", "<u8")]))


@pytest.mark.parametrize(
    ("numbers", "warning"),
    [
        *((numbers, "") for numbers in ["0", "1", "0 1 2", "1 2 3", "a 00003"]),
        *[("0 2", "1 before"), ("1 2 4", "3 before"), ("2", "1 before"), ("7 8", "1 before")],
        *((numbers, "not their numbers") for numbers in ["10 2 3", "0 00", "1 01 2"]),
    ],
)
def test_numbers_of_shards(numbers, warning, tmp_path):
    width = 1 if "not" in warning else 5
    dataset_of(tmp_path, [f"steps-{number.zfill(width)}.npy" for number in numbers.split()])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        StepsDataset(tmp_path)
    assert len(warned) == bool(warning)
    assert all(w.filename == __file__ and warning in str(w.message) for w in warned)


def test_copies_of_shards_are_left_out(tmp_path):
    names = ["steps-00000.npy", "steps-00001.npy", "steps-a copper.npy"]
    copies = ["-00000 (1)", "-00000 copy", "-00001 - Copy", "-00000 (conflicted copy 2026-01-01)"]
    copies = [f"steps{each}.npy" for each in (*copies, "-00001.sync-conflict-20260101-12-ABC")]
    for n in range(1, len(copies) + 1):
        dataset_of(tmp_path, [*names, *copies[:n]])
        more = f" and {n - 1} more" if n > 1 else ""
        text = re.escape(f"left out {min(copies[:n])}{more}, named like copies")
        with pytest.warns(DumpActivationsWarning, match=text):
            ds = StepsDataset(tmp_path)
        assert [shard.path.name for shard in ds.shards] == names


def test_repr(demo_dataset, tmp_path):
    text = repr(StepsDataset(demo_dataset, labels="move_dir"))
    said = [str(demo_dataset), "labels=['move_dir']", "14,138 rows", "3 shards"]
    for part in [*said, "branch_evs  float32 (4,)", "steps-00001.npy  5,000 rows from step 5,000"]:
        assert part in text
    many = np.zeros(1, [("board", "<u8"), *((f"f{i}", "u1") for i in range(100))])
    for number in range(30):
        np.save(tmp_path / f"steps-{number:02}.npy", many)
    text = repr(StepsDataset(tmp_path))
    assert "89 more fields" in text
    assert "25 more shards" in text
    assert len(text.splitlines()) <= 20


def test_shards_that_differ_in_other_fields(tmp_path):
    packed = make_dataset(tmp_path / "packed", "packed_46", n=10)
    aligned = make_dataset(tmp_path / "aligned", "aligned_48", n=10)
    np.save(tmp_path / "steps-0.npy", packed.rows)
    np.save(tmp_path / "steps-1.npy", aligned.rows)
    ds = StepsDataset(tmp_path)
    both = np.concatenate([packed.boards, aligned.boards])
    np.testing.assert_array_equal(ds.read_boards(np.arange(20)[::-1]), both[::-1])
    with pytest.raises(DatasetError, match=r"steps-1\.npy: its rows have other fields"):
        ds.read_rows([0])


# Rows that are not in the page cache, and few descriptors


def test_rows_that_the_page_cache_does_not_hold(three_shards):
    directory, dataset = three_shards
    ds = StepsDataset(directory)
    for n in (50, 5000):
        evict(directory)
        indices = np.random.default_rng(n).integers(0, 5000, n)
        np.testing.assert_array_equal(ds.read_boards(indices), dataset.boards[indices])
        evict(directory)
        assert ds.read_rows(indices).tobytes() == dataset.rows[indices].tobytes()


def test_more_shards_than_descriptors(tmp_path):
    dataset = make_dataset(tmp_path / "made", "packed_46", n=600)
    write_shards(tmp_path / "dataset", dataset.rows, [1] * 600)
    evict(tmp_path / "dataset")
    code = f"""
        import resource
        import numpy as np
        from dump_activations import StepsDataset
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        ds = StepsDataset({str(tmp_path / "dataset")!r})
        np.save({str(tmp_path / "boards.npy")!r}, ds.read_boards(np.arange(600)[::-1]))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "boards.npy"), dataset.boards[::-1])


# Indices and buffers


UNALIGNED = np.frombuffer(b"x" + np.array([3, 1, 3], np.int64).tobytes(), np.int64, offset=1)


@pytest.mark.parametrize(
    "indices",
    [
        *([3, 1, 3], (3, 1, 3), np.array([3.0, 1.0, 3.0]), UNALIGNED),
        *(np.array([3, 1, 3], dtype) for dtype in ("u1", ">i8", "<u8")),
        np.array([3, 0, 1, 0, 3, 0])[::2],
    ],
)
def test_kinds_of_indices(indices, three_shards):
    directory, dataset = three_shards
    ds = StepsDataset(directory)
    np.testing.assert_array_equal(ds.read_boards(indices), dataset.boards[[3, 1, 3]])
    assert ds.read_boards(indices[:0]).shape == (0, 16)
    assert ds.read_rows(indices[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("indices", "error", "text"),
    [
        ([0, -1], StepIndexError, "step index -1 at position 1 is outside .* 14138 rows"),
        ([0, 0, 14138], StepIndexError, "step index 14138 at position 2 is outside"),
        ([2**63], IndicesError, "must fit into int64"),
        ([0.5], IndicesError, "integers; got float64"),
        ([True], IndicesError, "integers; got bool"),
        (["1"], IndicesError, "integers; got"),
        ([[1, 2]], IndicesError, "one-dimensional"),
        (3, IndicesError, "one-dimensional"),
    ],
)
def test_impossible_indices(indices, error, text, demo_dataset):
    ds = StepsDataset(demo_dataset)
    for read in (ds.read_boards, ds.read_rows):
        with pytest.raises(error, match=text):
            read(indices)


def test_boards_are_written_to_out(three_shards):
    directory, dataset = three_shards
    out = np.full((4, 16), 99, np.uint8)
    assert StepsDataset(directory).read_boards([5, 6], out=out[1:3]).base is out
    np.testing.assert_array_equal(out[1:3], dataset.boards[5:7])
    assert (out[[0, 3]] == 99).all()


@pytest.mark.parametrize(
    ("out", "error"),
    [
        *[([[0] * 16] * 2, TypeError), (np.empty((2, 16), np.int64), TypeError)],
        *[(np.empty(32, np.uint8), TypeError), (np.empty((3, 16), np.uint8), InvalidArgumentError)],
    ],
)
def test_impossible_buffers(out, error, demo_dataset):
    with pytest.raises(error):
        StepsDataset(demo_dataset).read_boards([0, 1], out=out)


# Shards that change while they are used


def test_a_shard_that_was_cut_short(three_shards):
    directory, dataset = three_shards
    ds = StepsDataset(directory)
    shard = directory / "steps-3.npy"
    os.truncate(shard, shard.stat().st_size - 46 * 100)
    np.testing.assert_array_equal(ds.read_boards([4899, 0]), dataset.boards[[4899, 0]])
    for read in (ds.read_boards, ds.read_rows):
        with pytest.raises(DatasetError, match=r"steps-3\.npy: step 4900 cannot be read: .* cut"):
            read([0, 4999, 4900])
    with pytest.raises(DatasetError, match=r"steps-3\.npy: truncated: the header promises 3999"):
        StepsDataset(directory)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (Path.unlink, "No such file"),
        (lambda path: path.chmod(0), "Permission denied"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "not a regular file"),
        (lambda path: Path(shutil.copy(path, path.parent / "x")).replace(path), "another file"),
    ],
)
def test_a_shard_that_can_no_longer_be_opened(change, reason, three_shards):
    directory, dataset = three_shards
    ds = StepsDataset(directory)
    change(directory / "steps-2.npy")
    privileged = reason == "Permission denied" and os.geteuid() == 0
    if privileged:
        os.seteuid(65534)
    try:
        with pytest.raises(DatasetError, match=rf"steps-2\.npy: step 1000 cannot .*: {reason}"):
            ds.read_boards([1001, 1000])
    finally:
        if privileged:
            os.seteuid(0)
    np.testing.assert_array_equal(ds.read_boards([1001]), dataset.boards[[1001]])


# Not a dataset


def test_directories_without_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "steps.npy").write_bytes(b"")
    for path, error, text in [
        ("~/none", DatasetNotFoundError, "none: no such directory"),
        (tmp_path / "empty", DatasetNotFoundError, "no shards"),
        (tmp_path / "empty", FileNotFoundError, "no shards"),
        ("a\0b", DatasetError, "cannot be opened"),
        (tmp_path / "steps.npy", DatasetNotFoundError, r"steps\.npy: not a directory"),
        ("~", DatasetError, rf"{tmp_path}/steps\.npy: truncated in its \.npy header"),
    ]:
        with pytest.raises(error, match=text):
            StepsDataset(path)


# Processes and threads


class Subclass(StepsDataset):
    """A dataset that a user has added to."""


def test_pickle(three_shards):
    directory, dataset = three_shards
    ds = pickle.loads(pickle.dumps(Subclass(directory, labels="move_dir")))
    assert type(ds) is Subclass
    assert ds.shards == StepsDataset(directory).shards
    assert ds[7]["move_dir"] == dataset.rows["move_dir"][7]


def test_forks_while_threads_read(three_shards):
    directory, dataset = three_shards
    ds = StepsDataset(directory)
    context = multiprocessing.get_context("fork")
    indices = np.random.default_rng(2).integers(0, 5000, 20_000)
    done = threading.Event()

    def keep_reading():
        while not done.is_set():
            np.testing.assert_array_equal(ds.read_boards(indices), dataset.boards[indices])

    def child(results):
        results.put(ds.read_boards(indices))

    with ThreadPoolExecutor(4) as threads:
        reading = [threads.submit(keep_reading) for _ in range(4)]
        try:
            for _ in range(3):
                results = context.SimpleQueue()
                context.Process(target=child, args=(results,)).start()
                np.testing.assert_array_equal(results.get(), dataset.boards[indices])
        finally:
            done.set()
        [each.result() for each in reading]


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(workers, three_shards):
    from torch.utils.data import DataLoader

    directory, dataset = three_shards
    order = StepsDataset(directory).sample_indices(1000, seed=1, where="step_index % 2 == 0")

    def batches(labels):
        ds = StepsDataset(directory, labels=labels)
        loader = DataLoader(ds, batch_size=300, sampler=order.tolist(), num_workers=workers)
        return list(loader)

    boards = batches(())
    assert [len(batch) for batch in boards] == [300, 300, 300, 100]
    np.testing.assert_array_equal(np.concatenate(boards), dataset.boards[order])
    labelled = batches("board_eval,branch_evs")
    expected = {"boards": dataset.boards, "indices": np.arange(5000)}
    expected |= {name: dataset.rows[name] for name in ("board_eval", "branch_evs")}
    for name, values in expected.items():
        seen = np.concatenate([batch[name] for batch in labelled])
        np.testing.assert_array_equal(seen, values[order])


def test_single_boards(three_shards):
    directory, dataset = three_shards
    ds = StepsDataset(directory)
    np.testing.assert_array_equal(ds[1234], dataset.boards[1234])
    for outside in (-1, 5000, 2**63, 2**70):
        with pytest.raises(IndexError, match=f"from 0 to 4999 .* got {outside}"):
            ds[outside]


@pytest.fixture
def sparse_dataset(tmp_path):
    """Return a dataset of 10^8 rows that take no space."""
    fields = [("board", "<u8"), ("tile_65536_mask", "<u2"), ("rest", "V36")]
    with (tmp_path / "steps.npy").open("wb") as file:
        header = {"descr": np.dtype(fields).descr, "fortran_order": False, "shape": (10**8,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 46 * 10**8)
    return StepsDataset(tmp_path)


def test_reading_releases_the_interpreter(sparse_dataset):
    indices = sparse_dataset.sample_indices(100_000)
    ran, seen = threading.Event(), []

    def read():
        sparse_dataset.read_boards(indices)
        seen.append(ran.is_set())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # A thread only runs once another has released the interpreter.
    try:
        reader = threading.Thread(target=read)
        reader.start()
        ran.set()
        reader.join()
    finally:
        sys.setswitchinterval(interval)
    assert seen == [True]


def test_a_signal_interrupts_a_read(sparse_dataset):
    indices = sparse_dataset.sample_indices(300_000)
    out = np.full((300_000, 16), 255, np.uint8)
    with interrupted_soon():
        sparse_dataset.read_boards(indices, out=out)
    assert (out == 255).any()
