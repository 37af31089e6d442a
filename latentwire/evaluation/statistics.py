"""Intervals and tests of means. scipy is imported where it is needed: workers start sooner without.

Rows that share a context are not independent: a message that lost a fact fails all of its
questions. So intervals and tests resample contexts, each with all of its rows, and never single
rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2_000
DRAWS_AT_ONCE = 100
"""Resamples that are held in memory together."""
CONFIDENCE = 0.95
SEED = 0
"""Of the resampling: the same scores have the same interval."""


def interval(values: Sequence[float], contexts: Sequence[str]) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean over rows, by a cluster bootstrap.

    ``contexts``: each row's context, by any name that tells them apart. Contexts are drawn with
    replacement, and a resample's mean is that of all rows of those drawn. One context alone has no
    interval: both ends are its mean.
    """
    return _interval(*_by_context(values, contexts))


def ratio(
    part: Sequence[float], whole: Sequence[float], contexts: Sequence[str]
) -> tuple[float, float, float] | None:
    """Return the sum of ``part`` over that of ``whole``, with its 95 % interval (low, high).

    Both have a value for each row, not below 0. ``contexts``: as in :func:`interval`. The bootstrap
    is paired: both sums of a resample are over the rows of the same contexts. A resample in which
    the whole is 0 has no ratio and is left out. ``None`` where the whole is 0 in the data.
    """
    part_G, _ = _by_context(part, contexts)
    whole_G, _ = _by_context(whole, contexts)
    if not whole_G.any():
        return None
    return float(part_G.sum() / whole_G.sum()), *_interval(part_G, whole_G)


def _interval(part_G: np.ndarray, whole_G: np.ndarray) -> tuple[float, float]:
    """Return the percentile interval of ``part_G.sum() / whole_G.sum()`` over resampled groups."""
    # Always the same draws: the two sums of a ratio, and equal scores, have equal resamples.
    groups, rng = len(part_G), np.random.default_rng(SEED)
    ratios = []
    for start in range(0, RESAMPLES, DRAWS_AT_ONCE):
        # [resamples, groups]: each resample draws as many groups as there are, with replacement.
        drawn_RG = rng.integers(groups, size=(min(DRAWS_AT_ONCE, RESAMPLES - start), groups))
        part_R, whole_R = part_G[drawn_RG].sum(1), whole_G[drawn_RG].sum(1)
        ratios.append(part_R[whole_R > 0] / whole_R[whole_R > 0])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return float(low), float(high)


def difference(
    first: Sequence[float], second: Sequence[float], contexts: Sequence[str]
) -> dict[str, float]:
    """Return the paired mean of ``first − second`` over rows, with ``low``, ``high`` and ``p``.

    ``contexts``: as in :func:`interval`, which gives the 95 % interval. ``p`` is how often so large
    a difference of either sign comes about where the two scores of all rows of a context are
    swapped at random.
    """
    from scipy.stats import permutation_test

    paired = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    low, high = interval(paired.tolist(), contexts)
    # Swapping the two scores of a context's rows turns the sign of its sum: a sign-flip test.
    total_G, _ = _by_context(paired.tolist(), contexts)
    if not np.isfinite(total_G).all():
        return {"difference": float(paired.mean()), "low": low, "high": high, "p": float("nan")}
    # Every swap gives the same, 0: nothing is left to be tested.
    if not total_G.any():
        return {"difference": 0.0, "low": low, "high": high, "p": 1.0}
    test = permutation_test(
        (total_G,),
        np.sum,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=200,
        vectorized=True,
        rng=np.random.default_rng(SEED),
    )
    return {"difference": float(paired.mean()), "low": low, "high": high, "p": float(test.pvalue)}


def _by_context(values: Sequence[float], contexts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return each context's sum of values and number of rows, in order of first appearance."""
    numbers = {context: number for number, context in enumerate(dict.fromkeys(contexts))}
    context_N = np.array([numbers[context] for context in contexts])
    if len(context_N) != len(values):
        raise ValueError(
            f"each value needs its context, got {len(values)} values and {len(context_N)} contexts"
        )
    # total_G[g] = Σ values[n] over n with context_N[n] = g
    total_G = np.bincount(context_N, weights=np.asarray(values, np.float64))
    return total_G, np.bincount(context_N).astype(np.float64)
