"""Seeded draws, equal to NumPy's index for index, in memory that grows with the draw alone."""

import operator

import numpy as np
from numpy.typing import NDArray

from dump_activations import _rust
from dump_activations.errors import InvalidArgumentError, option


def draw(population: int, n: int, seed: int) -> NDArray[np.int64]:
    """Draw `n` of the numbers from 0 up to `population`, int64 (n,).

    They are `numpy.random.default_rng(seed).choice(population, size=n, replace=False)`; where n
    exceeds the population, `default_rng(seed).integers(0, population, size=n)`.

    Raises:
        InvalidArgumentError: n is below 1, or the seed negative.
    """
    n, seed = operator.index(n), operator.index(seed)
    if n <= 0:
        raise InvalidArgumentError(f"{option('n_samples')}: draw at least 1, not {n}")
    if seed < 0:
        raise InvalidArgumentError(f"{option('seed')}: must be 0 or more, not {seed}")
    generator = np.random.default_rng(seed)
    try:
        if n > population:
            return generator.integers(0, population, size=n, dtype=np.int64)
        if population <= 10_000 or n <= population // 50:
            return generator.choice(population, size=n, replace=False)
        # NumPy shuffles the tail of the whole range here, in memory that grows with the range.
        sample = np.empty(n, np.int64)
        state = generator.bit_generator.state["state"]
        _rust.shuffle_tail(population, state["state"], state["inc"], sample)
    except (MemoryError, ValueError) as error:
        text = f"{option('n_samples')}: {n} are more than memory can hold"
        raise InvalidArgumentError(text) from error
    return sample
