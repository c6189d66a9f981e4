"""Statistics as their definitions have them: in fractions, or as NumPy has them in float64."""

from fractions import Fraction

import numpy as np


def as_float64(values: np.ndarray) -> np.ndarray:
    """Widen float32, float16, or bfloat16 as its bits in uint16."""
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return values.astype(np.float64)


def numpy_statistics(values_VF: np.ndarray) -> dict[str, np.ndarray]:
    """Return the statistics of vectors, float64 (V, F), by name."""
    with np.errstate(all="ignore"):
        norms = np.sqrt((values_VF**2).sum(1))
        return {
            "count": np.float64(len(values_VF)),
            "mean": values_VF.mean(0),
            "variance": values_VF.var(0),
            "min": values_VF.min(0),
            "max": values_VF.max(0),
            "outliers": (np.abs(values_VF) > 6).sum(0).astype(np.float64),
            "norm_mean": norms.mean(),
            "norm_square_mean": (norms**2).mean(),
        }


def exact_statistics(values_VF: np.ndarray) -> dict[str, np.ndarray]:
    """Return those of finite vectors that are rational, rounded once."""
    columns = [[Fraction(value) for value in column] for column in values_VF.T.tolist()]
    n = len(values_VF)
    means = [sum(column) / n for column in columns]
    squares = [sum(value * value for value in column) / n for column in columns]
    variances = [square - mean * mean for square, mean in zip(squares, means, strict=True)]
    return {
        "mean": np.array([float(mean) for mean in means]),
        "variance": np.array([float(variance) for variance in variances]),
        "norm_square_mean": np.float64(float(sum(squares))),
    }
