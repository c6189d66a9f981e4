"""Statistics of several files' vectors, from the statistics that each file stores."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

_EXTREMES = {"min": np.minimum, "max": np.maximum}
_MEANS = ("mean", "norm_mean", "norm_square_mean")


def merge_stored(stored: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[np.float64]]:
    """Merge the stored statistics of one tensor, by Chan's rule in the order of the files.

    Args:
        stored: all statistics of each file by name.
    """
    return reduce(_merge, map(dict, stored))


def _merge(
    first: dict[str, NDArray[np.float64]], second: dict[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]]:
    count = first["count"] + second["count"]
    merged = {"count": count}
    for name, ours in first.items():
        theirs = second[name]
        n, m = first["count"], second["count"]
        if ours.ndim > n.ndim:
            n, m = n[..., None], m[..., None]
        if name in _EXTREMES:
            merged[name] = _EXTREMES[name](ours, theirs)
        elif name in _MEANS:
            merged[name] = (ours * n + theirs * m) / (n + m)
        elif name == "variance":
            distance = second["mean"] - first["mean"]
            m2 = ours * n + theirs * m + distance**2 * n * m / (n + m)
            merged[name] = m2 / (n + m)
        else:
            merged[name] = ours + theirs
    return merged
