"""Statistics by their definitions, as NumPy computes them in float64."""

import numpy as np


def as_float64(values: np.ndarray) -> np.ndarray:
    """Widen float64, float32, float16, or bfloat16 as its bits in uint16."""
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
            "count_abs_gt_6": (np.abs(values_VF) > 6).sum(0).astype(np.float64),
            "norm_mean": norms.mean(),
            "mean_squared_norm": (values_VF**2).sum(1).mean(),
        }
