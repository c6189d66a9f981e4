"""Labels against NumPy's reading of the shards, a naive game, and SQLite."""

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from dump_activations import StepsDataset
from dump_activations.dataset.columns import BOARD_LABELS
from dump_activations.errors import DatasetError, InvalidArgumentError, StepIndexError
from reference.datasets import ROW_DTYPES, make_dataset, read_dataset, write_shards
from reference.game import describe


@pytest.mark.parametrize("layout", [*ROW_DTYPES, "mixed"])
def test_all_fields_of_every_layout(layout, tmp_path):
    made = "packed_46" if layout == "mixed" else layout
    rows = make_dataset(tmp_path / "made", made, n=1000).rows
    if "run_id" in rows.dtype.names:
        rows["run_id"] >>= 1  # Larger ones do not fit into int64.
    write_shards(tmp_path / "dataset", rows, [3, 0, 997])
    if layout == "mixed":  # The fields lie elsewhere in the rows of the last shard.
        shard = tmp_path / "dataset" / "steps-00002.npy"
        np.save(shard, np.load(shard).astype(ROW_DTYPES["aligned_48"]))
    indices = np.random.default_rng(0).integers(0, 1000, 2000)
    labels = StepsDataset(tmp_path / "dataset").read_labels(indices, "all")
    assert list(labels) == [name for name in rows.dtype.names if name != "board"]
    for name, values in labels.items():
        kept = rows.dtype[name].base in (np.uint8, np.float32, np.float64)
        assert values.dtype == (rows.dtype[name].base if kept else np.int64), name
        assert values.tobytes() == rows[name][indices].astype(values.dtype).tobytes(), name


def test_byte_orders_widths_and_fields_that_are_not_numbers(tmp_path):
    fields = [("board", "<u8"), ("a", ">u2", (2, 3)), ("b", "?"), ("c", "<f2"), ("d", ">f8")]
    others = [("s", "S3"), ("z", "<c8"), ("n", [("x", "u1")]), ("t", "<M8[s]"), ("e", "u1", (0,))]
    rows = np.zeros(9, np.dtype([*fields, *others]))
    rng = np.random.default_rng(0)
    rows["a"], rows["b"] = rng.integers(0, 2**16, (9, 2, 3)), rng.integers(0, 2, 9)
    rows["c"], rows["d"] = rng.normal(size=(2, 9))
    np.save(tmp_path / "steps.npy", rows)
    ds = StepsDataset(tmp_path)
    labels = ds.read_labels(range(9), "all")
    dtypes = {"a": "i8", "b": "u1", "c": "f4", "d": "f8"}
    assert {name: values.dtype for name, values in labels.items()} == dtypes
    for name, values in labels.items():
        np.testing.assert_array_equal(values, rows[name])
    assert list(ds.read_labels([0], ["a_1_2"])) == ["a_1_2"]
    np.testing.assert_array_equal(ds.read_labels(range(9), "a_1_2")["a_1_2"], rows["a"][:, 1, 2])
    for name, dtype in [("s", "S3"), ("z", "complex64"), ("t", "datetime64"), ("e", "uint8")]:
        with pytest.raises(InvalidArgumentError, match=rf"labels: '{name}' must .*{dtype}"):
            ds.read_labels([0], name)


def test_a_name_that_is_not_printable(tmp_path):
    np.save(tmp_path / "steps.npy", np.zeros(2, [("board", "<u8"), ("a\nb", "u1"), ("c", "u1")]))
    ds = StepsDataset(tmp_path)
    assert list(ds.read_labels([0], "all")) == ["c"]
    with pytest.raises(InvalidArgumentError, match="labels"):
        ds.read_labels([0], "a\nb")


def test_a_value_that_does_not_fit_names_its_row(tmp_path):
    rows = make_dataset(tmp_path / "made", "selfplay_v1", n=40).rows
    rows["run_id"] = 2**63 - 1
    rows["run_id"][23] = 2**63 + 5
    write_shards(tmp_path / "dataset", rows, [20, 20])
    ds = StepsDataset(tmp_path / "dataset")
    assert ds.read_labels([0], "run_id")["run_id"] == [2**63 - 1]
    with pytest.raises(DatasetError, match=r"'run_id' of step 23 must fit .* 9223372036854775813"):
        ds.read_labels(range(39, -1, -1), "run_id")


