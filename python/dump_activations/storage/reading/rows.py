"""Which rows are wanted.

Shape letters: N boards, R rows that are asked for.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dump_activations.errors import InvalidArgumentError, RowIndexError, option

Rows = ArrayLike | slice | None
"""Numbers of rows in any order, with repeats; a slice; a mask, bool (N,); None for all."""


def row_numbers(rows: Rows, boards: int, of: object) -> NDArray[np.int64]:
    """Return the numbers of rows `of` so many boards, int64 (R,).

    Raises:
        InvalidArgumentError: they are no integers, no mask of all rows, or not one-dimensional.
        RowIndexError: one is negative or past the end.
    """
    if rows is None or isinstance(rows, slice):
        return np.arange(boards)[rows or slice(None)]
    numbers = np.asarray(rows)
    if numbers.shape == (0,):
        return np.empty(0, np.int64)
    if numbers.dtype == bool and numbers.shape == (boards,):
        return np.flatnonzero(numbers)
    if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        raise InvalidArgumentError(
            f"{option('rows')}: integers (n,) or bool ({boards},) are wanted, not {numbers.dtype} "
            f"{numbers.shape}"
        )
    outside = (numbers < 0) | (numbers >= boards)
    if outside.any():
        at = int(np.argmax(outside))
        raise RowIndexError(
            f"{option('rows')}: row {numbers[at]} at position {at} is not in {of}, which has "
            f"{boards} boards"
        )
    return np.ascontiguousarray(numbers, np.int64)
