"""Steps datasets in every row layout, written and decoded with plain NumPy."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_PACKED_FIELDS = [
    ("run_id", "<u4"),
    ("step_index", "<u4"),
    ("board", "<u8"),
    ("board_eval", "<i4"),
    ("tile_65536_mask", "<u2"),
    ("move_dir", "u1"),
    ("valuation_type", "u1"),
    ("ev_legal", "u1"),
    ("max_rank", "u1"),
    ("seed", "<u4"),
    ("branch_evs", "<f4", (4,)),
]

ROW_DTYPES = {
    "packed_46": np.dtype(_PACKED_FIELDS),
    "aligned_48": np.dtype(_PACKED_FIELDS, align=True),
    "legacy_move": np.dtype(
        [("move", "u1"), ("board", "<u8"), ("ev_values", "<f4", (4,)), ("run_id", "<u4")]
    ),
    "legacy_move_dir": np.dtype([("board", "<u8"), ("move_dir", "i1"), ("score", "<f8")]),
    "selfplay_v1": np.dtype([("run_id", "<u8"), ("step_idx", "<u4"), ("exps", "u1", (16,))]),
}
assert ROW_DTYPES["packed_46"].itemsize == 46
assert ROW_DTYPES["aligned_48"].itemsize == 48
assert ROW_DTYPES["selfplay_v1"].itemsize == 28


@dataclass(frozen=True)
class Dataset:
    """A dataset directory, its rows in the order of the shards, and their decoded boards."""

    path: Path
    rows: np.ndarray
    boards: np.ndarray


def random_boards(n: int, *, seed: int, largest: int = 16) -> np.ndarray:
    """Return uint8 (n, 16) boards, all exponents up to `largest` among them."""
    boards = np.random.default_rng(seed).integers(0, largest + 1, size=(n, 16), dtype=np.uint8)
    boards[0] = np.arange(16) % (largest + 1)
    boards[-1] = largest
    return boards


def encode_rows(boards: np.ndarray, layout: str, *, seed: int = 0) -> np.ndarray:
    """Write boards into rows of a layout. All other fields are random bytes."""
    dtype = ROW_DTYPES[layout]
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, size=(len(boards), dtype.itemsize), dtype=np.uint8)
    rows = noise.view(dtype).reshape(-1).copy()
    if layout == "selfplay_v1":
        rows["exps"] = boards
        return rows
    packed, mask = [], []
    for board in boards.tolist():
        word, high = 0, 0
        for cell, exponent in enumerate(board):
            word |= min(exponent, 15) << (60 - 4 * cell)
            high |= (exponent == 16) << cell
        packed.append(word)
        mask.append(high)
    rows["board"] = packed
    if "tile_65536_mask" in dtype.names:
        rows["tile_65536_mask"] = mask
    else:
        assert not any(mask)
    return rows


def naive_boards(rows: np.ndarray) -> np.ndarray:
    """Decode rows to exponents, one cell of one row at a time: uint8 (n, 16)."""
    if "board" not in rows.dtype.names:
        return rows["exps"].copy()
    boards = np.zeros((len(rows), 16), dtype=np.uint8)
    for i, row in enumerate(rows):
        word = int(row["board"])
        mask = int(row["tile_65536_mask"]) if "tile_65536_mask" in rows.dtype.names else 0
        for cell in range(16):
            nibble = (word >> (60 - 4 * cell)) & 15
            boards[i, cell] = 16 if mask >> cell & 1 else nibble
    return boards


def write_shards(
    directory: Path, rows: np.ndarray, sizes: Sequence[int], *, names: Sequence[str] | None = None
) -> None:
    """Save consecutive rows as shards of these sizes, in the order of `names`."""
    assert sum(sizes) == len(rows)
    directory.mkdir(parents=True, exist_ok=True)
    first = 0
    for i, size in enumerate(sizes):
        name = names[i] if names else f"steps-{i:05}.npy"
        np.save(directory / name, rows[first : first + size], allow_pickle=False)
        first += size


def make_dataset(
    directory: Path, layout: str, *, n: int = 101, shards: int = 1, seed: int = 0
) -> Dataset:
    """Write a dataset of random boards: one `steps.npy`, or several uneven shards."""
    largest = 15 if layout.startswith("legacy") else 16  # No legacy row can hold a tile of 65536.
    boards = random_boards(n, seed=seed, largest=largest)
    rows = encode_rows(boards, layout, seed=seed)
    if shards == 1:
        write_shards(directory, rows, [n], names=["steps.npy"])
    else:
        sizes = [n // (2 * shards)] * (shards - 1)
        write_shards(directory, rows, [*sizes, n - sum(sizes)])
    return Dataset(directory, rows, boards)


def read_dataset(directory: Path) -> np.ndarray:
    """Return all rows of a dataset, shards in lexicographic order."""
    shards = sorted(directory.glob("steps-*.npy")) or [directory / "steps.npy"]
    return np.concatenate([np.load(shard, allow_pickle=False) for shard in shards])


def numpy_indices(dataset_size: int, n: int, seed: int) -> np.ndarray:
    """Return the step indices that the format promises."""
    rng = np.random.default_rng(seed)
    if n <= dataset_size:
        return rng.choice(dataset_size, size=n, replace=False)
    return rng.integers(0, dataset_size, size=n, dtype=np.int64)