def test_board_labels_are_those_of_a_naive_game(tmp_path, demo_dataset):
    """Sparse, crowded and random boards, every line of four small tiles, and real ones."""
    rng = np.random.default_rng(0)
    largest = rng.integers(1, 17, (100_000, 1))
    boards = rng.integers(0, largest + 1, (100_000, 16)).astype(np.uint8)
    boards[rng.random(boards.shape) < rng.random((100_000, 1))] = 0
    every_line = np.array(list(np.ndindex(4, 4, 4, 4)), np.uint8)
    boards[:256, :4] = every_line
    boards[256:512, 1::4] = every_line
    boards[512:515] = 0
    boards[513, :3], boards[514, :2] = [255, 0, 255], [200, 201]  # more than a packed board holds
    rows = np.zeros(len(boards), ROW_DTYPES["selfplay_v1"])
    rows["exps"] = boards
    np.save(tmp_path / "steps.npy", rows)
    for ds in (StepsDataset(tmp_path), StepsDataset(demo_dataset)):
        labels = ds.read_labels(range(len(ds)), list(BOARD_LABELS))
        described = [describe(tuple(board)) for board in ds.read_boards(range(len(ds))).tolist()]
        for name in BOARD_LABELS:
            assert labels[name].dtype == np.uint8
            np.testing.assert_array_equal(labels[name], [each[name] for each in described])


def test_run_labels_are_those_of_the_database(demo_dataset):
    ds = StepsDataset(demo_dataset)
    with sqlite3.connect(f"file:{demo_dataset}/metadata.db?mode=ro", uri=True) as database:
        runs = {run: row for run, *row in database.execute(
            "SELECT id, seed, steps, max_score, highest_tile FROM runs"
        )}  # fmt: skip
    indices = np.random.default_rng(0).integers(0, len(ds), 3000)
    rows = read_dataset(demo_dataset)[indices]
    labels = ds.read_labels(indices, "run_*")
    assert list(labels) == ["run_id", "run_seed", "run_steps", "run_max_score", "run_highest_tile"]
    expected = np.array([runs[run] for run in rows["run_id"].tolist()])
    for at, name in enumerate(["run_seed", "run_steps", "run_max_score", "run_highest_tile"]):
        assert labels[name].dtype == np.int64
        np.testing.assert_array_equal(labels[name], expected[:, at])


RUNS = "CREATE TABLE runs (id INT, seed, steps INT, max_score INT, highest_tile INT);"
ROW = "INSERT INTO runs VALUES (0, 5, 6, 7, 8);"
OTHERS = "CREATE TABLE t (a, b); INSERT INTO t VALUES ('x', 'y'); CREATE INDEX j ON t(a, b);"
# Script -> the error, or None where the runs can be read.
DATABASES = {
    "CREATE TABLE other (id INT);": "it has no table 'runs'",
    f"{RUNS.replace('runs', 'r')} CREATE VIEW runs AS SELECT * FROM r;": "no table",
    "CREATE VIRTUAL TABLE runs USING fts5(id, seed);": "it has no table 'runs'",
    "CREATE TABLE runs (id INT);": "no column 'seed', only id",
    RUNS: "is empty",
    f"{RUNS} {ROW.replace('5', repr('five'))}": "run 0 must be integers",
    f"{RUNS} {ROW.replace('0', 'zeroblob(30000000)')}": "too big",
    f"{RUNS} {ROW.replace('5', 'NULL')}": "must be integers",
    f"{RUNS} {ROW.replace('5', '1.5')}": "must be integers",
    f"{RUNS} {ROW} {ROW}": "run 0 is in it twice",
    f"{RUNS} {ROW.replace('(0', '(3')}": "steps are of run 0, but its 1 runs are numbered 3 to 3",
    f"""
        {RUNS} {ROW} {OTHERS} CREATE INDEX i ON runs(id, seed); PRAGMA writable_schema = ON;
        UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master WHERE name = 'j')
        WHERE name = 'i'; -- a damaged index
    """: None,
    RUNS + ROW.replace("(0, 5,", "(7, 1, 6, 7, 8), (0, 5, 6, 7, 8), (3, 2,"): None,
    f"{RUNS.replace('id INT', 'id INT PRIMARY KEY')[:-1]} WITHOUT ROWID; {ROW}": None,
}


def dataset_with_database(demo_dataset, directory, script):
    shutil.copytree(demo_dataset, directory, ignore=shutil.ignore_patterns("metadata.db"))
    with closing(sqlite3.connect(directory / "metadata.db")) as database:
        database.executescript(script)
    return StepsDataset(directory)


