"""Random numbers that depend on what they are for and never on what ran before: resume needs no saved state."""

from __future__ import annotations

import numpy as np


def derive_seed(seed: int, *words: int) -> int:
    """Mix a seed with whole numbers >= 0 into 64 independent bits (numpy's SeedSequence, stable across versions)."""
    low, high = np.random.SeedSequence([seed, *words]).generate_state(2, np.uint32)
    return (int(high) << 32) | int(low)


def derive_uniform(seed: int, *words: int) -> float:
    """Draw a number in [0, 1) that is a pure function of the arguments."""
    return (derive_seed(seed, *words) >> 11) * 2.0**-53


def derive_order(count: int, seed: int, *words: int) -> np.ndarray:
    """Shuffle 0 … count-1 as a pure function of the arguments; (count,) int64.

    Sorts raw PCG64 output, which numpy keeps stable across versions; its `permutation` isn't promised to be.
    """
    raw = np.random.PCG64(np.random.SeedSequence([seed, *words])).random_raw(count)
    return np.argsort(raw, kind="stable")
