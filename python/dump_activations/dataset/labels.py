"""The registry of labels that are not fields of the rows. A new one is one new entry."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dump_activations.dataset import game
from dump_activations.dtypes import MOVES


@dataclass(frozen=True)
class BoardLabel:
    """What the rules of the game say of a board.

    Attributes:
        shape: of one board's value.
        compute: boards, cell by cell, uint8 (16, N) -> values, uint8 (N, *shape).
    """

    shape: tuple[int, ...]
    compute: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


BOARD_LABELS = {
    "empty_cells": BoardLabel((), game.empty_cells),
    "max_exponent": BoardLabel((), game.max_exponent),
    "max_in_corner": BoardLabel((), game.max_in_corner),
    "legal_moves": BoardLabel((MOVES,), game.legal_moves),
    "merges": BoardLabel((MOVES,), game.merges),
}

RUN_LABELS = {
    "run_seed": "seed",
    "run_steps": "steps",
    "run_max_score": "max_score",
    "run_highest_tile": "highest_tile",
}
"""Label -> column of the table `runs` of `metadata.db`."""
