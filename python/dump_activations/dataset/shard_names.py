"""Names of shards: their order, which is that of the step indices, may not be what it seems."""

import re
from collections.abc import Sequence
from pathlib import Path

from dump_activations.errors import warn


def warn_of_odd_names(dataset: Path, names: Sequence[str]) -> None:
    """Warn where numbered shards are not in the order of their numbers, or some are missing."""
    found = [re.fullmatch(r"steps-([0-9]+)\.npy", name) for name in names]
    numbers = [int(match[1]) for match in found if match]
    if len(numbers) < len(names):
        return
    # The first one is number 0 or 1.
    expected = range(min(numbers[0], 1), min(numbers[0], 1) + len(numbers))
    odd = next((i for i, (n, e) in enumerate(zip(numbers, expected, strict=True)) if n != e), None)
    if odd is None:
        return
    if numbers != sorted(set(numbers)):
        text = (
            "its shards are read in the order of their names, which is not that of their numbers: "
            f"{names[0]} to {names[-1]}"
        )
    else:
        text = (
            f"no shard number {expected[odd]} before {names[odd]}; step indices count the rows of "
            "those that are there"
        )
    warn(f"{dataset}: {text}")
