"""The section of the heads: what they say, and how often that is the move that was played.

Shape letters: n boards, M moves (4), O bins of a head.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dump_activations.dtypes import MOVES
from dump_activations.report import charts
from dump_activations.report.boards import short_tile_text, step_bins
from dump_activations.report.markup import Markup, percent_text, tag
from dump_activations.report.moves import NAMES, NO_MOVE, Choices, read_choices
from dump_activations.report.source import Source, looked_at
from dump_activations.report.tables import share_table

_STEP_BINS = 10

# A share of fewer boards says little.
_FEW = 30


def draw(source: Source) -> Markup:
    """Draw the heads' probabilities and the moves that follow from them."""
    choices = read_choices(source)
    if choices is None:
        flag = tag("code", "--outputs head_probs")
        return tag("p", "What the heads say is not in this dump: ", flag, " adds it.")
    figures = [_probabilities(choices), _chosen(choices)]
    sentence = f"Figures of {looked_at(len(choices.places), len(source.file))}. "
    if source.moves is None:
        flag = tag("code", "--labels move_dir")
        text = Markup.of("The moves that were played are not in this dump: ", flag, " adds them.")
        return Markup.of(tag("p", sentence, text), tag("div", *figures, class_="cards"))
    played = source.moves[choices.places]
    counted = choices.moves != NO_MOVE
    agrees = (choices.moves == played)[counted]
    boards = source.boards[choices.places][counted]
    figures += [_by_largest(agrees, boards.max(axis=1))]
    if source.steps is not None:
        figures.append(_by_step(agrees, source.steps[choices.places][counted]))
    figures.append(_confusion(choices.moves[counted], played[counted]))
    text = _agreement(agrees)
    return Markup.of(tag("p", sentence, text), tag("div", *figures, class_="cards"))


def _agreement(agrees: NDArray[np.bool_]) -> Markup:
    if not agrees.size:
        return Markup.of("No board has a move left.")
    share = tag("b", f"{agrees.mean():.1%}", id="agreement")
    return Markup.of("The model's move is the one that was played on ", share, " of them.")


def _probabilities(choices: Choices) -> Markup:
    if not choices.is_binned:
        mean_M = choices.probs.mean(axis=0, dtype=np.float64)
        return _shares(
            "Mean probability of each move", NAMES, mean_M, x_label="move", y_label="probability, %"
        )
    mean_MO = choices.probs.mean(axis=0, dtype=np.float64)
    bins = [str(i) for i in range(mean_MO.shape[1])]
    series = [charts.Series(name, [*mean_MO[i]], i) for i, name in enumerate(NAMES)]
    return charts.lines(
        "Mean probability of each bin, by the move's head", bins, series,
        x_label="bin: the first is no move, the last the best", y_label="probability",
    )  # fmt: skip


def _chosen(choices: Choices) -> Markup:
    counts = np.bincount(choices.moves[choices.moves != NO_MOVE], minlength=MOVES)
    shares = counts / max(counts.sum(), 1)
    return _shares(
        "Moves that the model makes", NAMES, shares, x_label="move", y_label="% of boards"
    )


def _by_largest(agrees: NDArray[np.bool_], largest: NDArray[np.uint8]) -> Markup:
    exponents = range(int(largest.min()), int(largest.max()) + 1) if len(largest) else range(0)
    groups = [largest == e for e in exponents]
    names = [short_tile_text(e) for e in exponents]
    return _agreement_bars("Agreement by the largest tile", names, groups, agrees, "largest tile")


def _by_step(agrees: NDArray[np.bool_], steps: NDArray[np.int64]) -> Markup:
    edges = step_bins(steps, _STEP_BINS) if len(steps) else np.zeros(1, np.int64)
    groups = [(steps >= low) & (steps < high) for low, high in pairwise(edges)]
    names = [str(edge) for edge in edges[:-1]]
    label = "step of the game, from … on"
    return _agreement_bars("Agreement by the step of the game", names, groups, agrees, label)


def _agreement_bars(
    title: str,
    names: Sequence[str],
    groups: Sequence[NDArray[np.bool_]],
    agrees: NDArray[np.bool_],
    x_label: str,
) -> Markup:
    counts = [int(group.sum()) for group in groups]
    shares = np.array([agrees[g].mean() if g.any() else np.nan for g in groups])
    return _shares(
        title, names, shares, x_label=x_label, y_label="% of boards on which the moves agree",
        counts=counts,
    )  # fmt: skip


def _shares(
    title: str,
    names: Sequence[str],
    shares: NDArray[np.float64],
    *,
    x_label: str,
    y_label: str,
    counts: Sequence[int] | None = None,
) -> Markup:
    is_pale = [count < _FEW for count in counts or ()]
    of = [f" of {count:,} boards" for count in counts] if counts else [""] * len(names)
    return charts.bars(
        title,
        names,
        shares,
        tooltips=[
            f"{name}: {percent_text(share)}{more}"
            for name, share, more in zip(names, shares, of, strict=True)
        ],
        x_label=x_label,
        y_label=y_label,
        note=f"Pale: of fewer than {_FEW} boards." if any(is_pale) else "",
        is_pale=is_pale,
    )


def _confusion(moves: NDArray[np.int64], played: NDArray[np.int64]) -> Markup:
    """Draw how the model's moves fall where each move was played."""
    known = (played >= 0) & (played < MOVES)
    pairs = played[known] * MOVES + moves[known]
    counts = np.bincount(pairs, minlength=MOVES * MOVES).reshape(MOVES, MOVES)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    table = share_table("played", NAMES, NAMES, shares)
    note = "A row is the move that was played, a column the model's; each row adds up to 100%."
    return charts.figure("The model's move where each move was played", table, note=note)
