"""StepsDataset: layouts, shards, indices, errors, and what it is used from."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alarm import interrupted_soon
from dump_activations.dataset.dataset import StepsDataset
from dump_activations.dataset.sampling import load_indices
from dump_activations.dataset.shards import Shard
from dump_activations.errors import (
    DatasetError,
    DatasetNotFoundError,
    DumpActivationsWarning,
    IndicesError,
    IndicesNotFoundError,
    InvalidArgumentError,
    StepIndexError,
)
from reference.datasets import make_dataset, naive_boards, read_dataset, write_shards

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


def test_demo_dataset(demo_dataset):
    rows = read_dataset(demo_dataset)
    ds = StepsDataset(str(demo_dataset))
    np.testing.assert_array_equal(ds.read_boards(np.arange(len(ds))), naive_boards(rows))


scalars = st.sampled_from(
    ["<u1", "<i2", ">i4", "<f4", "<f8", "<c8", "?", "S3", "<U2", "V5", "<M8[s]"]
)
shapes = st.sampled_from([(), (), (1,), (4,), (2, 3)])
BOARD_FIELDS = [
    [("board", "<u8")],
    [("board", "<u8"), ("tile_65536_mask", "<u2")],
    [("exps", "u1", (16,))],
    [("exps", "u1", (16,)), ("board", "<u8")],
]


@st.composite
def row_dtypes(draw):
    """A structured dtype with a board: any order, extra and nested fields, padding, titles."""
    others = draw(st.lists(st.tuples(scalars, shapes), max_size=6))
    fields = [(f"field {i}", *other) for i, other in enumerate(others)]
    if draw(st.booleans()):
        nested = np.dtype([("a", "u1"), ("b", "<u8")], align=draw(st.booleans()))
        fields.append(("nested", nested, draw(shapes)))
    if draw(st.booleans()):
        fields.append((("a title", "näme"), "<i4"))
    fields = draw(st.permutations(fields + draw(st.sampled_from(BOARD_FIELDS))))
    dtype = np.dtype(fields, align=draw(st.booleans()))
    if draw(st.booleans()):
        return dtype
    gaps = draw(st.lists(st.integers(0, 9), min_size=len(fields) + 1, max_size=len(fields) + 1))
    sizes = [dtype[name].itemsize for name in dtype.names]
    offsets = [sum(sizes[:i]) + sum(gaps[: i + 1]) for i in range(len(sizes))]
    formats = [dtype[name] for name in dtype.names]
    return np.dtype(
        {
            "names": dtype.names,
            "formats": formats,
            "offsets": offsets,
            "itemsize": sum(sizes) + sum(gaps),
        }
    )


@given(row_dtypes(), st.integers(1, 40), st.integers(0, 2**32), st.data())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_row_layout(tmp_path, dtype, n, seed, data):
    content = np.random.default_rng(seed).bytes(n * dtype.itemsize)
    rows = np.frombuffer(content, dtype)
    np.save(tmp_path / "steps.npy", rows)
    content = (tmp_path / "steps.npy").read_bytes()[-n * dtype.itemsize :]
    ds = StepsDataset(tmp_path)
    assert ds.dtype == dtype
    indices = data.draw(st.lists(st.integers(0, n - 1), max_size=60))
    np.testing.assert_array_equal(ds.read_boards(indices), naive_boards(rows)[indices])
    size = dtype.itemsize
    expected = b"".join(content[i * size : (i + 1) * size] for i in indices)
    assert ds.read_rows(indices).tobytes() == expected


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_format_versions(version, tmp_path):
    rows = make_dataset(tmp_path / "made", "aligned_48").rows
    with (tmp_path / "steps.npy").open("wb") as file:
        np.lib.format.write_array(file, rows, version=version)
    ds = StepsDataset(tmp_path)
    np.testing.assert_array_equal(ds.read_boards(np.arange(len(ds))), naive_boards(rows))


def test_shards_come_in_lexicographic_order(three_shards):
    directory, dataset = three_shards
    np.save(directory / "steps.npy", dataset.rows[:7])
    np.save(directory / "annotations-0.npy", np.zeros(3))
    (directory / "metadata.db").write_bytes(b"not read")
    ds = StepsDataset(directory)
    assert [shard.path.name for shard in ds.shards] == [
        "steps-10.npy",
        "steps-2.npy",
        "steps-3.npy",
    ]
    assert [shard.first for shard in ds.shards] == [0, 1000, 1001]
    assert [shard.rows for shard in ds.shards] == [1000, 1, 3999]
    indices = np.random.default_rng(1).permutation(5000)
    np.testing.assert_array_equal(ds.read_boards(indices), dataset.boards[indices])
    assert ds.read_rows(indices).tobytes() == dataset.rows[indices].tobytes()


ORDERLY = [[0], [1], [0, 1, 2], [1, 2, 3]]
GAPS = {(0, 2): 1, (1, 2, 4): 3, (2,): 1, (7, 8): 1}
DISORDERLY = [["10", "2", "3"], ["0", "00"], ["1", "01", "2"]]


def numbered_dataset(directory, numbers):
    directory.mkdir()
    for number in numbers:
        np.save(directory / f"steps-{number}.npy", np.zeros(1, [("board", "<u8")]))
    return directory


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("numbers", [*ORDERLY, ["a", "00003"]])
def test_shards_in_order_are_no_cause_for_a_warning(numbers, tmp_path):
    StepsDataset(numbered_dataset(tmp_path / "dataset", [str(n).zfill(5) for n in numbers]))


@pytest.mark.parametrize("numbers", GAPS)
def test_gaps_in_the_numbers_of_shards(numbers, tmp_path):
    directory = numbered_dataset(tmp_path / "dataset", [str(n).zfill(5) for n in numbers])
    with pytest.warns(DumpActivationsWarning, match=rf"no shard number {GAPS[numbers]} before "):
        StepsDataset(directory)


@pytest.mark.parametrize("numbers", DISORDERLY)
def test_names_that_do_not_sort_as_numbers(numbers, tmp_path):
    directory = numbered_dataset(tmp_path / "dataset", numbers)
    with pytest.warns(DumpActivationsWarning, match="in the order of their names") as warned:
        StepsDataset(directory)
    assert warned[0].filename == __file__


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


@pytest.mark.parametrize(
    "indices",
    [
        [3, 1, 3],
        (3, 1, 3),
        np.array([3, 1, 3], np.uint8),
        np.array([3, 1, 3], ">i8"),
        np.array([3, 0, 1, 0, 3, 0])[::2],
        np.array([3, 1, 3], np.uint64),
    ],
)
def test_kinds_of_indices(indices, three_shards):
    directory, dataset = three_shards
    np.testing.assert_array_equal(
        StepsDataset(directory).read_boards(indices), dataset.boards[[3, 1, 3]]
    )


@pytest.mark.parametrize("nothing", [[], np.empty(0, np.int64)])
def test_no_indices(nothing, demo_dataset):
    ds = StepsDataset(demo_dataset)
    assert ds.read_boards(nothing).shape == (0, 16)
    assert ds.read_rows(nothing).shape == (0,)


@pytest.mark.parametrize(
    ("indices", "error", "text"),
    [
        ([0, -1], StepIndexError, "step index -1 at position 1 is outside .* 14138 rows"),
        ([0, 0, 14138], StepIndexError, "step index 14138 at position 2 is outside"),
        ([2**63], IndicesError, "does not fit"),
        ([0.5], IndicesError, "integers, not float64"),
        ([True], IndicesError, "integers, not bool"),
        (["1"], IndicesError, "integers, not"),
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


def read_only():
    out = np.empty((2, 16), np.uint8)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (np.empty((3, 16), np.uint8), InvalidArgumentError),
        (np.empty((2, 17), np.uint8), InvalidArgumentError),
        (np.empty((2, 32), np.uint8)[:, ::2], InvalidArgumentError),
        (np.empty((16, 2), np.uint8).T, InvalidArgumentError),
        (read_only(), InvalidArgumentError),
        (np.empty((2, 16), np.int64), TypeError),
        (np.empty(32, np.uint8), TypeError),
        ([[0] * 16] * 2, TypeError),
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
    with pytest.raises(DatasetError, match=r"steps-3\.npy: step 4900 cannot be read: .* cut short"):
        ds.read_boards([0, 4999, 4900])
    with pytest.raises(DatasetError, match=r"steps-3\.npy: step 4900 cannot be read"):
        ds.read_rows(np.arange(5000))
    with pytest.raises(DatasetError, match=r"steps-3\.npy: truncated: the header promises 3999"):
        StepsDataset(directory)


def test_a_shard_that_was_deleted(three_shards):
    directory, dataset = three_shards
    ds = StepsDataset(directory)
    (directory / "steps-2.npy").unlink()
    np.testing.assert_array_equal(ds.read_boards([1001]), dataset.boards[[1001]])
    with pytest.raises(DatasetError, match=r"steps-2\.npy: step 1000 cannot be read: No such file"):
        ds.read_boards([1001, 1000])


def test_a_shard_that_became_unreadable(three_shards):
    directory, _ = three_shards
    ds = StepsDataset(directory)
    (directory / "steps-2.npy").chmod(0)
    privileged = os.geteuid() == 0
    if privileged:
        os.seteuid(65534)
    try:
        with pytest.raises(DatasetError, match=r"step 1000 cannot be read: Permission denied"):
            ds.read_boards([1000])
    finally:
        if privileged:
            os.seteuid(0)


def test_a_shard_that_became_something_else(three_shards):
    directory, _ = three_shards
    ds = StepsDataset(directory)
    (directory / "steps-2.npy").unlink()
    os.mkfifo(directory / "steps-2.npy")
    with pytest.raises(DatasetError, match=r"step 1000 cannot be read: not a regular file"):
        ds.read_boards([1000])
    with pytest.raises(DatasetError, match=r"steps-2\.npy: cannot be opened: not a regular file"):
        StepsDataset(directory)


def test_a_dataset_that_is_cut_short_under_a_stream(tmp_path, demo_checkpoint, monkeypatch):
    from dump_activations import stream

    # Else the first window may be read with all the others before the shard is cut.
    monkeypatch.setattr("dump_activations.pipeline.board_feed._LARGEST_WINDOW", 64)
    make_dataset(tmp_path / "dataset", "packed_46", n=5000)
    shard = tmp_path / "dataset" / "steps.npy"
    batches = stream(
        demo_checkpoint,
        tmp_path / "dataset",
        outputs=["pooled"],
        indices=np.arange(5000),
        batch_size=8,
        device="cpu",
        allow_cpu=True,
    )
    next(batches)
    os.truncate(shard, shard.stat().st_size - 46)
    with pytest.raises(DatasetError, match=r"steps\.npy: step 4999 cannot be read"):
        for _ in batches:
            pass


# Not a dataset


def test_what_is_not_a_directory_of_shards(tmp_path):
    with pytest.raises(DatasetNotFoundError, match="none: no such directory"):
        StepsDataset(tmp_path / "none")
    with pytest.raises(DatasetNotFoundError, match="no shards"):
        StepsDataset(tmp_path)
    with pytest.raises(FileNotFoundError):
        StepsDataset(tmp_path)
    (tmp_path / "steps.npy").write_bytes(b"")
    with pytest.raises(DatasetNotFoundError, match=r"steps\.npy: not a directory"):
        StepsDataset(tmp_path / "steps.npy")
    with pytest.raises(DatasetError, match=r"steps\.npy: truncated in its \.npy header"):
        StepsDataset(tmp_path)


# Processes and threads


def test_pickle(three_shards):
    directory, dataset = three_shards
    ds = pickle.loads(pickle.dumps(StepsDataset(directory)))
    assert ds.shards == StepsDataset(directory).shards
    np.testing.assert_array_equal(ds.read_boards([7]), dataset.boards[[7]])


def test_fork_during_reads_of_another_thread(three_shards):
    directory, dataset = three_shards
    ds = StepsDataset(directory)
    context = multiprocessing.get_context("fork")
    indices = np.random.default_rng(2).integers(0, 5000, 20_000)
    done = threading.Event()

    def keep_reading():
        while not done.is_set():
            ds.read_boards(indices)

    def child(results):
        results.put(ds.read_boards(indices))

    with ThreadPoolExecutor(1) as other:
        reading = other.submit(keep_reading)
        try:
            for _ in range(3):
                results = context.SimpleQueue()
                process = context.Process(target=child, args=(results,))
                process.start()
                np.testing.assert_array_equal(results.get(), dataset.boards[indices])
                process.join()
                assert process.exitcode == 0
        finally:
            done.set()
        reading.result()


def test_threads(three_shards):
    directory, dataset = three_shards
    ds = StepsDataset(directory)

    def read(seed):
        indices = np.random.default_rng(seed).integers(0, 5000, 3000)
        return np.array_equal(ds.read_boards(indices), dataset.boards[indices])

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(64)))


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(workers, three_shards):
    from torch.utils.data import DataLoader

    directory, dataset = three_shards
    ds = StepsDataset(directory)
    order = ds.sample_indices(1000, seed=1)
    loader = DataLoader(ds, batch_size=300, sampler=order, num_workers=workers)
    batches = [batch.numpy() for batch in loader]
    assert [len(batch) for batch in batches] == [300, 300, 300, 100]
    np.testing.assert_array_equal(np.concatenate(batches), dataset.boards[order])


def test_single_boards(three_shards):
    directory, dataset = three_shards
    ds = StepsDataset(directory)
    np.testing.assert_array_equal(ds[1234], dataset.boards[1234])
    for outside in (-1, 5000):
        with pytest.raises(IndexError):
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
    span = []

    def read():
        span.append(time.monotonic())
        sparse_dataset.read_boards(indices)
        span.append(time.monotonic())

    reader = threading.Thread(target=read)
    ticks = []
    reader.start()
    while reader.is_alive():
        ticks.append(time.monotonic())
    start, end = span
    margin = (end - start) / 4
    assert any(start + margin < tick < end - margin for tick in ticks)


def test_a_signal_interrupts_a_read(sparse_dataset):
    indices = sparse_dataset.sample_indices(300_000)
    out = np.full((300_000, 16), 255, np.uint8)
    with interrupted_soon():
        sparse_dataset.read_boards(indices, out=out)
    assert (out == 255).any()


# Files of indices


@pytest.mark.parametrize("dtype", ["<i8", ">i4", "u1", "<u8", "<i2"])
def test_files_of_indices(dtype, tmp_path):
    path = tmp_path / "indices.npy"
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    for saved in (array, np.asfortranarray(array), array[:, ::2]):
        np.save(path, saved)
        indices = load_indices(path)
        assert indices.dtype == np.int64
        np.testing.assert_array_equal(indices, saved.ravel())
    np.save(path, np.int64(5))
    np.testing.assert_array_equal(load_indices(str(path)), [5])


def test_no_file_of_indices(tmp_path):
    with pytest.raises(IndicesNotFoundError, match=r"none\.npy: no such file"):
        load_indices(tmp_path / "none.npy")


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.array([1.0, 2.5]), "integers, not float64"),
        (np.array([1.0, np.nan]), "integers, not float64"),
        (np.array([2.0**53]), "integers, not float64"),
        (np.zeros(3, bool), "integers, not bool"),
        (np.array(["a"]), "integers, not"),
        (np.zeros(0, np.int64), "no step indices"),
        (np.array([2**63], np.uint64), "does not fit"),
        (np.array([1, None]), "not a readable"),
    ],
)
def test_files_of_something_else(array, text, tmp_path):
    path = tmp_path / "indices.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(IndicesError, match=rf"indices\.npy: .*{text}") as caught:
        load_indices(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"garbage", b"\x93NUMPY\x01\x00\xff\xff{", pickle.dumps([1])]
)
def test_damaged_files_of_indices(content, tmp_path):
    path = tmp_path / "indices.npy"
    path.write_bytes(content)
    with pytest.raises(IndicesError, match=r"indices\.npy: ") as caught:
        load_indices(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_indices_that_claims_more_than_it_has(tmp_path):
    path = tmp_path / "indices.npy"
    with path.open("wb") as file:
        header = {"descr": "<i8", "fortran_order": False, "shape": (10**15,)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(IndicesError, match=r"indices\.npy: not a readable"):
        load_indices(path)


# Odd arguments


def test_indices_anywhere_in_memory(three_shards):
    directory, dataset = three_shards
    memory = b"x" + np.array([7, 3], np.int64).tobytes()
    unaligned = np.frombuffer(memory, np.int64, offset=1)
    assert not unaligned.flags.aligned
    np.testing.assert_array_equal(
        StepsDataset(directory).read_boards(unaligned), dataset.boards[[7, 3]]
    )


@pytest.mark.parametrize("index", [-1, 5000, 2**63, 2**70])
def test_an_item_that_is_not_there(index, three_shards):
    with pytest.raises(IndexError, match=str(index)):
        StepsDataset(three_shards[0])[index]


@pytest.mark.parametrize("n", [10**15, 2**63, 2**100])
def test_a_draw_larger_than_memory(n, three_shards):
    with pytest.raises(ValueError, match="n_samples"):
        StepsDataset(three_shards[0]).sample_indices(n)


def test_a_subclass_is_pickled_as_itself(three_shards):
    assert type(pickle.loads(pickle.dumps(Subclass(three_shards[0])))) is Subclass


class Subclass(StepsDataset):
    """A dataset that a user has added to."""
