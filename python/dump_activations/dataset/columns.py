"""Named values of rows: fields, labels by the rules of the game, and labels from `metadata.db`.

Shape letters: N rows, S cells (16).
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dump_activations import _rust
from dump_activations.dataset import game
from dump_activations.dataset.runs import DATABASE, RUN_LABELS, Runs
from dump_activations.dataset.shards import fetch_rows, note_transfer, row_dtype
from dump_activations.dtypes import CELLS, MOVES
from dump_activations.errors import (
    DatasetError,
    InvalidArgumentError,
    did_you_mean,
    note,
    option,
    printable,
)
from dump_activations.interrupts import in_parallel
from dump_activations.progress import Count

_T = TypeVar("_T")

Values = dict[str, NDArray[Any]]
"""Name -> values of rows, first axis N."""

ALL = "all"
"""Stands for every field of the rows but `board`."""

BOARD_LABELS: dict[str, tuple[tuple[int, ...], Callable[[NDArray[Any]], NDArray[Any]]]] = {
    "empty_cells": ((), game.empty_cells),
    "max_exponent": ((), game.max_exponent),
    "max_in_corner": ((), game.max_in_corner),
    "legal_moves": ((MOVES,), game.legal_moves),
    "merges": ((MOVES,), game.merges),
}
"""Label -> shape of one row's value, and cells uint8 (16, N) -> uint8 (N, *shape)."""

LABEL_TEXTS = {
    "run_id": "number of the self-play run",
    "step_index": "moves made in the run before the board",
    "step_idx": "moves made in the run before the board",
    "board": "the board, 4 bits per cell",
    "board_eval": "the player's evaluation of the board",
    "tile_65536_mask": "cells with a tile of 65536 or more, one bit each",
    "move_dir": "played move: 0 up, 1 down, 2 left, 3 right",
    "move": "played move: 0 up, 1 down, 2 left, 3 right",
    "valuation_type": "unit of branch_evs, by its place in valuation_types.json",
    "ev_legal": "legal moves: bits 0 to 3 are up, down, left, right",
    "max_rank": "largest exponent, as recorded",
    "seed": "seed that the row records",
    "branch_evs": "recorded value of up, down, left and right",
    "ev_values": "recorded value of up, down, left and right",
    "exps": "exponents of the 16 cells",
    "empty_cells": "number of empty cells",
    "max_exponent": "largest exponent: 11 for the tile 2048",
    "max_in_corner": "1 if a largest tile is in a corner",
    "legal_moves": "1 where up, down, left and right change the board",
    "merges": "pairs that up, down, left and right merge",
    "run_seed": "seed of the run, from metadata.db",
    "run_steps": "moves of the run, from metadata.db",
    "run_max_score": "highest score of the run, from metadata.db",
    "run_highest_tile": "largest tile of the run, from metadata.db",
}
"""Column -> its content in a few words, for the fields that datasets usually have."""

_INT64_MAX = np.iinfo(np.int64).max
# Bytes of rows read at once by a scan: no row is larger, and a core's level 2 cache holds them.
_SCRATCH = 1 << 20
# Rows of a chunk of a scan: their columns stay in a core's cache, and the interpreter's share of
# the time is small.
CHUNK_ROWS = 1 << 18


