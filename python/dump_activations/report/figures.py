"""Figures of one key's vectors, of all boards where the file has statistics, else of some.

A vector is a value's last axis: of one cell, or of one cell and attention head.

Shape letters: n boards, L layers (1 for keys without), S cells (16), F features of a vector.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dump_activations.dtypes import CELLS
from dump_activations.report.source import Floats, Source

Array = NDArray[np.float64]

QUANTILES = (0.05, 0.5, 0.95)
"""Of the norms."""

OUTLIER = 6.0
"""An entry beyond it, of either sign, is called an outlier."""


@dataclass(frozen=True)
class KeyFigures:
    """Figures of a key.

    Attributes:
        key: the key.
        layers: numbers of the layers in the model, (L,); none for a key without.
        board_counts: how many boards the statistics are of, and how many quantiles and cells.
        norm_mean: mean L2 norm of a vector, (L,).
        norm_quantiles: `QUANTILES` of the norms, (3, L).
        spread: root of the mean variance of a feature, (L,).
        outliers: share of entries that are outliers, (L,).
        largest: largest absolute entry of every feature, (L, F).
        cell_norms: mean norm at each cell, (L, S); None for keys without cells.
    """

    key: str
    layers: tuple[int, ...]
    board_counts: tuple[int, int]
    norm_mean: Array
    norm_quantiles: Array
    spread: Array
    outliers: Array
    largest: Array
    cell_norms: Array | None


def key_figures(source: Source, key: str) -> KeyFigures:
    """Read the statistics of a key, if there are any, and values of some boards."""
    stored = source.stored_statistics(key)
    layers = source.file.layers(key)
    places = source.rows_within(key, few=stored is not None)
    axis = cell_axis(key, source.file.shape(key)[2 if layers else 1 :])
    quantiles, cell_norms, computed = [], [], []
    for layer in layers or [None]:
        values = source.read(key, places, layer=layer)
        norms = _norms(values)
        quantiles.append(np.quantile(norms, QUANTILES))
        if axis is not None:
            cell_norms.append(_by_cell(norms, 1 + axis))
        if stored is None:
            computed.append(_statistics(values, norms))
    statistics = stored or {name: np.stack([of[name] for of in computed]) for name in computed[0]}
    shape = (max(len(layers), 1), -1)
    of_layers = {name: np.reshape(values, shape) for name, values in statistics.items()}
    largest = np.maximum(abs(of_layers["min"]), abs(of_layers["max"]))
    entries = of_layers["count"][:, 0] * largest.shape[1]
    return KeyFigures(
        key=key,
        layers=layers,
        board_counts=(len(source.file) if stored else len(places), len(places)),
        norm_mean=of_layers["norm_mean"][:, 0],
        norm_quantiles=np.stack(quantiles, axis=1),
        spread=np.sqrt(of_layers["variance"].mean(axis=1)),
        outliers=of_layers["count_abs_gt_6"].sum(axis=1) / entries,
        largest=largest,
        cell_norms=np.stack(cell_norms) if cell_norms else None,
    )


def cell_axis(key: str, shape: tuple[int, ...]) -> int | None:
    """Say which axis of a value, of one layer, counts the cells that vectors are of."""
    if key in ("attn_scores", "attn_pattern"):
        return 1
    return 0 if len(shape) > 1 and shape[0] == CELLS else None


def _norms(values: Floats) -> Array:
    """Return the norm of each vector, float64 (n, ...)."""
    squares = np.einsum("...f,...f->...", values, values, dtype=np.float64)
    norms: Array = np.sqrt(squares)
    return norms


def _by_cell(norms: Array, axis: int) -> Array:
    """Return the mean norm at each cell, (S,)."""
    others = tuple(i for i in range(norms.ndim) if i != axis)
    mean: Array = norms.mean(axis=others)
    return mean


def _statistics(values: Floats, norms: Array) -> dict[str, Array]:
    """Return of one layer's values what a file would have as its statistics."""
    vectors = values.reshape(-1, values.shape[-1])
    return {
        "count": np.float64(len(vectors)),
        "variance": vectors.var(axis=0, dtype=np.float64),
        "min": vectors.min(axis=0).astype(np.float64),
        "max": vectors.max(axis=0).astype(np.float64),
        "count_abs_gt_6": (abs(vectors) > OUTLIER).sum(axis=0).astype(np.float64),
        "norm_mean": norms.mean(),
    }
