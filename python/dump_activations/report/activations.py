"""The section of the activations: how long vectors are, which features stand out, and where."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dump_activations.progress import Count
from dump_activations.report import charts
from dump_activations.report.figures import OUTLIER, KeyFigures, key_figures
from dump_activations.report.markup import Markup, number_text, percent_text, tag
from dump_activations.report.source import Source, looked_at
from dump_activations.report.tables import heat_board, table

# What other sections show.
_ELSEWHERE = frozenset({"attn_pattern", "head_logits", "head_probs"})

_TOP_FEATURES = 3


def draw(source: Source, progress: Count | None) -> Markup:
    """Draw the figures of each key; `progress` is called with keys done and how many there are."""
    intro = (
        "A vector is the last axis of a key: one cell's, or one cell's of one attention head. "
        "Norms are L2. The spread is the standard deviation of a feature, the root of the mean "
        f"variance. An outlier is an entry beyond ±{OUTLIER:.0f}."
    )
    keys = [key for key in source.keys if key not in _ELSEWHERE and _has_vectors(source, key)]
    parts = []
    for done, key in enumerate(keys, 1):
        parts.append(_key(key_figures(source, key), len(source.file)))
        if progress is not None:
            progress(done, len(keys))
    if not parts:
        return tag("p", "No activations but those of the sections above are in this dump.")
    links = [tag("a", key, href=f"#key-{key}") for key in keys]
    return Markup.of(tag("p", intro), tag("p", *links, class_="links"), *parts)


def _has_vectors(source: Source, key: str) -> bool:
    """Say whether a key has vectors of one or more features; a file that is no dump may not."""
    shape = source.file.shape(key)
    return len(shape) > (2 if source.file.layers(key) else 1) and 0 not in shape


def _key(figures: KeyFigures, of: int) -> Markup:
    exact, some = figures.board_counts
    counts = f"Statistics of {looked_at(exact, of)}"
    counts += "." if exact == some else f"; quantiles and cells of {looked_at(some, of)}."
    if exact < of:
        counts += " A dump made with --stats has those of all."
    if not figures.outliers.any():
        counts += f" No entry is beyond ±{OUTLIER:.0f}."
    content = [tag("h3", figures.key, id=f"key-{figures.key}"), tag("p", counts)]
    if len(figures.layers) > 1:
        content.append(tag("div", *_by_layer(figures), class_="cards"))
    content.append(_table(figures))
    if figures.cell_norms is not None:
        content.append(_cells(figures, figures.cell_norms))
    return tag("section", *content)


def _names(figures: KeyFigures) -> list[str]:
    return [str(layer) for layer in figures.layers] or [figures.key]


def _by_layer(figures: KeyFigures) -> Iterator[Markup]:
    low, median, high = figures.norm_quantiles
    names = _names(figures)
    yield charts.lines(
        f"{figures.key}: norm of a vector", names,
        [charts.Series("mean", [*figures.norm_mean]), charts.Series("median", [*median], 1)],
        band=(charts.Series("5%", [*low]), charts.Series("95%", [*high])),
        x_label="layer", y_label="L2 norm",
    )  # fmt: skip
    yield charts.lines(
        f"{figures.key}: spread of a feature", names, [charts.Series("spread", [*figures.spread])],
        x_label="layer", y_label="standard deviation",
    )  # fmt: skip
    if not figures.outliers.any():
        return
    yield charts.lines(
        f"{figures.key}: entries beyond ±{OUTLIER:.0f}", names,
        [charts.Series("outliers", [*(100 * figures.outliers)], 3)],
        x_label="layer", y_label="% of entries",
    )  # fmt: skip


def _table(figures: KeyFigures) -> Markup:
    columns = ("norm: mean", "5%", "median", "95%", "spread", "outliers", "largest features: |x|")
    rows = ([name, *_row(figures, i)] for i, name in enumerate(_names(figures)))
    return table(
        f"{figures.key} in numbers", ["layer" if figures.layers else "key", *columns], rows
    )


def _row(figures: KeyFigures, i: int) -> Iterator[str]:
    for value in (figures.norm_mean[i], *figures.norm_quantiles[:, i], figures.spread[i]):
        yield number_text(float(value))
    yield percent_text(float(figures.outliers[i]))
    largest = figures.largest[i]
    top = np.argsort(-np.nan_to_num(largest, nan=np.inf), kind="stable")[:_TOP_FEATURES]
    yield ", ".join(f"{feature}: {charts.short_text(largest[feature])}" for feature in top)


def _cells(figures: KeyFigures, norms_LS: NDArray[np.float64]) -> Markup:
    boards = [
        heat_board(
            f"layer {name}" if figures.layers else "all boards",
            [charts.short_text(norm) for norm in norms_S],
            _depths(norms_S),
        )
        for name, norms_S in zip(_names(figures), norms_LS, strict=True)
    ]
    return charts.figure(
        f"{figures.key}: mean norm at each cell",
        tag("div", *boards, class_="heats"),
        note="Blue grows from a layer's smallest norm to its largest, a tenth apart or more.",
    )


def _depths(norms_S: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spread norms over the depths, so that small differences do not look like large ones."""
    low = min(float(norms_S.min()), 0.95 * float(norms_S.mean()))
    high = max(float(norms_S.max()), 1.05 * float(norms_S.mean()))
    depths: NDArray[np.float64] = (norms_S - low) / ((high - low) or 1.0)
    return depths
