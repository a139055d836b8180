"""When a trend reaches a threshold: the probability that it lies beyond it, so many steps ahead."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import ndtr

from probe.forecast.hypotheses import Array
from probe.forecast.trend import DRIFT, LEVEL, NOISE, Trend, added_variance, geometric

FARTHEST = 3000
"""Optimizer steps ahead up to which a forecast looks; what comes later counts as never."""
AHEAD = np.unique(np.concatenate([np.arange(10), np.geomspace(10, FARTHEST, 120).round()])).astype(np.int64)
"""Numbers of steps ahead at which the probability is worked out."""


@dataclass(frozen=True)
class Arrival:
    """The distribution of the number of optimizer steps until the entropy is beyond a threshold.

    Attributes:
        chance: `(S, len(AHEAD))`, probability that it has been reached, not falling.
    """

    chance: Array

    def within(self, steps: float) -> Array:
        """`(S,)`: probability that it is reached within `steps`, at most `FARTHEST`."""
        return np.array([np.interp(steps, AHEAD, row) for row in self.chance])

    def quantile(self, probability: float) -> Array:
        """`(S,)`: steps by which it is reached with this probability; infinite if never."""
        reached = self.chance >= probability
        after = reached.argmax(1)
        before = np.maximum(after - 1, 0)
        row = np.arange(len(self.chance))
        low, high = self.chance[row, before], self.chance[row, after]
        share = np.where(after == 0, 0.0, (probability - low) / np.maximum(high - low, 1e-300))
        steps = AHEAD[before] + share * (AHEAD[after] - AHEAD[before])
        return np.where(reached.any(1), steps, np.inf)


def arrival(trend: Trend, threshold: Array, rising: bool = False) -> Arrival:
    """When the entropy falls to a threshold, or rises to it.

    The chance of having reached it within `h` steps is taken as the largest probability, up to `h`, of lying at it or
    beyond: an average of normal distribution functions over the hypotheses, each with the uncertainty of level and
    drift, the wander of the drift and the noise of the steps.

    Args:
        trend: from the readings.
        threshold: `(S,)` nats per token, above 0.
        rising: whether it is reached from below.
    """
    given = trend.given
    g = given.transform(threshold[:, None] / trend.unit)
    beyond = np.empty((len(threshold), len(AHEAD)))
    P = trend.covariance
    for i, (drift, noise, by_wander, by_noise) in enumerate(_spread(tuple(given.persistence), trend.phi)):
        mean = trend.mean[LEVEL] + drift * trend.mean[DRIFT] + noise * trend.mean[NOISE]
        variance = (
            P[LEVEL, LEVEL]
            + drift**2 * P[DRIFT, DRIFT]
            + noise**2 * P[NOISE, NOISE]
            + 2 * (drift * P[LEVEL, DRIFT] + noise * P[LEVEL, NOISE] + drift * noise * P[DRIFT, NOISE])
            + trend.wander * by_wander
            + trend.noise * by_noise
        )
        z = (g - mean) / np.sqrt(np.maximum(variance, 1e-24))
        beyond[:, i] = (trend.weight * ndtr(-z if rising else z)).sum(1)
    return Arrival(np.maximum.accumulate(beyond, axis=1))


@lru_cache(maxsize=8)
def _spread(persistence: tuple[float, ...], phi: float) -> list[tuple[Array, float, Array, float]]:
    """For each of `AHEAD`: what drift and noise now count in the level then, and what wander and new noise add."""
    rho, inverse = np.unique(np.array(persistence), return_inverse=True)
    parts, done = [], 0
    by_wander = by_noise = None
    for steps in AHEAD:
        by_wander = added_variance(rho, int(steps) - done, by_wander)
        by_noise = added_variance(phi, int(steps) - done, by_noise)
        done = int(steps)
        new = float(by_noise[0]) * (1 - phi * phi)
        parts.append((geometric(rho, done)[inverse], float(geometric(phi, done)), by_wander[0][inverse], new))
    return parts