@pytest.mark.parametrize("script", DATABASES)
def test_databases(script, demo_dataset, tmp_path):
    ds = dataset_with_database(demo_dataset, tmp_path / "dataset", script)
    if DATABASES[script] is None:
        labels = ds.read_labels([0, 1], "run_id,run_seed,run_steps")
        assert [values.tolist() for values in labels.values()] == [[0, 0], [5, 5], [6, 6]]
    else:
        with pytest.raises(DatasetError, match=rf"metadata\.db: .*{DATABASES[script]}"):
            ds.read_labels([0, 1], "run_seed")


def test_files_that_are_not_databases(demo_dataset, tmp_path):
    ds = dataset_with_database(demo_dataset, tmp_path / "dataset", f"{RUNS} {ROW}")
    database = ds.path / "metadata.db"
    content = database.read_bytes()
    no_text = content.replace(b"CREATE TABLE", b"CR\xb8ATE TABLE")
    filled = content[:99] + b"\xff" * 9000
    for damaged in (b"", b"no database" * 99, content[:5000], filled, no_text):
        database.write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"metadata\.db: "):
            StepsDataset(ds.path).read_labels([0], "run_seed")
    for name in ("metadata.db-wal", "metadata.db"):
        database.write_bytes(content)
        (ds.path / name).unlink(missing_ok=True)
        os.mkfifo(ds.path / name)
        with pytest.raises(DatasetError, match=f"{name}: not an ordinary file"):
            StepsDataset(ds.path).read_labels([0], "run_seed")
        (ds.path / name).unlink()
    ds = StepsDataset(ds.path)
    assert "run_seed" not in ds.read_labels([0], "run_*")
    with pytest.raises(InvalidArgumentError, match=r"'run_seed' needs a metadata\.db .* run_id"):
        ds.read_labels([0], "run_seed")


def test_pages_that_hold_one_another(demo_dataset, tmp_path):
    page = 1 << 16
    ds = dataset_with_database(
        demo_dataset, tmp_path / "dataset", f"PRAGMA page_size = {page}; {RUNS} {ROW}"
    )
    database = tmp_path / "dataset" / "metadata.db"
    content = database.read_bytes()
    header, leaf = content[:page], content[page:]

    def interior(child):
        """Write a page of a table that holds one page 9,000 times."""
        cell = child.to_bytes(4) + b"\x01"
        cells = 9000
        start = page - len(cell) * cells
        places = b"".join((start + 5 * at).to_bytes(2) for at in range(cells))
        head = b"\x05\0\0" + cells.to_bytes(2) + start.to_bytes(2) + b"\0" + child.to_bytes(4)
        return (head + places).ljust(start, b"\0") + cell * cells

    first = header[:28] + (5).to_bytes(4) + header[32:]
    database.write_bytes(b"".join([first, interior(3), interior(4), interior(5), leaf]))
    with pytest.raises(DatasetError, match="it holds more rows than its size allows"):
        ds.read_labels([0], "run_seed")


def test_a_database_is_only_read(demo_dataset, tmp_path):
    name = tmp_path / "a dataset?mode=rwc#x%41"
    ds = dataset_with_database(demo_dataset, name, f"PRAGMA journal_mode = WAL; {RUNS} {ROW}")
    before = {path.name: path.stat().st_mtime_ns for path in name.iterdir()}
    for path in name.iterdir():
        path.chmod(0o444)
    name.chmod(0o555)
    try:
        assert ds.read_labels([0, 1], "run_seed")["run_seed"].tolist() == [5, 5]
    finally:
        name.chmod(0o755)
    assert {path.name: path.stat().st_mtime_ns for path in name.iterdir()} == before


def killed(database, *statements):
    """Run statements in a process that ends without closing the database."""
    code = "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1]); "
    code += "[c.execute(each).fetchall() for each in sys.argv[2:]]; os._exit(0)"
    subprocess.run([sys.executable, "-c", code, database, *statements], check=True)


COMMIT = ("BEGIN", "UPDATE runs SET steps = 777", "COMMIT")
FILL = "INSERT INTO z SELECT randomblob(3000) FROM runs, runs a, runs b"


