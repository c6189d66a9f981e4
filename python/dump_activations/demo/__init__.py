"""The checkpoint and the dataset that `--demo` uses; README.md beside this file says what they are."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
DATASET = Path(__file__).parent / "dataset"
