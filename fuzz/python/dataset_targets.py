"""Targets that read datasets: shards with hostile rows, bytes selected of them, databases."""

import json
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import numpy as np

from dump_activations import _rust
from dump_activations.dataset.dataset import StepsDataset
from dump_activations.dataset.runs import DATABASE, RUN_LABELS, Runs
from dump_activations.dataset.shards import read_layout
from dump_activations.errors import DumpActivationsError

_ROWS = 5
_RUNS = (
    "CREATE TABLE runs (id INTEGER PRIMARY KEY, seed INT, steps INT, max_score INT, "
    "highest_tile INT); INSERT INTO runs VALUES (7, 1, 2, 3, 4), (9, 5, 6, 7, 8);"
)


def make_labels_target(directory: Path):
    """Read all labels of two shards, and filter by each, with the fuzzed text as their dtype."""
    directory.mkdir()
    shards = directory / "steps-0.npy", directory / "steps-1.npy"

    def run(data: bytes) -> None:
        header = b"{'fortran_order': False, 'shape': (%d,), 'descr': %s}" % (_ROWS, data)
        prefix = b"\x93NUMPY\x03\0" + len(header).to_bytes(4, "little")
        rows = bytes(range(256)) * 64
        for shard in shards:
            shard.write_bytes(prefix + header + rows)
        with suppress(DumpActivationsError):
            _read_labels(StepsDataset(directory), rows)

    return run


def _read_labels(ds: StepsDataset, rows: bytes) -> None:
    expected = np.frombuffer(rows, ds.dtype, _ROWS)
    labels = ds.read_labels(range(2 * _ROWS), "all")
    for name, values in labels.items():
        kept = expected[name].astype(values.dtype)
        assert np.array_equal(
            values, np.concatenate([kept, kept]), equal_nan=values.dtype.kind == "f"
        )
        if values.ndim == 1 and name.isidentifier():
            with suppress(DumpActivationsError):  # a keyword
                found = np.flatnonzero(values > 1)
                assert np.array_equal(ds.find(f"{name} > 1"), found)


def make_selection_target(directory: Path):
    """Select bytes of rows: the first line has the selection, the rest is the shard."""
    directory.mkdir()

    def run(data: bytes) -> None:
        line, _, shard = data.partition(b"\n")
        try:
            fields = [[(int(at), int(n)) for at, n in each] for each in json.loads(line)]
        except (ValueError, TypeError, OverflowError, RecursionError):
            return
        (directory / "steps.npy").write_bytes(shard)
        sizes = []

        def layout(path: Path, descr: str):
            found = read_layout(path, descr)
            sizes.append(found[0])
            return found

        try:
            dataset = _rust.Dataset(directory, ["steps.npy"], layout)
            selection = _rust.Selection(dataset, fields)
        except (DumpActivationsError, TypeError, OverflowError):
            return
        _read_selection(dataset, selection, fields[0], shard, *sizes)

    return run


def _read_selection(dataset, selection, fields, shard: bytes, row_nbytes: int) -> None:
    n = min(dataset.rows, 64)
    width = sum(nbytes for _, nbytes in fields)
    if n * width > 1 << 20:
        return
    read = np.empty((n, 16 + width), np.uint8)
    selection.read(np.arange(n), read)
    boards = np.empty((n, 16), np.uint8)
    parts = [np.empty((n, nbytes), np.uint8) for _, nbytes in fields]
    selection.scan((0, n), np.empty(row_nbytes * 2 + 1, np.uint8), boards, parts)
    assert (read == np.concatenate([boards, *parts], axis=1)).all()
    rows = np.frombuffer(shard, np.uint8, n * row_nbytes, _data_offset(shard))
    rows = rows.reshape(n, row_nbytes)
    for part, (offset, nbytes) in zip(parts, fields, strict=True):
        assert (part == rows[:, offset : offset + nbytes]).all()


def _data_offset(shard: bytes) -> int:
    """Return where the rows of a shard begin that the dataset took."""
    width = 2 if shard[6] == 1 else 4
    return 8 + width + int.from_bytes(shard[8 : 8 + width], "little")


def make_runs_target(directory: Path):
    """Read every column of a database that is the fuzzed bytes."""
    directory.mkdir()

    def run(data: bytes) -> None:
        (directory / DATABASE).write_bytes(data)
        _read_runs(directory)

    return run


def make_runs_schema_target(directory: Path):
    """Read every column of a sound database whose table has the fuzzed text as its SQL."""
    directory.mkdir()

    def run(data: bytes) -> None:
        with closing(sqlite3.connect(":memory:")) as database:
            database.executescript(_RUNS)
            database.execute("PRAGMA writable_schema = ON")
            sql = data.decode(errors="replace")
            kind = "view" if "view" in sql.lower() else "table"
            change = "UPDATE sqlite_master SET type = ?, rootpage = ?, sql = ?"
            database.execute(change, (kind, 0 if kind == "view" else 2, sql))
            database.commit()
            content = database.serialize()
        (directory / DATABASE).write_bytes(content)
        _read_runs(directory)

    return run


def _read_runs(directory: Path) -> None:
    runs = Runs(directory)
    for column in RUN_LABELS.values():
        with suppress(DumpActivationsError):
            runs.column(column)(np.array([9, 7]))