def test_transactions_that_were_not_finished(demo_dataset, tmp_path):
    """As SQLite's own readers, which change the file to finish them."""
    for name, statements in {
        "wal": ("PRAGMA journal_mode = WAL", *COMMIT),
        "persist": ("PRAGMA journal_mode = PERSIST", *COMMIT),
        "hot": ("PRAGMA cache_size = 1", "CREATE TABLE z (a)", *COMMIT[:2], *[FILL] * 9),
    }.items():
        rows = "".join(ROW.replace("(0", f"({run}") for run in range(9))
        ds = dataset_with_database(demo_dataset, tmp_path / name, RUNS + rows)
        database = ds.path / "metadata.db"
        killed(database, *statements)
        assert sum(path.stat().st_size > 0 for path in ds.path.glob("metadata.db-[wj]*")) == 1
        if name == "hot":
            with pytest.raises(DatasetError, match=r"metadata\.db-journal holds an unf.* sqlite3 "):
                ds.read_labels([0], "run_steps")
            with closing(sqlite3.connect(database)) as rolled_back:
                rolled_back.execute("PRAGMA journal_mode = DELETE")
        expected = 6 if name == "hot" else 777
        assert ds.read_labels([0], "run_steps")["run_steps"] == [expected], name


def test_labels_that_are_missing(demo_dataset, tmp_path):
    ds = StepsDataset(demo_dataset)
    near = {"mve_dir": "(did you mean 'move_dir'?)", "mve*": "move_dir", "a_0": "'a_0'"}
    for name, hint in near.items():
        with pytest.raises(InvalidArgumentError) as caught:
            ds.read_labels([0], name)
        said = [f"labels: {demo_dataset} has no {name!r}", hint, "legal_moves", "run_max_score"]
        assert [text for text in said if text not in str(caught.value)] == []
    with pytest.raises(StepIndexError):
        ds.read_labels([len(ds)], "move_dir")


def test_fields_that_only_some_shards_have(tmp_path):
    np.save(tmp_path / "steps-0.npy", np.zeros(3, [("board", "<u8"), ("move", "u1"), ("y", "u1")]))
    np.save(tmp_path / "steps-1.npy", np.zeros(3, [("board", "<u8"), ("move", "i1"), ("x", "u1")]))
    ds = StepsDataset(tmp_path)
    for name, text in {
        "x": r"steps-0\.npy: its rows have no 'x', which .*steps-1\.npy",
        "y": r"steps-1\.npy: its rows have no 'y', which .*steps-0\.npy",
        "move": r"steps-1\.npy: its rows have 'move' as int8, .* uint8",
    }.items():
        for read in (lambda name: ds.read_labels([0], name), lambda name: ds.find(f"{name} > 0")):
            with pytest.raises(DatasetError, match=text):
                read(name)


def bytes_read(action):
    def count():
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    before = count()
    action()
    return count() - before


def test_labels_take_no_second_pass(tmp_path):
    rows = make_dataset(tmp_path, "packed_46", n=40_000).rows
    ds = StepsDataset(tmp_path)
    ds.read_labels([0], "all,merges")
    read = bytes_read(lambda: ds.read_labels(range(40_000), "all,merges"))
    assert rows.nbytes <= read < 1.1 * rows.nbytes
    read = bytes_read(lambda: ds.find("max_rank > 3 and merges_0 > branch_evs_2"))
    assert rows.nbytes <= read < 1.1 * rows.nbytes


# Items of a dataset


def test_items_are_boards_and_labels(demo_dataset):
    ds = StepsDataset(demo_dataset, labels=["move_dir", "branch_evs,run_seed"])
    names = ["boards", "indices", "move_dir", "branch_evs", "run_seed"]
    rows, boards = read_dataset(demo_dataset), StepsDataset(demo_dataset)
    item = ds[5]
    assert list(item) == names
    assert (item["indices"], item["move_dir"]) == (5, rows["move_dir"][5])
    np.testing.assert_array_equal(item["boards"], boards[5])
    np.testing.assert_array_equal(item["branch_evs"], rows["branch_evs"][5])
    for places in (slice(3, 40, 5), [7, 3, 7], np.array([len(ds) - 1])):
        indices = np.arange(len(ds))[places]
        items = ds[places]
        np.testing.assert_array_equal(items["indices"], indices)
        np.testing.assert_array_equal(items["boards"], boards.read_boards(indices))
        np.testing.assert_array_equal(items["move_dir"], rows["move_dir"][indices])
        np.testing.assert_array_equal(boards[places], boards.read_boards(indices))
    assert ds[-5:]["indices"].tolist() == [*range(len(ds) - 5, len(ds))]
    with pytest.raises(StepIndexError):
        ds[[0, len(ds)]]
