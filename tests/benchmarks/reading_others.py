"""Shuffled cells as other packages read them, by their own code; this package is not needed.

    uv venv others && uv pip install --python others sae-lens saev
    others/bin/python tests/benchmarks/reading_others.py [--boards 4096]

A cell is 512 values, in fp16 but for saev, whose files hold fp32; batches of 8192. Files are
cached. Prints millions of cells a second, the best of three epochs.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from datasets import Array2D, Dataset, Features, List, Value
from sae_lens.training.mixing_buffer import mixing_buffer
from saev import activations, config
from torch.utils.data import DataLoader

CELLS, WIDTH, BATCH = 16, 512, 8192


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--boards", type=int, default=4096)
    boards = parser.parse_args().boards
    hidden = np.random.default_rng(0).standard_normal((boards, CELLS, WIDTH), dtype=np.float32)
    with tempfile.TemporaryDirectory() as directory:
        for name, epoch in {
            "datasets, a cell a row, shuffled": with_datasets(hidden, Path(directory) / "a"),
            "SAELens, cached activations": with_saelens(hidden, Path(directory) / "b"),
            "saev": with_saev(hidden, Path(directory) / "c"),
        }.items():
            print(f"{best(epoch) / 1e6:8.4f}  {name}", flush=True)


def best(epoch: Callable[[], Iterable[torch.Tensor]]) -> float:
    """Cells a second."""
    speeds = []
    for _ in range(3):
        started = time.perf_counter()
        cells = sum(len(batch) for batch in epoch())
        speeds.append(cells / (time.perf_counter() - started))
    return max(speeds)


def stored(column: np.ndarray, path: Path) -> Dataset:
    """Write an Arrow file of fp16 arrays, one a row, and map it; matrices as SAELens has them."""
    kind = Array2D(column.shape[1:], "float16") if column.ndim > 2 else List(Value("float16"))
    features = Features({"acts": kind})
    Dataset.from_dict({"acts": column.astype(np.float16)}, features=features).save_to_disk(path)
    return Dataset.load_from_disk(path).with_format("torch")


def with_datasets(hidden: np.ndarray, path: Path) -> Callable[[], Iterable[torch.Tensor]]:
    cells = stored(hidden.reshape(-1, WIDTH), path)
    return lambda: (batch["acts"] for batch in cells.shuffle().iter(BATCH))


def with_saelens(hidden: np.ndarray, path: Path) -> Callable[[], Iterable[torch.Tensor]]:
    """Feed its buffer as `ActivationsStore` does from cached activations, 32 prompts at a time."""
    prompts = stored(hidden, path)

    def loader() -> Iterable[torch.Tensor]:
        for first in range(0, len(prompts), 32):
            yield prompts[first : first + 32]["acts"].reshape(-1, WIDTH)

    return lambda: mixing_buffer(64 * 32 * CELLS, BATCH, iter(loader()))


def with_saev(hidden: np.ndarray, path: Path) -> Callable[[], Iterable[torch.Tensor]]:
    path.mkdir()
    boards = len(hidden)
    with_cls = np.concatenate([hidden[:, :1], hidden], axis=1)[:, None]
    with_cls.tofile(path / "acts000000.bin")
    about = {
        "vit_family": "clip",
        "vit_ckpt": "",
        "layers": [0],
        "n_patches_per_img": CELLS,
        "cls_token": True,
        "d_vit": WIDTH,
        "seed": 0,
        "n_imgs": boards,
        "n_patches_per_shard": boards * (CELLS + 1),
        "data": "",
    }
    (path / "metadata.json").write_text(json.dumps(about))
    cells = activations.Dataset(
        config.DataLoad(str(path), layer=0, scale_mean=False, scale_norm=False)
    )
    return lambda: (batch["act"] for batch in DataLoader(cells, batch_size=BATCH, shuffle=True))


if __name__ == "__main__":
    main()
