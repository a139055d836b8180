"""How many optimizer steps are left until the policy's entropy falls to a threshold, or rises to one.

In RL runs entropy falls along a straight line or exponentially, slows down and flattens, speeds up, or turns. What
readings cannot tell apart yet stays open: the forecast averages over hypotheses (`probe.forecast.hypotheses`), each
weighed by how well it has foretold the readings so far, and by a probability from before. Among them are that
everything but the level is of another kind since the last 8, 16 or 32 readings. Level, drift and their
errors under each are those of a Kalman filter (`probe.forecast.trend`), which takes the measured changes, the measured
levels and the levels that the training has logged itself. The probability that the threshold has been reached within
so many steps follows (`probe.forecast.arrival`), and from it everything here: the median, the ends of the 95 %
interval, and the chance of an alarm. There is an upper end only if the threshold is reached with a probability of at
least 97.5 %.

How well this does on synthetic trainings of nine shapes and on real ones is in `benchmarks/forecast.py` and
`benchmarks/RESULTS.md`. Nothing announces a fall that stops from one step to the next; some eight to fifteen
readings later it is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probe.forecast.arrival import FARTHEST, arrival
from probe.forecast.hypotheses import hypotheses
from probe.forecast.readings import LEAST_READINGS, EntropyReading, usable_readings
from probe.forecast.trend import ReadingArrays, Trend, fit_trend

ALARM_CHANCE = 0.3
"""Probability of reaching the threshold within the horizon from which on there is an alarm."""
FALLING = 2.0
"""Standard errors by which the drift must point to the threshold for a trend towards it."""


@dataclass(frozen=True)
class Forecast:
    """Optimizer steps left until the token entropy reaches a threshold.

    Steps are counted from the training's current step, whatever step the last reading is of: the level forecast from is
    the entropy after `step`, and `steps = 12.3` means that the 13th step from there ends beyond the threshold.

    Attributes:
        steps: median, optimizer steps; 0 if the entropy is at the threshold or beyond, infinite if it is more likely
            not to get there than to do so.
        low: lower end of the 95 % interval, optimizer steps; infinite if the threshold is out of reach.
        high: upper end, optimizer steps; infinite if it may well never be reached.
        rate: mean relative change of `H` per optimizer step now (of `log H`).
        rate_se: its standard error.
        H: token entropy after `step`, nats per token: what all readings say of it.
        threshold: nats per token.
        readings_used: number of readings in the window, logged levels included.
        horizon: optimizer steps.
        chance: probability of being at the threshold or beyond after one of the next `horizon` steps, the likeliest
            of them: a lower bound of that of having been there at any.
        ever: probability that it is reached at all, within 3,000 steps.
        rising: whether the threshold is above the entropy.
        step: the optimizer step from whose end everything here is counted; in a training the last one taken.
    """

    steps: float
    low: float
    high: float
    rate: float
    rate_se: float
    H: float
    threshold: float
    readings_used: int
    horizon: float
    chance: float
    ever: float
    rising: bool = False
    step: int = 0

    @property
    def reached(self) -> bool:
        """Whether the entropy is at the threshold or beyond."""
        return self.threshold <= self.H if self.rising else self.threshold >= self.H

    @property
    def expected(self) -> bool:
        """Whether what is forecast calls for an alarm."""
        return calls_for_alarm(self.reached, self.chance)

    @property
    def flattening(self) -> bool:
        """Whether entropy clearly moves towards the threshold now, and would reach it, but is more likely not to.

        Both within the 3,000 steps that a forecast looks ahead: a fall that is merely slow does not flatten.
        """
        towards = self.rate if self.rising else -self.rate
        if self.reached or self.ever >= 0.5 or towards <= FALLING * self.rate_se:
            return False
        return abs(math.log(self.H / self.threshold)) <= FARTHEST * towards


def calls_for_alarm(reached: bool, chance: float) -> bool:
    """Whether a threshold calls for an alarm.

    Args:
        reached: whether the entropy is there already.
        chance: of getting there within the horizon.
    """
    return reached or chance >= ALARM_CHANCE


def forecast(
    readings: Sequence[EntropyReading],
    threshold: float,
    window: int = 60,
    momentum: float = 0.0,
    shape: float | None = None,
    horizon: float = 50,
    rising: bool = False,
    now: int | None = None,
) -> Forecast | None:
    """Forecasts the number of optimizer steps until the token entropy falls to `threshold`, or rises to it.

    Readings with a number that is not finite are left out.

    Args:
        readings: in increasing order of `step`; the distance between readings may vary.
        threshold: token entropy that counts as collapsed (as exploded), nats per token.
        window: number of last probes to use, with the logged levels between them.
        momentum: known autocorrelation of the noise from one optimizer step to the next: `beta1` of Adam, the momentum
            of SGD.
        shape: `p`, if entropy is known to fall at a rate proportional to `H^(1 - p)` as long as its drift is steady: 0
            exponentially, 1 along a straight line. None weighs both.
        horizon: optimizer steps within which the chance is given, at most 3,000.
        rising: whether the threshold is to be reached from below.
        now: the last optimizer step taken, from whose end steps are counted; None where it is the last reading's.

    Returns:
        The forecast, or None with fewer than three measured changes.

    Raises:
        ValueError: if `threshold` is not positive, `window` is below 3, `momentum` is not in [0, 1), `shape` not in
            [0, 1], `horizon` not positive or too large, steps do not increase, `now` is before the last of them, an
            `H` is not positive or a standard error is negative.

    Example:
        >>> fall = [EntropyReading(k, 2.0 * 0.99**k, 0.0, -0.01 * 2.0 * 0.99**k, 0.0) for k in range(20)]
        >>> round(forecast(fall, threshold=2.0 * 0.99**120, shape=0.0).steps)
        100
    """
    _check(threshold, horizon)  # also where there are too few readings
    found = trend_of(readings, window, momentum, shape, now)
    return None if found is None else forecast_of(*found, threshold, horizon, rising)


def trend_of(
    readings: Sequence[EntropyReading],
    window: int,
    momentum: float,
    shape: float | None = None,
    now: int | None = None,
) -> tuple[Trend, int] | None:
    """The trend that readings show after step `now`, and how many of them; None with fewer than three measured changes.

    Args and errors: see `forecast`.
    """
    _check_fit(window, momentum, shape)
    used = in_window(usable_readings(readings), window)
    if sum(one.has_change for one in used) < LEAST_READINGS:
        return None
    return fit_trend(as_arrays([used]), hypotheses(shape), momentum, now), len(used)


def forecast_of(trend: Trend, readings_used: int, threshold: float, horizon: float, rising: bool) -> Forecast:
    """What a trend of one training says of one threshold.

    Args:
        trend: from `trend_of`.
        readings_used: that it was made from.
        threshold: nats per token.
        horizon: optimizer steps within which the chance is given, at most 3,000.
        rising: whether the threshold is to be reached from below.

    Raises:
        ValueError: if `threshold` is not positive, or `horizon` is not or too large.
    """
    _check(threshold, horizon)
    reached = arrival(trend, np.array([threshold]), rising)
    steps, low, high = (float(reached.quantile(p)[0]) for p in (0.5, 0.025, 0.975))
    rate, rate_se = (float(x[0]) for x in trend.rate)
    return Forecast(
        steps=steps,
        low=low,
        high=high,
        rate=rate,
        rate_se=rate_se,
        H=float(trend.level[0]),
        threshold=threshold,
        readings_used=readings_used,
        horizon=horizon,
        chance=float(reached.within(horizon)[0]),
        ever=float(reached.chance[0, -1]),
        rising=rising,
        step=trend.step,
    )


def in_window(readings: Sequence[EntropyReading], window: int) -> Sequence[EntropyReading]:
    """The last `window` readings of probes, and the logged levels since the first of these."""
    measured = [place for place, one in enumerate(readings) if not one.logged]
    return readings[measured[-window:][0] :] if measured else []


def as_arrays(trainings: Sequence[Sequence[EntropyReading]]) -> ReadingArrays:
    """The readings of several trainings at the same steps, the same of which are logged or without a change."""
    first = trainings[0]

    def numbers(name: str) -> np.ndarray:
        return np.array([[getattr(one, name) or 0.0 for one in each] for each in trainings], dtype=np.float64)

    return ReadingArrays(
        step=np.array([one.step for one in first], dtype=np.int64),
        logged=np.array([one.logged for one in first]),
        has_change=np.array([one.has_change for one in first]),
        level=numbers("H"),
        level_se=numbers("H_se"),
        change=numbers("change"),
        change_se=numbers("change_se"),
    )


def _check(threshold: float, horizon: float) -> None:
    """Refuse what no forecast can be made of; see `forecast`."""
    if not (threshold > 0 and math.isfinite(threshold)):
        raise ValueError(f"threshold must be a positive entropy in nats per token, not {threshold}")
    if not 0 < horizon <= FARTHEST:
        raise ValueError(
            f"horizon must be a positive number of optimizer steps up to {FARTHEST}, not {horizon}"
        )


def _check_fit(window: int, momentum: float, shape: float | None) -> None:
    """Refuse what no trend can be fitted with; see `forecast`."""
    if window < LEAST_READINGS:
        raise ValueError(f"window must be at least {LEAST_READINGS} readings, not {window}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), not {momentum}")
    if shape is not None and not 0 <= shape <= 1:
        raise ValueError(f"shape must be in [0, 1] or None, not {shape}")
