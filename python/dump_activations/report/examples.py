"""The section of some boards, as boards of the game, with the model's move where it has heads.

Shape letters: n boards.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dump_activations.report import tables
from dump_activations.report.boards import tile_text
from dump_activations.report.markup import Markup, percent_text, tag
from dump_activations.report.moves import ARROWS, NAMES, NO_MOVE, Choices, read_choices
from dump_activations.report.source import Source

_COUNT = 12


def choose_examples(source: Source) -> NDArray[np.int64]:
    """Choose boards from the smallest sum of tiles to the largest; places among the source's."""
    sums = np.where(source.boards, np.exp2(source.boards, dtype=np.float64), 0).sum(axis=1)
    order = np.argsort(sums, kind="stable")
    places = np.linspace(0, len(order) - 1, min(_COUNT, len(order))).round().astype(np.int64)
    chosen: NDArray[np.int64] = order[places]
    return chosen


def draw(source: Source, places: NDArray[np.int64]) -> Markup:
    """Draw boards with what is known of each."""
    choices = read_choices(source, places)
    cards = [
        tag(
            "li",
            board(source.boards[place]),
            tag("span", *_lines(source, i, int(place), choices), class_="about"),
        )
        for i, place in enumerate(places)
    ]
    intro = "From the smallest sum of tiles to the largest, at even distances among all boards. "
    return Markup.of(tag("p", intro, _rule(choices)), tag("ol", *cards, class_="examples"))


def board(exponents: NDArray[np.uint8]) -> Markup:
    """Draw a board of the game."""
    return tables.board([tile_text(int(e)) for e in exponents], [f"t{e}" for e in exponents])


def _rule(choices: Choices | None) -> Markup:
    if choices is None:
        return Markup.of(
            "The model's moves are not in this dump: ",
            tag("code", "--outputs head_probs"),
            " adds them.",
        )
    if choices.is_binned:
        return Markup.of(
            "The model's move is the legal one to whose last bin, that of the best move, its head "
            "gives the highest probability."
        )
    return Markup.of("The model's move is the legal one of the highest probability.")


def _lines(source: Source, i: int, place: int, choices: Choices | None) -> Iterator[Markup]:
    """Say which board it is, what the model would do there and what was done."""
    step = "" if source.steps is None else f", step {source.steps[place]:,}"
    yield tag("span", f"row {source.rows[place]:,}{step}")
    move = NO_MOVE if choices is None else int(choices.moves[i])
    if choices is not None:
        text = "no move is left"
        if move != NO_MOVE:
            text = f"{ARROWS[move]} {NAMES[move]} {percent_text(float(choices.scores[i, move]))}"
        yield tag("b", f"model: {text}")
    if source.moves is not None and 0 <= source.moves[place] < len(NAMES):
        played = int(source.moves[place])
        other = "" if move in (NO_MOVE, played) else ", another"
        yield tag("span", f"played: {ARROWS[played]} {NAMES[played]}{other}")
