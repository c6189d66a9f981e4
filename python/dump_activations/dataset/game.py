"""Labels of boards by the rules of the game.

Shape letters: N boards, S cells (16), R lines (4 rows or 4 columns) of a board.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def empty_cells(cells_SN: Bytes) -> Bytes:
    """Count the empty cells, uint8 (N,)."""
    empty: Bytes = (cells_SN == 0).sum(axis=0, dtype=np.uint8)
    return empty


def max_exponent(cells_SN: Bytes) -> Bytes:
    """Find the largest exponent, uint8 (N,)."""
    largest: Bytes = cells_SN.max(axis=0)
    return largest


def max_in_corner(cells_SN: Bytes) -> Bytes:
    """Return 1 if a largest tile is in a corner, uint8 (N,), and 0 for a board without tiles."""
    largest = max_exponent(cells_SN)
    in_corner: NDArray[np.bool_] = max_exponent(cells_SN[[0, 3, 12, 15]]) == largest
    return (in_corner & (largest > 0)).astype(np.uint8)


def legal_moves(cells_SN: Bytes) -> Bytes:
    """Return 1 for each of up, down, left and right that changes the board, uint8 (N, 4)."""
    columns, rows = _lines(cells_SN)
    moves = [_slides(columns), _slides(columns[::-1]), _slides(rows), _slides(rows[::-1])]
    return np.stack(moves, axis=1).astype(np.uint8)


def merges(cells_SN: Bytes) -> Bytes:
    """Count the pairs that up, down, left and right merge, uint8 (N, 4)."""
    # A run of k equal tiles in a line makes k // 2 pairs from either end.
    columns, rows = (_pairs(lines).sum(axis=0, dtype=np.uint8) for lines in _lines(cells_SN))
    return np.stack([columns, columns, rows, rows], axis=1)


def _lines(cells_SN: Bytes) -> tuple[Bytes, Bytes]:
    """Cut boards into columns from the top and rows from the left, each (4 cells, R, N)."""
    columns = cells_SN.reshape(4, 4, -1)
    return columns, columns.transpose(1, 0, 2)


def _slides(lines: Bytes) -> NDArray[np.bool_]:
    """Return True if a move towards cell 0 changes any line, (N,)."""
    changes = np.zeros(lines.shape[2], np.bool_)
    for near, far in pairwise(lines):
        changes |= ((far != 0) & ((near == 0) | (near == far))).any(axis=0)
    return changes


def _pairs(lines: Bytes) -> Bytes:
    """Count the pairs that merge in each line, (R, N)."""
    a, b, c, d = lines
    no_b, no_c = b == 0, c == 0
    # Each tile merges with the next one after it, unless the one before has taken it.
    a_b = (a == b) & (a != 0)
    a_c = (a == c) & no_b & (a != 0)
    a_d = (a == d) & no_b & no_c & (a != 0)
    b_c = (b == c) & ~no_b & ~a_b
    b_d = (b == d) & ~no_b & no_c & ~a_b
    c_d = (c == d) & ~no_c & ~a_c & ~b_c
    pairs: Bytes = np.add(a_b | a_c | a_d, b_c | b_d, dtype=np.uint8) + c_d
    return pairs
