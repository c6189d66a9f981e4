"""Figures of a dump, in NumPy, from as much of it as is read in seconds.

Any file may be shown, so everything here has a bound: boards, bytes per key, keys, layers, heads.
A sentence of the page names each thing that a bound leaves out.

The model's move on a board is the legal move with the highest score. The score of a binned head is
its expected bin: the sum over bins of bin number times probability. The score of a policy is its
probability. A score of NaN never wins.

Shape letters: N boards of the dump, n boards looked at, L layers (1 for keys without), Q query
heads, S cells of queries (16), T cells of keys (16), M moves (4), O bins of a head, F features.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dump_activations.dataset.game import legal_moves
from dump_activations.dtypes import CELLS, LABEL_PREFIX, MOVES, STATISTICS_PREFIX
from dump_activations.errors import InvalidArgumentError, OutputError, shape_text
from dump_activations.storage.reading.activations_file import ActivationsFile
from dump_activations.storage.statistics import Vectors

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Array = NDArray[np.float64]

MOST_BOARDS = 250_000
MOST_NBYTES, FEW_NBYTES = 64 << 20, 16 << 20
"""Bytes of one key, as fp32, that are read: few where the file stores statistics."""

MOST_KEYS, MOST_LAYERS, MOST_HEADS = 64, 128, 128
MOST_VALUES = 1 << 21
"""Elements of one board's value, all layers together."""

MOST_EXAMPLES = 12
QUANTILES = (0.05, 0.5, 0.95)
OUTLIER = 6.0
NO_MOVE, UNKNOWN = -1, -2
"""Stand for the model's move where no move is legal, or every legal move scores NaN."""

# Shapes of one board's value, None for any length, of tensors that have a section of their own.
_SHAPES: dict[str, tuple[tuple[int | None, ...], ...]] = {
    "boards": ((CELLS,),),
    "head_probs": ((MOVES,), (MOVES, None)),
    "head_logits": ((MOVES,), (MOVES, None)),
    "attn_pattern": ((None, None, CELLS, CELLS),),
}

_STATISTICS = ("count", "variance", "min", "max", "norm_mean", "count_abs_gt_6")
_NOT_NEGATIVE = ("variance", "norm_mean", "count_abs_gt_6")


class Absence(NamedTuple):
    """A sentence with the reason why the page lacks something, and the flag that would add it."""

    text: str
    flag: str = ""


class Label(NamedTuple):
    """A label of the boards looked at: values from 0 on, int64 (n,), and -1 where unknown."""

    values: Ints
    absence: Absence | None = None


