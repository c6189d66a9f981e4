"""The checkpoint and the dataset of `--demo`; README.md in this directory describes them."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
DATASET = Path(__file__).parent / "dataset"
