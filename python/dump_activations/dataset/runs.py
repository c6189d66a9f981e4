"""What `metadata.db` beside the shards says of the runs that the steps are of."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from dump_activations.errors import DatasetError
from dump_activations.paths import check_ordinary

DATABASE = "metadata.db"

# Steps of SQLite's machine between two looks at whether it takes too many.
_STEPS = 1000
# A sound table takes fewer for each byte, and no value is longer; in a damaged one, pages may hold
# one another.
_STEPS_PER_BYTE = 16
_LONGEST_VALUE = 16 << 20


class Runs:
    """The table `runs` of a database, each column loaded when it is first asked for.

    The file is not trusted: it is opened read-only and as it is, whatever lies beside it, and of
    its schema only a plain table is read.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / DATABASE
        self._columns: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @property
    def exists(self) -> bool:
        """Whether there is such a file."""
        return self._path.exists()

    def load(self, column: str) -> None:
        """Read a column.

        Raises:
            DatasetError: the database is damaged, or has no such table, column or whole numbers.
        """
        if column not in self._columns:
            self._columns[column] = _read_column(self._path, column)

    def join(self, column: str, run_ids: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the column's value, int64 (n,), of the run of each id.

        Raises:
            DatasetError: there is no such run.
        """
        ids, values = self._columns[column]
        places = np.minimum(np.searchsorted(ids, run_ids.astype(np.int64)), len(ids) - 1)
        found = ids[places] == run_ids
        if not found.all():
            raise DatasetError(
                f"{self._path}: no run {run_ids[np.argmin(found)]}, which steps are of; it has "
                f"{len(ids)} runs, {ids[0]} to {ids[-1]}"
            )
        joined: NDArray[np.int64] = values[places]
        return joined


def _read_column(path: Path, column: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Read the ids of all runs, ascending, and a column's value for each."""
    check_ordinary(path, DatasetError)
    address = f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(address, uri=True)) as database:
            database.execute("PRAGMA trusted_schema = OFF")
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
            looks = iter(range(1000 + path.stat().st_size * _STEPS_PER_BYTE // _STEPS))
            database.set_progress_handler(lambda: next(looks, None) is None, _STEPS)
            _check_table(database, path, column)
            rows = np.fromiter(
                database.execute(f'SELECT id, "{column}" FROM runs NOT INDEXED ORDER BY id'),
                np.dtype([("id", np.int64), ("value", np.int64)]),
            )
    except (sqlite3.Error, UnicodeDecodeError) as error:
        endless = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT
        reason = "it holds more rows than its size allows" if endless else error
        raise DatasetError(f"{path}: its runs cannot be read: {reason}") from error
    ids, values = np.ascontiguousarray(rows["id"]), np.ascontiguousarray(rows["value"])
    if len(ids) == 0:
        raise DatasetError(f"{path}: its table 'runs' is empty")
    if (ids[1:] == ids[:-1]).any():
        raise DatasetError(f"{path}: run {ids[np.argmax(ids[1:] == ids[:-1])]} is in it twice")
    return ids, values


def _check_table(database: sqlite3.Connection, path: Path, column: str) -> None:
    """Refuse what is no plain table of whole numbers: a view or a virtual table would run code."""
    kinds = database.execute("SELECT type, sql FROM sqlite_master WHERE name = 'runs'").fetchall()
    if [kind for kind, _ in kinds] != ["table"] or "virtual" in str(kinds[0][1]).lower():
        raise DatasetError(f"{path}: it has no table 'runs'")
    names = [name for _, name, *_ in database.execute("PRAGMA table_info(runs)")]
    for wanted in ("id", column):
        if wanted not in names:
            raise DatasetError(f"{path}: 'runs' has no column {wanted!r}, only {', '.join(names)}")
    odd = database.execute(
        f"SELECT substr(id, 1, 99) FROM runs NOT INDEXED WHERE typeof(id) != 'integer' "
        f"OR typeof(\"{column}\") != 'integer' LIMIT 1"
    ).fetchone()
    if odd:
        raise DatasetError(f"{path}: run {odd[0]} has no whole number as its 'id' or {column!r}")
