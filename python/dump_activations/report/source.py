"""What the sections take their figures from: a dump, and which of its boards they look at.

Shape letters: N boards of the dump, n boards looked at, L layers, S cells (16), Q query heads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dump_activations.dtypes import CELLS, LABEL_PREFIX, MOVES, STATISTICS_PREFIX
from dump_activations.errors import InvalidArgumentError, OutputError
from dump_activations.storage.reading.activations_file import ActivationsFile
from dump_activations.storage.statistics import STATISTICS

Floats = NDArray[np.float32]

# Boards of which boards and labels are read; of one beyond, evenly spaced rows stand for all.
MOST_BOARDS = 1_000_000

# Bytes of one activation key, in fp32, that are read: few where the file has its statistics.
_MOST_NBYTES, _FEW_NBYTES = 128 << 20, 32 << 20

# Fields of the rows that say how far the game was, by the name in each kind of dataset.
_STEP_LABELS = ("step_index", "step_idx")

_MOVE_LABELS = ("move_dir", "move")


# Shapes of a board's value, None for any length: of what is drawn as what it is.
_SHAPES: dict[str, tuple[tuple[int | None, ...], ...]] = {
    "boards": ((CELLS,),),
    "head_probs": ((MOVES,), (MOVES, None)),
    "head_logits": ((MOVES,), (MOVES, None)),
    "attn_pattern": ((None, None, CELLS, CELLS),),
}


@dataclass(frozen=True)
class Source:
    """A dump that is looked at."""

    file: ActivationsFile

    def __post_init__(self) -> None:
        """Raise OutputError for a file that is no dump: it has no boards, or misshapen values."""
        if "boards" not in self.file.tensor_names() or self.file.dtype("boards") != "uint8":
            raise self._not_shown("it has no boards, or others than of bytes")
        for key in ("boards", *self.keys):
            shape = self.file.shape(key)
            wanted = [(len(self.file), *value) for value in _SHAPES.get(key, ())]
            if wanted and not any(_fits(shape, each) for each in wanted):
                raise self._not_shown(f"its {key} are {'x'.join(map(str, shape))}")

    def _not_shown(self, reason: str) -> OutputError:
        return OutputError(f"{self.file.paths[0]} is no dump that can be shown: {reason}")

    @cached_property
    def keys(self) -> list[str]:
        """The activation keys of the dump."""
        return self.file.keys()

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """The rows looked at, int64 (n,), ascending: all, or evenly spaced ones."""
        return spaced(len(self.file), MOST_BOARDS)

    @cached_property
    def boards(self) -> NDArray[np.uint8]:
        """Exponents, uint8 (n, S)."""
        boards: NDArray[np.uint8] = self.file.read_numpy("boards", self.rows)
        return boards

    @cached_property
    def steps(self) -> NDArray[np.int64] | None:
        """How many moves each game was old, (n,); None where no label says it."""
        return self._label(_STEP_LABELS)

    @cached_property
    def moves(self) -> NDArray[np.int64] | None:
        """The moves that were played, (n,), numbers of up, down, left, right; None without."""
        return self._label(_MOVE_LABELS)

    def _label(self, names: tuple[str, ...]) -> NDArray[np.int64] | None:
        for name in names:
            if name in self.file.labels and self._is_whole_number(LABEL_PREFIX + name):
                return self.file.read_numpy(LABEL_PREFIX + name, self.rows).astype(np.int64)
        return None

    def _is_whole_number(self, name: str) -> bool:
        dtype = self.file.dtype(name)
        return len(self.file.shape(name)) == 1 and dtype in ("uint8", "int64")

    def rows_within(self, key: str, *, few: bool = False) -> NDArray[np.int64]:
        """Return places in `rows` whose values of a key are soon read, evenly spaced."""
        board_nbytes = 4 * int(np.prod(self.file.shape(key)[1:]))
        most = (_FEW_NBYTES if few else _MOST_NBYTES) // board_nbytes
        return spaced(len(self.rows), max(most, 1))

    def stored_statistics(self, key: str) -> Mapping[str, NDArray[np.float64]] | None:
        """Return the statistics of a key, (L, F) and (L,) or without L; None without."""
        prefix = f"{STATISTICS_PREFIX}{key}"
        names = self.file.tensor_names()
        if not any(name.startswith((f"{prefix}/", f"{prefix}.")) for name in names):
            return None
        try:
            found = self.file.stats(key)
        except InvalidArgumentError:
            found = {}
        if len(found) < len(STATISTICS):
            raise self._not_shown(f"its {prefix}/ are not those of {key}")
        return found

    def read(self, key: str, places: NDArray[np.int64], *, layer: int | None = None) -> Floats:
        """Read a key of boards at places in `rows`, float32; of all layers or one."""
        rows = self.rows[places]
        if self.file.dtype(key) == "bfloat16":
            values: Floats = self.file.read(key, rows, layer=layer).float().numpy()
            return values
        return self.file.read_numpy(key, rows, layer=layer).astype(np.float32)


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    """Say whether a shape is as wanted, without an axis of length 0."""
    return len(shape) == len(wanted) and all(
        length > 0 and want in (length, None) for length, want in zip(shape, wanted, strict=True)
    )


def spaced(count: int, most: int) -> NDArray[np.int64]:
    """Return all of `count` places, or at most `most` of them, evenly spaced from the first."""
    if count <= most:
        return np.arange(count)
    return np.arange(most) * count // most


def looked_at(count: int, of: int) -> str:
    """Say of how many boards figures are."""
    if count == of:
        return f"all {of:,} boards"
    return f"{count:,} of {of:,} boards, evenly spaced"
