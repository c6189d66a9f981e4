"""What the rules of the game say of boards, whatever was recorded of them.

Shape letters: N boards, S cells (16), R lines (4 rows or 4 columns) of a board.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Boards = NDArray[np.uint8]

_CORNERS = [0, 3, 12, 15]


def empty_cells(boards_NS: Boards) -> Boards:
    """Count the empty cells, uint8 (N,)."""
    empty: Boards = (boards_NS == 0).sum(axis=1, dtype=np.uint8)
    return empty


def max_exponent(boards_NS: Boards) -> Boards:
    """Find the largest exponent, uint8 (N,)."""
    largest: Boards = boards_NS.max(axis=1)
    return largest


def max_in_corner(boards_NS: Boards) -> Boards:
    """Say whether a largest tile lies in a corner, uint8 (N,); of a board without tiles, 0."""
    largest = boards_NS.max(axis=1)
    in_corner: NDArray[np.bool_] = boards_NS[:, _CORNERS].max(axis=1) == largest
    return (in_corner & (largest > 0)).astype(np.uint8)


def legal_moves(boards_NS: Boards) -> Boards:
    """Say whether up, down, left and right change the board, uint8 (N, 4)."""
    rows, columns = _lines(boards_NS)
    moves = [_slides(columns), _slides(columns[::-1]), _slides(rows), _slides(rows[::-1])]
    return np.stack(moves, axis=1).astype(np.uint8)


def merges(boards_NS: Boards) -> Boards:
    """Count the pairs that up, down, left and right merge, uint8 (N, 4)."""
    # A run of k equal tiles in a line makes k // 2 pairs from either end.
    rows, columns = (_pairs(lines).sum(axis=0, dtype=np.uint8) for lines in _lines(boards_NS))
    return np.stack([columns, columns, rows, rows], axis=1)


def _lines(boards_NS: Boards) -> tuple[Boards, Boards]:
    """Cut boards into lines (4, R, N), cells from left to right and from top to bottom."""
    from_top = np.ascontiguousarray(boards_NS.T).reshape(4, 4, -1)
    return from_top.transpose(1, 0, 2), from_top


def _slides(lines: Boards) -> NDArray[np.bool_]:
    """Say whether a move towards cell 0 changes any line, (N,)."""
    changes = np.zeros(lines.shape[2], np.bool_)
    for near, far in pairwise(lines):
        changes |= ((far != 0) & ((near == 0) | (near == far))).any(axis=0)
    return changes


def _pairs(lines: Boards) -> Boards:
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
    pairs: Boards = np.add(a_b | a_c | a_d, b_c | b_d, dtype=np.uint8) + c_d
    return pairs
