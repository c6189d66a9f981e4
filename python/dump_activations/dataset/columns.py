"""Named values of rows, read together.

They are fields and elements of array fields, what the rules of the game say of the board, and what
`metadata.db` says of the run.

Shape letters: N rows, S cells (16).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dump_activations import _rust
from dump_activations.dataset.fields import RowField, RowFields
from dump_activations.dataset.labels import BOARD_LABELS, RUN_LABELS
from dump_activations.dataset.runs import DATABASE, Runs
from dump_activations.dtypes import CELLS
from dump_activations.errors import InvalidArgumentError, option

Values = dict[str, NDArray[Any]]
"""Name -> what rows have of it, first axis N."""

# Bytes of rows that are read at once: no row is larger, and a core's second-level cache holds them.
_SCRATCH = 1 << 20


@dataclass(frozen=True)
class Column:
    """A named value of every row.

    Attributes:
        dtype: of one element.
        shape: of one row's value.
        compute: boards, cell by cell (16, N), and the fields' values -> its values (N, *shape).
        fields: what it is made of, beside the board.
        of_board: whether it is made of the board.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    compute: Callable[[NDArray[np.uint8], Values], NDArray[Any]]
    fields: tuple[RowField, ...] = ()
    of_board: bool = False


class Columns:
    """The columns of a dataset that can be named."""

    def __init__(self, dataset: _rust.Dataset) -> None:
        self.dataset = dataset
        self.fields = RowFields(dataset)
        self._runs = Runs(dataset.path)

    @property
    def names(self) -> list[str]:
        """All names, elements of array fields apart."""
        of_runs = RUN_LABELS if self._runs.exists and "run_id" in self.fields else ()
        return list(dict.fromkeys([*self.fields, *BOARD_LABELS, *of_runs]))

    def find(self, name: str, *, of: str) -> Column:
        """Return the column of that name, for the option `of`.

        Raises:
            InvalidArgumentError: there is none.
            DatasetError: some shards lack it, or `metadata.db` cannot be read.
        """
        if (column := self._whole(name, of=of)) is not None:
            return column
        element = re.fullmatch(r"(.+?)((?:_[0-9]+)+)", name)
        if element and (array := self._whole(element[1], of=of)) is not None:
            place = tuple(int(number) for number in element[2][1:].split("_"))
            if len(place) == len(array.shape) and all(map(int.__lt__, place, array.shape)):
                return _element(array, place)
        raise InvalidArgumentError(
            f"{option(of)}: no {name!r} in {self.dataset.path}; there are {', '.join(self.names)}"
        )

    def _whole(self, name: str, *, of: str) -> Column | None:
        if (field := self.fields.find(name)) is not None:
            return Column(field.dtype, field.shape, lambda _, fields: fields[name], (field,))
        if (label := BOARD_LABELS.get(name)) is not None:
            dtype, compute = np.dtype(np.uint8), label.compute
            return Column(dtype, label.shape, lambda cells, _: compute(cells), of_board=True)
        return self._of_run(name, of=of) if name in RUN_LABELS else None

    def _of_run(self, name: str, *, of: str) -> Column:
        column = RUN_LABELS[name]
        run_id = self.fields.find("run_id")
        if run_id is None or run_id.shape or run_id.dtype.kind not in "iu" or not self._runs.exists:
            raise InvalidArgumentError(
                f"{option(of)}: no {name!r} in {self.dataset.path}, which takes a {DATABASE} and a "
                f"run_id in the rows; there are {', '.join(self.names)}"
            )
        self._runs.load(column)
        join = self._runs.join
        return Column(
            np.dtype(np.int64), (), lambda _, fields: join(column, fields["run_id"]), (run_id,)
        )


def _element(array: Column, place: tuple[int, ...]) -> Column:
    at: Any = (slice(None), *place)
    return replace(array, shape=(), compute=lambda cells, fields: array.compute(cells, fields)[at])


class ColumnReader:
    """Reads columns of rows, chosen or consecutive, in one pass over the shards."""

    def __init__(self, dataset: _rust.Dataset, columns: Mapping[str, Column]) -> None:
        self.columns = columns
        self.of_boards = any(column.of_board for column in columns.values())
        fields = {field.name: field for column in columns.values() for field in column.fields}
        self._fields = list(fields.values())
        layouts = len(dict.fromkeys(dataset.descrs))
        self._selection = _rust.Selection(
            dataset, [[(f.offsets[i], f.nbytes) for f in self._fields] for i in range(layouts)]
        )

    def read(
        self,
        indices: NDArray[np.int64],
        boards_NS: NDArray[np.uint8],
        cancel: _rust.Cancel | None = None,
    ) -> Values:
        """Read rows by their step indices; their boards are put into `boards_NS`."""
        width = sum(field.nbytes for field in self._fields)
        rows = np.empty((len(indices), CELLS + width), np.uint8)
        self._selection.read(indices, rows, cancel)
        boards_NS[:] = rows[:, :CELLS]
        parts, start = [], CELLS
        for field in self._fields:
            parts.append(np.ascontiguousarray(rows[:, start : start + field.nbytes]))
            start += field.nbytes
        return self._compute(boards_NS, parts)

    def buffers(self, rows: int) -> list[NDArray[np.uint8]]:
        """Allocate what `scan` works in: as many rows as are read at once, boards and fields."""
        boards = np.empty((rows if self.of_boards else 0, CELLS), np.uint8)
        fields = (np.empty((rows, field.nbytes), np.uint8) for field in self._fields)
        return [np.empty(_SCRATCH, np.uint8), boards, *fields]

    def scan(
        self,
        first: int,
        rows: int,
        buffers: Sequence[NDArray[np.uint8]],
        cancel: _rust.Cancel | None = None,
    ) -> Values:
        """Read consecutive rows; the values may lie in the buffers."""
        scratch, *outs = buffers
        boards, *parts = (out[:rows] for out in outs)
        wanted = boards if self.of_boards else None
        self._selection.scan((first, first + rows), scratch, wanted, parts, cancel)
        return self._compute(boards, parts)

    def _compute(self, boards_NS: NDArray[np.uint8], parts: Sequence[NDArray[np.uint8]]) -> Values:
        fields = {
            field.name: part.view(field.dtype).reshape(len(part), *field.shape)
            for field, part in zip(self._fields, parts, strict=True)
        }
        cells_SN = np.ascontiguousarray(boards_NS.T) if self.of_boards else boards_NS.T
        return {name: column.compute(cells_SN, fields) for name, column in self.columns.items()}
