"""The checkpoint and the pool that `--demo` uses; README.md beside this file says what they are."""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
POOL = Path(__file__).parent / "pool"
