"""Labels of self-play runs, from the table `runs` of the `metadata.db` next to the shards."""

import shlex
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from dump_activations.errors import DatasetError, check_ordinary
from dump_activations.remote.mirror import fetch_whole, is_mirror

DATABASE = "metadata.db"
RUN_LABELS = {
    "run_seed": "seed",
    "run_steps": "steps",
    "run_max_score": "max_score",
    "run_highest_tile": "highest_tile",
}
"""Label -> column of the table `runs`."""

# Steps of SQLite's virtual machine between two checks of its budget. The pages of a damaged table
# may form a cycle. A sound one takes fewer steps per byte, and no value in it is longer.
_STEPS = 1000
_STEPS_PER_BYTE = 16
_LONGEST_VALUE = 16 << 20


class Runs:
    """The table `runs`. A column is read when it is first needed.

    The file is not trusted: it is opened read-only, and only a plain table of integers is read.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / DATABASE
        self._columns: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def column(self, name: str) -> Callable[[NDArray[np.integer]], NDArray[np.int64]]:
        """Read a column, or raise DatasetError. Return a look-up of run ids (n,): values (n,)."""
        if name not in self._columns:
            self._columns[name] = _read_column(self.path, name)
        ids, values = self._columns[name]

        def look_up(run_ids: NDArray[np.integer]) -> NDArray[np.int64]:
            places, is_found = find_sorted(run_ids, ids)
            if not is_found.all():
                raise DatasetError(
                    f"{self.path}: steps are of run {run_ids[np.argmin(is_found)]}, but its "
                    f"{len(ids)} runs are numbered {ids[0]} to {ids[-1]} and have no such run"
                )
            return values[places]

        return look_up


def find_sorted(
    values: NDArray[np.integer], among: NDArray[np.int64]
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return the places of values among ascending ones, and which of them are there."""
    numbers = values.astype(np.int64)
    places = np.minimum(np.searchsorted(among, numbers), len(among) - 1)
    wrapped = (values >= 0) != (numbers >= 0)  # uint64 from 2**63 on
    return places, (among[places] == numbers) & ~wrapped


def _read_column(path: Path, column: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Read the ids of all runs, ascending, and the column's value for each."""
    # A program that was killed, or still writes, leaves committed rows in the -wal, and those that
    # an unfinished transaction has overwritten in the -journal.
    logs = [path.with_name(DATABASE + suffix) for suffix in ("-wal", "-journal")]
    for each in (path, *logs):
        check_ordinary(each, DatasetError)
        fetch_whole(each)
    logs = [log for log in logs if log.exists() and log.stat().st_size]
    size = sum(each.stat().st_size for each in (path, *logs))
    # SQLite ignores the logs of an immutable file, and takes no lock next to it.
    options = "mode=ro" if logs else "mode=ro&immutable=1"
    try:
        with (
            _with_its_logs(path, logs) as place,
            closing(sqlite3.connect(f"file:{quote(str(place))}?{options}", uri=True)) as database,
        ):
            database.execute("PRAGMA trusted_schema = OFF")
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
            budget = iter(range(1000 + size * _STEPS_PER_BYTE // _STEPS))
            database.set_progress_handler(lambda: next(budget, None) is None, _STEPS)
            _check_table(database, path, column)
            rows = np.fromiter(
                # An index may be damaged where the table is sound.
                database.execute(f'SELECT id, "{column}" FROM runs NOT INDEXED ORDER BY id'),
                np.dtype([("id", np.int64), ("value", np.int64)]),
            )
    except (sqlite3.Error, UnicodeDecodeError) as error:
        is_endless = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT
        reason: object = "it holds more rows than its size allows" if is_endless else error
        for log in logs:
            way_out = f"sqlite3 {shlex.quote(str(path))} 'PRAGMA journal_mode = DELETE'"
            reason = (
                f"{reason}; {log.name} holds an unfinished transaction: close the program that "
                f"writes it, or finish it with: {way_out}"
            )
        raise DatasetError(f"{path}: cannot read its runs: {reason}") from error
    ids, values = np.ascontiguousarray(rows["id"]), np.ascontiguousarray(rows["value"])
    if len(ids) == 0:
        raise DatasetError(f"{path}: its table 'runs' is empty")
    if (ids[1:] == ids[:-1]).any():
        repeated = ids[np.argmax(ids[1:] == ids[:-1])]
        raise DatasetError(f"{path}: 'id' of 'runs' must be unique; run {repeated} is in it twice")
    return ids, values


@contextmanager
def _with_its_logs(path: Path, logs: Sequence[Path]) -> Iterator[Path]:
    """Yield a path with the logs next to it: a copy, where SQLite would follow a mirror's link."""
    if not logs or not is_mirror(path):
        yield path.absolute()
        return
    with DatasetError.when(f"cannot copy {path}"), TemporaryDirectory() as directory:
        for each in (path, *logs):
            shutil.copyfile(each, Path(directory, each.name))
        yield Path(directory, path.name)


def _check_table(database: sqlite3.Connection, path: Path, column: str) -> None:
    """Refuse all but a plain table of integers: a view or a virtual table would run code."""
    kinds = database.execute("SELECT type, sql FROM sqlite_master WHERE name = 'runs'").fetchall()
    if [kind for kind, _ in kinds] != ["table"] or "virtual" in str(kinds[0][1]).lower():
        raise DatasetError(f"{path}: it has no table 'runs'")
    names = [name for _, name, *_ in database.execute("PRAGMA table_info(runs)")]
    for needed in ("id", column):
        if needed not in names:
            raise DatasetError(f"{path}: 'runs' has no column {needed!r}, only {', '.join(names)}")
    odd = database.execute(
        f"SELECT substr(id, 1, 99) FROM runs NOT INDEXED WHERE typeof(id) != 'integer' "
        f"OR typeof(\"{column}\") != 'integer' LIMIT 1"
    ).fetchone()
    if odd:
        raise DatasetError(f"{path}: 'id' and {column!r} of run {odd[0]} must be integers")