class Source:
    """A dump, and which of its boards and keys the page looks at.

    Attributes:
        rows: the rows looked at, int64 (n,), ascending: all, or evenly spaced ones.
        boards: their exponents, uint8 (n, S).
        left_out: why keys are not shown, by key.

    Raises:
        OutputError: the file has no boards, or values of another shape.
    """

    def __init__(self, file: ActivationsFile) -> None:
        self.file = file
        self._tensors = frozenset(file.tensor_names())
        dtype = file.dtype("boards") if "boards" in self._tensors else "no boards"
        if dtype != "uint8":
            raise self._refusal(f"boards must be uint8; got {dtype}")
        self._check_shape("boards")
        self.rows = spaced(len(file), MOST_BOARDS)
        self.boards: NDArray[np.uint8] = file.read_numpy("boards", self.rows)
        self.keys: list[str] = []
        self.left_out: dict[str, str] = {}
        # Keys with a section of their own come first, so that no other key takes their place.
        for key in sorted(file.keys(), key=lambda key: key not in _SHAPES):
            if reason := self._why_left_out(key):
                self.left_out[key] = reason
            else:
                self.keys.append(key)

    def _why_left_out(self, key: str) -> str:
        """Return the reason why a key is not shown; empty for a key that is."""
        try:
            shape, layers = self.file.shape(key), len(self.file.layers(key))
        except InvalidArgumentError:
            return "has a dtype that cannot be read"
        self._check_shape(key)
        values = math.prod(shape[1:])
        if len(shape) <= (2 if layers else 1) or not values:
            return "has no vectors"
        if values > MOST_VALUES:
            return f"has {values:,} values per board, more than the {MOST_VALUES:,} a page reads"
        if key == "attn_pattern" and not layers:
            return "has layers that the metadata does not number"
        if layers > MOST_LAYERS:
            return f"has {layers:,} layers, more than the {MOST_LAYERS} a page shows"
        return f"comes after the first {MOST_KEYS} keys" if len(self.keys) == MOST_KEYS else ""

    def _check_shape(self, key: str) -> None:
        shape = self.file.shape(key)
        allowed = [(len(self.file), *value) for value in _SHAPES.get(key, ())]
        fits = (
            len(shape) == len(each)
            and all(n > 0 and want in (n, None) for n, want in zip(shape, each, strict=True))
            for each in allowed
        )
        if allowed and not any(fits):
            wanted = " or ".join(shape_text([n or "any" for n in each]) for each in allowed)
            raise self._refusal(f"{key} must have shape {wanted}; got {shape_text(shape)}")

    def _refusal(self, reason: str) -> OutputError:
        return OutputError(f"cannot show {self.file.paths[0]}: {reason}")

    @cached_property
    def steps(self) -> Label:
        """Moves made in each game before the board."""
        return self._label("The steps of the games", ("step_index", "step_idx"), 1 << 53)

    @cached_property
    def played(self) -> Label:
        """Played moves, numbers of up, down, left, right."""
        return self._label("The moves that were played", ("move_dir", "move"), MOVES)

    def _label(self, what: str, names: tuple[str, ...], limit: int) -> Label:
        unknown = np.full(len(self.rows), -1)
        name = next((n for n in names if LABEL_PREFIX + n in self._tensors), None)
        if name is None:
            absence = Absence(f"{what} are not in this dump: ", f"--labels {names[0]}")
            return Label(unknown, absence)
        tensor = LABEL_PREFIX + name
        try:
            is_whole = self.file.dtype(tensor) in ("uint8", "int64")
        except InvalidArgumentError:
            is_whole = False
        if not is_whole or self.file.shape(tensor) != (len(self.file),):
            reason = f"{what} are not shown: label {name} must be one int64 or uint8 per board."
            return Label(unknown, Absence(reason))
        values = self.file.read_numpy(tensor, self.rows).astype(np.int64)
        values[(values < 0) | (values >= limit)] = -1
        if (values < 0).all():
            reason = f"{what} are not shown: label {name} has no value from 0 to {limit - 1:,}."
            return Label(values, Absence(reason))
        return Label(values)

    @cached_property
    def examples(self) -> Ints:
        """Some boards from the smallest sum of tiles to the largest, as places in `rows`."""
        tiles = np.exp2(np.arange(256))
        tiles[0] = 0  # An empty cell, not the tile 1.
        order = np.argsort(tiles[self.boards].sum(axis=1), kind="stable")
        count = min(MOST_EXAMPLES, len(order))
        chosen: Ints = order[np.linspace(0, len(order) - 1, count).round().astype(np.int64)]
        return chosen

    def absence(self, what: str, key: str) -> Absence:
        """Say why a section lacks its key."""
        if key in self.left_out:
            return Absence(f"{what} are left out: {key} {self.left_out[key]}.")
        return Absence(f"{what} are not in this dump: ", f"--outputs {key}")

    def places_within(self, key: str, nbytes: int | None = None) -> Ints:
        """Return evenly spaced places in `rows`, as many as fit by a key's fp32 values."""
        value_nbytes = 4 * math.prod(self.file.shape(key)[1:])
        return spaced(len(self.rows), max((nbytes or MOST_NBYTES) // value_nbytes, 1))

    def read(self, key: str, places: Ints, layer: int | None = None) -> Floats:
        """Read a key of boards at places in `rows`, float32; of all layers or one."""
        rows = self.rows[places]
        if self.file.dtype(key) == "bfloat16":
            values: Floats = self.file.read(key, rows, layer=layer).float().numpy()
            return values
        return self.file.read_numpy(key, rows, layer=layer).astype(np.float32)

    def stored_statistics(self, key: str) -> tuple[Mapping[str, Array] | None, str]:
        """Return the stored statistics of a key, or None and a sentence if they are unusable."""
        try:
            found = self.file.stats(key)
        except InvalidArgumentError:
            if not any(name.startswith(f"{STATISTICS_PREFIX}{key}/") for name in self._tensors):
                return None, ""
            return None, " The stored statistics are incomplete and not used."
        if (found["count"] < 1).any() or any((found[name] < 0).any() for name in _NOT_NEGATIVE):
            return None, " The stored statistics are impossible and not used."
        return found, ""


def spaced(count: int, most: int) -> Ints:
    """Return all of `count` places, or at most `most` of them, evenly spaced from the first."""
    return np.arange(count) if count <= most else np.arange(most) * count // most


class Choices(NamedTuple):
    """The heads' output on boards at `places` of the source's `rows`, (n,), and the model's moves.

    `probs` are probabilities, (n, M, O) of binned heads or (n, M) of a policy. `scores` are
    expected bins or probabilities, (n, M). `moves`, (n,), may be `NO_MOVE` or `UNKNOWN`.
    """

    places: Ints
    probs: Floats
    scores: Array
    moves: Ints
    is_binned: bool


def read_choices(source: Source, places: Ints | None = None) -> Choices | None:
    """Read the heads' output on boards, by default on as many as fit; None without heads."""
    key = next((key for key in ("head_probs", "head_logits") if key in source.keys), None)
    if key is None:
        return None
    places = source.places_within(key) if places is None else places
    probs = source.read(key, places)
    if key == "head_logits":
        exponentials = np.exp(probs - np.fmax.reduce(probs, axis=-1, keepdims=True))
        # One move's NaN must not become the others' of a policy.
        total = np.nansum if probs.ndim == 2 else np.sum
        probs = exponentials / total(exponentials, axis=-1, keepdims=True)
    bins = np.arange(probs.shape[-1], dtype=np.float64)
    scores = np.matmul(probs, bins) if probs.ndim == 3 else probs.astype(np.float64)
    moves = model_moves(scores, source.boards[places])
    return Choices(places, probs, scores, moves, is_binned=probs.ndim == 3)


def model_moves(scores: Array, boards: NDArray[np.uint8]) -> Ints:
    """Return the legal move with the highest score for each board, (n,), never one with NaN."""
    legal = legal_moves(np.ascontiguousarray(boards.T)).astype(np.bool_)
    usable = legal & ~np.isnan(scores)
    # An infinite score becomes the largest finite one, so that it still beats an illegal move.
    best: Ints = np.where(usable, np.nan_to_num(scores), -np.inf).argmax(axis=1)
    best[~usable.any(axis=1)] = UNKNOWN
    best[~legal.any(axis=1)] = NO_MOVE
    return best


@dataclass(frozen=True)
class KeyFigures:
    """Figures of a key's vectors. A vector is the last axis: one cell's, or one head's of a cell.

    Attributes:
        layers: numbers of the layers in the model, (L,); none for a key without.
        counts: boards that statistics are over, and boards that quantiles and cells are over.
        note: a sentence on stored statistics that are not used, or nothing.
        norm_mean: mean L2 norm of a vector, (L,).
        norm_quantiles: `QUANTILES` of the norms, (3, L).
        std: root of the mean variance of a feature, (L,).
        outliers: share of entries beyond `OUTLIER` in magnitude, (L,).
        largest: largest absolute entry of each feature, (L, F).
        cell_norms: mean norm at each cell, (L, S); None for keys without cells.
    """

    key: str
    layers: tuple[int, ...]
    counts: tuple[int, int]
    note: str
    norm_mean: Array
    norm_quantiles: Array
    std: Array
    outliers: Array
    largest: Array
    cell_norms: Array | None

    @property
    def numbers(self) -> Array:
        """Figures of each layer in the order of the table, without outliers, (L, 5)."""
        return np.stack([self.norm_mean, *self.norm_quantiles, self.std], axis=1)

    def top_features(self, layer: int) -> Ints:
        """Return the three features with the largest entries, NaN first, at a place in `layers`."""
        largest = np.nan_to_num(self.largest[layer], nan=np.inf)
        top: Ints = np.argsort(-largest, kind="stable")[:3]
        return top


def key_figures(source: Source, key: str) -> KeyFigures:
    """Take the statistics of a key from the file where it stores them, else from some boards."""
    stored, note = source.stored_statistics(key)
    layers = source.file.layers(key)
    places = source.places_within(key, FEW_NBYTES if stored else MOST_NBYTES)
    # The axis of one layer's value that counts the cells of the vectors.
    shape = source.file.shape(key)[2 if layers else 1 :]
    axis = 0 if len(shape) > 1 and shape[0] == CELLS else None
    axis = 1 if key in ("attn_scores", "attn_pattern") else axis
    quantiles, cell_norms, computed = [], [], []
    for layer in layers or [None]:
        values = source.read(key, places, layer)
        norms = np.sqrt(np.einsum("...f,...f->...", values, values, dtype=np.float64))
        quantiles.append(np.quantile(norms, QUANTILES))
        if axis is not None:
            others = tuple(i for i in range(norms.ndim) if i != 1 + axis)
            cell_norms.append(norms.mean(axis=others))
        if stored is None:
            vectors = Vectors("float32", None, values.shape)
            nbytes = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            computed.append(vectors.statistics(vectors.measure(nbytes)))
    found = stored or {name: np.stack([each[name] for each in computed]) for name in _STATISTICS}
    of_layers = {name: np.reshape(found[name], (len(layers) or 1, -1)) for name in _STATISTICS}
    largest = np.maximum(abs(of_layers["min"]), abs(of_layers["max"]))
    entries = of_layers["count"][:, 0] * largest.shape[1]
    return KeyFigures(
        key=key,
        layers=layers,
        counts=(len(source.file) if stored else len(places), len(places)),
        note=note,
        norm_mean=of_layers["norm_mean"][:, 0],
        norm_quantiles=np.stack(quantiles, axis=1),
        std=np.sqrt(of_layers["variance"].mean(axis=1)),
        outliers=of_layers["count_abs_gt_6"].sum(axis=1) / entries,
        largest=largest,
        cell_norms=np.stack(cell_norms) if cell_norms else None,
    )
