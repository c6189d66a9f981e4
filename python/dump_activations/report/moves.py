"""Which move the model makes, by its head.

Shape letters: n boards, M moves (4), O bins of a head.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dump_activations.dataset.game import legal_moves
from dump_activations.report.source import Floats, Source

NAMES = ("up", "down", "left", "right")
ARROWS = ("↑", "↓", "←", "→")

NO_MOVE = -1
"""Stands for the move on a board where none is left."""


@dataclass(frozen=True)
class Choices:
    """What the heads say of boards.

    Attributes:
        places: which of the source's boards, (n,).
        probs: probabilities, (n, M, O) of binned heads or (n, M) of a policy.
        scores: by which a move is chosen, (n, M).
        moves: the chosen ones among those that change the board, (n,), or `NO_MOVE`.
    """

    places: NDArray[np.int64]
    probs: Floats
    scores: Floats
    moves: NDArray[np.int64]

    @property
    def is_binned(self) -> bool:
        """Whether each move has a head of its own, over bins."""
        return self.probs.ndim == 3


def read_choices(source: Source, places: NDArray[np.int64] | None = None) -> Choices | None:
    """Read what the heads say of boards, of as many as fit by default; None without heads.

    The last bin of a binned head is that of the best move, the first that of a move that is none.
    """
    key = next((key for key in ("head_probs", "head_logits") if key in source.keys), None)
    if key is None:
        return None
    places = source.rows_within(key) if places is None else places
    probs = source.read(key, places)
    if key == "head_logits":
        exponentials = np.exp(probs - probs.max(axis=-1, keepdims=True))
        probs = exponentials / exponentials.sum(axis=-1, keepdims=True)
    scores = probs[..., -1] if probs.ndim == 3 else probs
    return Choices(places, probs, scores, choose(scores, source.boards[places]))


def choose(scores: Floats, boards: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the legal move of the highest score a board, (n,), or `NO_MOVE`."""
    legal = legal_moves(np.ascontiguousarray(boards.T)).astype(np.bool_)
    best = np.where(legal, np.nan_to_num(scores, nan=-np.inf), -np.inf).argmax(axis=1)
    moves: NDArray[np.int64] = np.where(legal.any(axis=1), best, NO_MOVE)
    return moves
