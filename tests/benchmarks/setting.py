"""Settings of every section: directories, rounds, and the start of processes."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from workload import make_checkpoint_50m, make_dataset

from dump_activations import StepsDataset


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How to measure.

    Attributes:
        scratch: directory for checkpoints, datasets and the files that are written.
        memory: directory of a memory-backed file system.
        rounds: how often each contender runs.
        seconds: how long one run of the 50M model should take, about.
        trace: where to leave a profiler trace of the GPU section, if anywhere.
    """

    scratch: Path
    memory: Path
    rounds: int
    seconds: float
    trace: Path | None

    @property
    def environment(self) -> dict[str, str]:
        """Variables for child processes, which find their bytecode ready as installed programs do.

        The warm-up compiles it into the scratch directory, whatever PYTHONDONTWRITEBYTECODE says.
        """
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        return {**kept, "PYTHONPYCACHEPREFIX": str(self.scratch / "bytecode")}

    def dataset(self, rows: int) -> Path:
        """Directory of a dataset of at least so many steps."""
        return make_dataset(self.scratch / f"dataset-{rows}", rows)

    def boards(self, n: int) -> Tensor:
        """Boards of such a dataset, uint8 (n, 16)."""
        dataset = StepsDataset(self.dataset(n))
        return torch.from_numpy(dataset.read_boards(dataset.sample_indices(n)))

    def checkpoint_50m(self) -> Path:
        """Directory of an untrained model of 50M parameters."""
        return make_checkpoint_50m(self.scratch / "50m")


def command(*arguments: object) -> list[str]:
    """The dump command as a process's arguments."""
    return [sys.executable, "-m", "dump_activations", *map(str, arguments)]


def baseline(*arguments: object) -> list[str]:
    """The plain script as a process's arguments."""
    script = Path(__file__).parent / "baseline.py"
    return [sys.executable, str(script), *map(str, arguments)]