@dataclass(frozen=True)
class Column:
    """A named value of every row.

    `compute` takes the values (N, ...) of the field `source`, or cells uint8 (16, N) where that is
    None, and returns values (N, *shape).
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    source: str | None
    compute: Callable[[NDArray[Any]], NDArray[Any]]


class Columns:
    """The columns of a dataset, by name."""

    def __init__(self, dataset: _rust.Dataset) -> None:
        self.dataset = dataset
        self._runs = Runs(dataset.path)

    @cached_property
    def layouts(self) -> list[tuple[Path, np.dtype[np.void]]]:
        """Each distinct layout of rows: the first shard that has it, and the rows' dtype."""
        first: dict[str, Path] = {}
        for descr, (path, *_) in zip(self.dataset.descrs, self.dataset.shards, strict=True):
            first.setdefault(descr, path)
        return [(path, row_dtype(path, descr)) for descr, path in first.items()]

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the first shard's fields."""
        return self.layouts[0][1].names or ()

    def _fields_of_later_shards(self) -> list[str]:
        names = {name: None for _, row in self.layouts[1:] for name in row.names or ()}
        return [name for name in names if name not in self.fields]

    @property
    def names(self) -> list[str]:
        """All names, except elements of arrays."""
        of_runs = RUN_LABELS if self._runs.path.exists() and "run_id" in self.fields else ()
        return list(dict.fromkeys([*self.fields, *BOARD_LABELS, *of_runs]))

    def find(self, name: str, *, of: str) -> Column:
        """Return a column, or an element such as `branch_evs_0`. Errors name the option `of`."""
        if (column := self._whole(name, of=of)) is not None:
            return column
        element = re.fullmatch(r"(.+?)((?:_[0-9]+)+)", name)
        if element and (array := self._whole(element[1], of=of)) is not None:
            place = tuple(int(number) for number in element[2][1:].split("_"))
            if len(place) == len(array.shape) and all(map(int.__lt__, place, array.shape)):
                at: Any = (slice(None), *place)
                return replace(array, shape=(), compute=lambda values: array.compute(values)[at])
        raise self._missing(name, of=of)

    def _whole(self, name: str, *, of: str) -> Column | None:
        if (dtype := self._field(name)) is not None:
            return Column(dtype.base, dtype.shape, name, lambda values: values)
        if name in BOARD_LABELS:
            shape, compute = BOARD_LABELS[name]
            return Column(np.dtype(np.uint8), shape, None, compute)
        if name not in RUN_LABELS:
            return None
        run_id = self._field("run_id")
        if run_id is None or run_id.kind not in "iu" or not self._runs.path.exists():
            raise InvalidArgumentError(
                f"{option(of)}: {name!r} needs a {DATABASE} in {self.dataset.path} and an integer "
                f"run_id in its rows; it has {', '.join(self.names)}"
            )
        return Column(np.dtype(np.int64), (), "run_id", self._runs.column(RUN_LABELS[name]))

    def _field(self, name: str) -> np.dtype[Any] | None:
        """Return the dtype of the field of that name; None where no shard has it."""
        holders = [(path, row[name]) for path, row in self.layouts if name in (row.names or ())]
        if not holders:
            return None
        holder, dtype = holders[0]
        for path, row in self.layouts:
            if name not in (row.names or ()):
                raise DatasetError(f"{path}: its rows have no {name!r}, which {holder} has")
            if row[name] != dtype:
                raise DatasetError(
                    f"{path}: its rows have {name!r} as {row[name]}, but {holder} as {dtype}; "
                    "shards of one dataset must agree in the fields that are read"
                )
        return dtype

    def _missing(self, name: str, *, of: str) -> InvalidArgumentError:
        hint = did_you_mean(name, self.names)
        return InvalidArgumentError(
            f"{option(of)}: {self.dataset.path} has no {name!r}{hint}; it has "
            f"{', '.join(self.names)}"
        )

    def find_labels(self, patterns: Sequence[str]) -> dict[str, Column]:
        """Return the columns of labels by name: names, globs of them, or `all` for every field.

        Globs and `all` leave out columns that are not numbers, and `board`: the file's `boards`
        hold it, and it seldom fits into int64.
        """
        found = {}
        for pattern in patterns:
            if pattern != ALL and not any(sign in pattern for sign in "*?["):
                found[pattern] = column = self.find(pattern, of="labels")
                if not _can_be_stored(pattern, column):
                    raise InvalidArgumentError(
                        f"{option('labels')}: {pattern!r} must be a number; it is {column.dtype}"
                    )
                continue
            names = self.fields if pattern == ALL else self.names
            matching = [name for name in names if pattern == ALL or fnmatchcase(name, pattern)]
            if not matching:
                raise self._missing(pattern, of="labels")
            columns = {name: self.find(name, of="labels") for name in matching if name != "board"}
            texts = [name for name, column in columns.items() if not _can_be_stored(name, column)]
            if texts:
                note(f"{option('labels')}: left out {printable(', '.join(texts))}: not numeric")
            if pattern == ALL and (lacking := self._fields_of_later_shards()):
                note(
                    f"{option('labels')}: left out {printable(', '.join(lacking))}: not in "
                    f"{self.layouts[0][0].name}"
                )
            found |= {name: column for name, column in columns.items() if name not in texts}
        return found


