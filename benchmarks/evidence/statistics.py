"""From runs to effect sizes: means, standard deviations, paired differences and their intervals.

Two arms are compared seed by seed, on the same images, from the same base weights:

    d_i = accuracy(arm, seed i) - accuracy(base, seed i)

and the interval is a 95 % bootstrap-t one of the mean of d_i: seeds are drawn with replacement, and
the deviation of each draw's mean is counted in its own standard errors. With ten seeds it holds the
true mean in 93 to 95 of 100 cases, where a BCa interval does in 88 to 90 (normal, t with 4 degrees
of freedom, gamma; `tests/test_evidence.py` simulates the first). Intervals are not widened for how
many arms are compared.

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 12.5.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 9999
FEWEST = 5  # seeds that an interval is told of
_SEED = 0


@dataclass(frozen=True)
class Paired:
    """A mean difference.

    Attributes:
        count: Seeds that both arms have.
        mean: Of the differences.
        low: Lower end of the interval; None with less than `FEWEST` seeds.
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
    differences = np.array([first[seed] - second[seed] for seed in seeds])
    mean = float(differences.mean())
    if np.ptp(differences) < 1e-12 and len(seeds) > 1:  # all resamples are the same then
        return Paired(len(seeds), mean, mean, mean)
    if len(seeds) < FEWEST:
        return Paired(len(seeds), mean, None, None)
    return Paired(len(seeds), mean, *_interval(tuple(differences.tolist())))


@functools.cache  # tables, sentences and figures ask for the same ones
def _interval(of_seeds: tuple[float, ...]) -> tuple[float, float]:
    differences = np.array(of_seeds)
    count, mean = len(differences), differences.mean()
    drawn = np.random.default_rng(_SEED).integers(0, count, (RESAMPLES, count))
    means, errors = differences[drawn].mean(1), _standard_errors(differences[drawn])
    told = errors > 1e-9 * abs(differences).max()  # not of one seed, drawn again and again
    in_errors = (means[told] - mean) / errors[told]
    low, high = np.quantile(in_errors, ((1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2))
    error = _standard_errors(differences[None])[0]
    return float(mean - low * error), float(mean - high * error)


def _standard_errors(samples: np.ndarray) -> np.ndarray:
    return samples.std(1, ddof=1) / samples.shape[1] ** 0.5
