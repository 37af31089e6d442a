"""How sure a mean is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap

RESAMPLES = 2_000
SEED = 0  # of the resampling: the same scores have the same interval


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over rows; the mean itself, twice, where all values are equal."""
    if len(set(values)) == 1:
        return float(values[0]), float(values[0])
    found = bootstrap(
        (np.asarray(values),), np.mean, confidence_level=confidence, n_resamples=RESAMPLES, batch=200,
        method="percentile", rng=np.random.default_rng(SEED),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)
