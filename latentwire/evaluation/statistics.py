"""How sure a mean is. scipy is imported by whoever asks: workers, which train, are without it sooner."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2_000
SEED = 0  # of the resampling: the same scores have the same interval


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over rows; the mean itself, twice, where all values are equal."""
    from scipy.stats import bootstrap

    if len(set(values)) == 1:
        return float(values[0]), float(values[0])
    found = bootstrap(
        (np.asarray(values),), np.mean, confidence_level=0.95, n_resamples=RESAMPLES, batch=200,
        method="percentile", rng=np.random.default_rng(SEED),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def difference(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Mean of ``first − second`` over rows that belong together, its 95 % interval (``low``, ``high``) and ``p``.

    ``p``: how often so large a difference of either sign comes about where each row's two scores are swapped at random.
    """
    from scipy.stats import permutation_test

    paired = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    low, high = interval(paired.tolist())
    if not paired.any():
        return {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    test = permutation_test(
        (paired,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, batch=200, vectorized=True,
        rng=np.random.default_rng(SEED),
    )  # fmt: skip
    return {"difference": float(paired.mean()), "low": low, "high": high, "p": float(test.pvalue)}