class ColumnReader:
    """Reads columns of rows in one pass over the shards."""

    def __init__(self, columns: Columns, read: Mapping[str, Column]) -> None:
        self._dataset = columns.dataset
        self._columns = read
        self._needs_boards = any(column.source is None for column in read.values())
        layouts: list[Mapping[str, Any]] = [row.fields or {} for _, row in columns.layouts]
        sources = dict.fromkeys(each.source for each in read.values() if each.source)
        self._fields = {name: layouts[0][name][0] for name in sources}
        places = [[(row[name][1], row[name][0].itemsize) for name in sources] for row in layouts]
        self._selection = _rust.Selection(columns.dataset, places)

    def scan(
        self, rows: range, look: Callable[[range, Values], _T], progress: Count | None
    ) -> list[_T]:
        """Read consecutive rows on all cores; return what `look` returns for chunks of them.

        It takes a chunk's rows and their values, which are valid during the call, on any thread.
        The calling thread reports progress. Where several chunks fail, the first error is raised.
        """
        note_transfer(self._dataset, rows)
        chunks = [rows[at : at + CHUNK_ROWS] for at in range(0, len(rows), CHUNK_ROWS)]
        threads = max(min(len(os.sched_getaffinity(0)), len(chunks)), 1)
        cancel, free = _rust.Cancel(), SimpleQueue[list[NDArray[np.uint8]]]()
        widths = [CELLS * self._needs_boards, *(each.itemsize for each in self._fields.values())]
        for _ in range(threads):
            outs = [np.empty((min(CHUNK_ROWS, len(rows)), width), np.uint8) for width in widths]
            free.put([np.empty((1, _SCRATCH), np.uint8), *outs])

        def read(chunk: range) -> _T:
            buffers = free.get()
            try:
                scratch = buffers[0][0]
                boards_NS, *fields = (out[: len(chunk)] for out in buffers[1:])
                boards = boards_NS if self._needs_boards else None
                fetch_rows(self._dataset, chunk, cancel)
                rows = (chunk.start, chunk.stop)
                self._selection.scan(rows, scratch, boards, fields, cancel)
                return look(chunk, self._compute(boards_NS, fields))
            finally:
                free.put(buffers)

        seen: list[_T] = []

        def take(chunk: range, found: _T) -> None:
            seen.append(found)
            if progress is not None:
                progress(chunk.stop - rows.start, len(rows))

        in_parallel(read, chunks, threads, take, cancel=cancel.ask)
        return seen

    def _compute(self, boards_NS: NDArray[np.uint8], fields: Sequence[NDArray[np.uint8]]) -> Values:
        values = {
            name: raw.view(dtype.base).reshape(len(raw), *dtype.shape)
            for (name, dtype), raw in zip(self._fields.items(), fields, strict=True)
        }
        cells_SN = np.ascontiguousarray(boards_NS.T) if self._needs_boards else boards_NS.T
        return {
            name: column.compute(values[column.source] if column.source else cells_SN)
            for name, column in self._columns.items()
        }


class LabelReader(ColumnReader):
    """Reads boards and labels of the same rows in one pass: `dtypes` and `shapes` by name."""

    def __init__(self, columns: Columns, names: Sequence[str]) -> None:
        found = columns.find_labels(names)
        super().__init__(columns, found)
        self.dtypes = {name: np.dtype(_stored_dtype(column)) for name, column in found.items()}
        self.shapes = {name: column.shape for name, column in found.items()}

    def read(
        self,
        indices: NDArray[np.int64],
        boards_NS: NDArray[np.uint8],
        cancel: _rust.Cancel | None = None,
    ) -> Values:
        """Read rows by their step indices, and write their boards to `boards_NS`, uint8 (n, 16).

        Returns name -> the label's values, (n, *shape).
        """
        ends = np.cumsum([CELLS, *(each.itemsize for each in self._fields.values())])
        rows = np.empty((len(indices), ends[-1]), np.uint8)
        fetch_rows(self._dataset, indices, cancel)
        self._selection.read(indices, rows, cancel)
        boards_NS[:], *fields = np.split(rows, ends[:-1], axis=1)
        read = self._compute(boards_NS, [np.ascontiguousarray(field) for field in fields])
        for name, values in read.items():
            if values.dtype.kind == "u" and values.dtype.itemsize == 8:
                too_large = (values > _INT64_MAX).reshape(len(values), -1).any(axis=1)
                if too_large.any():
                    row = int(np.argmax(too_large))
                    raise DatasetError(
                        f"{self._dataset.path}: {name!r} of step {indices[row]} must fit into "
                        f"int64; it is {values[row]}"
                    )
        return {
            name: np.require(values, self.dtypes[name], ["C", "ALIGNED", "WRITEABLE"])
            for name, values in read.items()
        }


def _stored_dtype(column: Column) -> type[np.generic] | None:
    """Return the dtype that a label is stored in; None where it is not a number."""
    kind, nbytes = column.dtype.kind, column.dtype.itemsize
    if 0 in column.shape or kind not in "biuf" or nbytes > 8:
        return None
    if kind == "f":
        return np.float64 if nbytes == 8 else np.float32
    return np.uint8 if kind == "b" or (kind == "u" and nbytes == 1) else np.int64


def _can_be_stored(name: str, column: Column) -> bool:
    return name.isprintable() and _stored_dtype(column) is not None
