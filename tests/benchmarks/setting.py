"""Settings of every section: directories, rounds, datasets, and the start of processes."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dump_activations import StepsDataset, demo

BENCHMARKS = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How to measure.

    Attributes:
        scratch: directory for checkpoints, datasets and output.
        memory: directory of a memory-backed file system.
        rounds: how often each contender runs.
        seconds: how long one run of the 50M model should take, about.
        gigabytes: size of the datasets and files that are read from and written to a disk.
    """

    scratch: Path
    memory: Path
    rounds: int
    seconds: float
    gigabytes: float

    @property
    def environment(self) -> dict[str, str]:
        """Variables for child processes, which find their bytecode ready as installed programs do.

        The warm-up compiles it into the scratch directory, despite PYTHONDONTWRITEBYTECODE.
        """
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        return {**kept, "PYTHONPYCACHEPREFIX": str(self.scratch / "bytecode")}

    def dataset(self, rows: int) -> Path:
        """Directory of a dataset of at least this many steps: the demo's, repeated."""
        directory = self.scratch / f"dataset-{rows}"
        if not directory.exists():
            directory.mkdir()
            shards = sorted(demo.DATASET.glob("steps-*.npy"))
            steps = np.concatenate([np.load(path) for path in shards])
            np.save(directory / "steps-00000.npy", np.tile(steps, -(-rows // len(steps))))
        return directory

    def boards(self, n: int) -> Tensor:
        """Boards of such a dataset, uint8 (n, 16)."""
        dataset = StepsDataset(self.dataset(n))
        return torch.from_numpy(dataset.read_boards(dataset.sample_indices(n)))


def command(*arguments: object) -> list[str]:
    """The dump command as a process's arguments."""
    return [sys.executable, "-m", "dump_activations", *map(str, arguments)]
