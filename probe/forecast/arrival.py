"""When a trend reaches a threshold: the probability that it lies beyond it, so many steps ahead."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from probe.forecast.hypotheses import Array
from probe.forecast.trend import DRIFT, LEVEL, NOISE, Trend

FARTHEST = 3000
"""Optimizer steps ahead up to which a forecast looks; what comes later counts as never."""
AHEAD = np.unique(np.concatenate([np.arange(10), np.geomspace(10, FARTHEST, 120).round()])).astype(np.int64)
"""Numbers of steps ahead at which the probability is worked out first: every one at the beginning, later one in about
5 % more. Between two of them it is worked out where a quantile lies."""
Steps = NDArray[np.int64]


@dataclass(frozen=True)
class Crossing:
    """A trend and a threshold: how likely the one is beyond the other, so many steps ahead.

    Attributes:
        trend: from the readings.
        threshold: `(S, G)`, in the coordinates of the hypotheses.
        rising: whether it is reached from below.
    """

    trend: Trend
    threshold: Array
    rising: bool = False

    def beyond(self, steps: Steps) -> Array:
        """`(S,)`: the chance of lying at the threshold or beyond after `steps`, `(S,)` whole numbers up to `FARTHEST`.

        An average of normal distribution functions over the hypotheses, each with the uncertainty of level and drift,
        the wander of the drift and the noise of the steps.
        """
        trend, P = self.trend, self.trend.covariance
        reach, added, of_drift = self._reach
        drift, by_wander = reach[steps[:, None], of_drift], added[steps[:, None], of_drift]
        noise = reach[steps, -1:]
        by_noise = added[steps, -1:] * (1 - trend.phi**2)  # the noise is stationary
        mean = trend.mean[LEVEL] + drift * trend.mean[DRIFT] + noise * trend.mean[NOISE]
        variance = (
            P[LEVEL, LEVEL]
            + drift**2 * P[DRIFT, DRIFT]
            + noise**2 * P[NOISE, NOISE]
            + 2 * (drift * P[LEVEL, DRIFT] + noise * P[LEVEL, NOISE] + drift * noise * P[DRIFT, NOISE])
            + trend.wander * by_wander
            + trend.noise * by_noise
        )
        z = (self.threshold - mean) / np.sqrt(np.maximum(variance, 1e-24))
        return np.asarray((trend.weight * ndtr(-z if self.rising else z)).sum(1))

    @cached_property
    def _reach(self) -> tuple[Array, Array, NDArray[np.int64]]:
        """See `_by_steps`: the last column is the noise's; and for each hypothesis, which one is its drift's."""
        kept, of_drift = np.unique(self.trend.given.persistence, return_inverse=True)
        return (*_by_steps((*kept, self.trend.phi)), of_drift)


@dataclass(frozen=True)
class Arrival:
    """The distribution of the number of optimizer steps until the entropy is beyond a threshold.

    The chance of having reached it within `h` steps is taken as the largest chance of lying beyond it after any number
    of steps in `AHEAD` up to `h`, or after `h` itself.

    Attributes:
        crossing: what the chances come from.
        chance: `(S, len(AHEAD))`, of having reached it, not falling.
    """

    crossing: Crossing
    chance: Array

    def within(self, steps: float) -> Array:
        """`(S,)`: probability that it is reached within `steps`, at most `FARTHEST`; linear within a step."""
        whole = int(steps)
        found, share = self._after(np.full(len(self.chance), whole)), steps - whole
        if share == 0:
            return found
        return found + share * (self._after(np.full(len(self.chance), whole + 1)) - found)

    def quantile(self, probability: float) -> Array:
        """`(S,)`: steps by which it is reached with this probability; infinite if never, linear within a step."""
        reached = self.chance >= probability
        place = reached.argmax(1)
        low, high = AHEAD[np.maximum(place - 1, 0)], AHEAD[place]
        while (high - low > 1).any():
            middle = (low + high) // 2
            there = self._after(middle) >= probability
            low, high = np.where(there, low, middle), np.where(there, middle, high)
        before, after = self._after(low), self._after(high)
        share = np.where(high == low, 0.0, (probability - before) / np.maximum(after - before, 1e-300))
        return np.where(reached.any(1), low + np.clip(share, 0.0, 1.0) * (high - low), np.inf)

    def _after(self, steps: Steps) -> Array:
        """`(S,)`: probability that it is reached within `(S,)` whole numbers of steps."""
        place = np.searchsorted(AHEAD, steps, side="right") - 1
        before = self.chance[np.arange(len(place)), place]
        return np.asarray(np.maximum(before, self.crossing.beyond(steps)))


def arrival(trend: Trend, threshold: Array, rising: bool = False) -> Arrival:
    """When the entropy falls to a threshold, or rises to it.

    Args:
        trend: from the readings.
        threshold: `(S,)` nats per token, above 0.
        rising: whether it is reached from below.
    """
    crossing = Crossing(trend, trend.given.transform(threshold[:, None] / trend.unit), rising)
    beyond = [crossing.beyond(np.full(len(threshold), steps)) for steps in AHEAD]
    return Arrival(crossing, np.maximum.accumulate(np.stack(beyond, axis=1), axis=1))


@lru_cache(maxsize=8)
def _by_steps(persistence: tuple[float, ...]) -> tuple[Array, Array]:
    """What a drift now counts in the level after 0, 1, ... `FARTHEST` steps, and what its changes of variance 1 add.

    Both `(FARTHEST + 1, len(persistence))`; see `probe.forecast.trend.geometric` and `added_variance`.
    """
    powers = np.array(persistence) ** np.arange(FARTHEST)[:, None]
    nothing = np.zeros((1, len(persistence)))
    reach = np.concatenate([nothing, powers.cumsum(0)])
    return reach, np.concatenate([nothing, (reach[:-1] ** 2).cumsum(0)])
