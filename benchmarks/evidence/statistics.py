"""From runs to effect sizes: means, standard deviations, paired differences and their intervals.

Two arms are compared seed by seed, on the same images, from the same base weights:

    d_i = accuracy(arm, seed i) - accuracy(base, seed i)

and the interval is a 95 % bootstrap one (bias-corrected and accelerated) of the mean of d_i, where
seeds are drawn with replacement. Intervals are not widened for how many arms are compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 9999
_SEED = 0


@dataclass(frozen=True)
class Paired:
    """A mean difference.

    Attributes:
        count: Seeds that both arms have.
        mean: Of the differences.
        low: Lower end of the interval; None with less than two seeds.
        high: Upper end.
    """

    count: int
    mean: float
    low: float | None
    high: float | None

    @property
    def side(self) -> int:
        """1 or -1 where the whole interval is above or below zero; 0 where it holds zero."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample; None of less than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Paired | None:
    """Compare two arms seed by seed.

    Args:
        first: Accuracy by seed.
        second: Likewise, of what it is compared with.

    Returns:
        first - second, over the seeds that both have; None where there are none.
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    a, b = (np.array([side[seed] for seed in seeds]) for side in (first, second))
    mean = float(np.mean(a - b))
    if len(seeds) == 1:
        return Paired(1, mean, None, None)
    if np.ptp(a - b) == 0:  # all resamples are the same then
        return Paired(len(seeds), mean, mean, mean)
    low, high = _interval(a, b)
    return Paired(len(seeds), mean, low, high)


def _interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    from scipy.stats import bootstrap

    result = bootstrap(
        (a, b),
        lambda first, second, axis: np.mean(first - second, axis=axis),
        paired=True,
        vectorized=True,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(_SEED),
    )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high)
