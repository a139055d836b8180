"""How many optimizer steps are left until the policy's entropy falls to a threshold, with an interval, and an alarm.

The model is a random walk with drift in the logarithm of the token entropy: `log H` changes by `r + e_k` in step `k`.
The drift `r` is constant over a window of readings, because entropy decays about exponentially in RL runs. The noise
`e_k` is real (every batch pushes differently) and autocorrelated: an update with momentum `beta1` is a moving average
of gradients, so with independent batches its noise has the autocorrelation `beta1` from one step to the next.

The measured change of one step is paired on the same responses. It is a far better velocity than the difference of two
levels `H`, whose sampling errors are independent. So the drift is the mean of the measured changes, and the levels only
say where the walk stands now. The interval is the set of times at which the threshold lies within the prediction error
of the extrapolated level (Cox and Miller, The theory of stochastic processes (1965), section 5.7, for the walk; Fieller
1954 for the interval of a ratio).

Measured coverage of the 95 % interval, in percent (4,000 walks per cell, so +-0.8 at most; drift -0.004 per step, step
noise half of it, levels e times the threshold and read with 3 % error, changes read with 10 %):

| readings | autocorrelation of steps: 0 | 0.5, `momentum` not told | 0.5, told | 0.9, not told | 0.9, told |
|---|---|---|---|---|---|
| 10, at every step | 96.9 | 90.0 | 97.2 | 74.0 | 95.9 |
| 10, at every 5th | 97.0 | 96.7 | 97.1 | 89.4 | 97.7 |
| 10, at every 10th | 97.4 | 97.2 | 97.4 | 93.2 | 97.5 |
| 5, at every 5th | 97.2 | 97.0 | 97.3 | 87.0 | 96.2 |

With noise as large as the drift the numbers are the same to a point, and more of the upper ends are infinite. Limits:

- Ten readings cannot show how strongly they depend on each other. So tell `momentum` where it is large and the readings
  are close together; the interval is then rightly wide. (Told 0.9 where the noise is white:
  99.6 % at every 10th step.)
- Where entropy falls along a straight line instead of exponentially, the forecast comes too late: by 10 % at 1.2 times
  the threshold, 39 % at twice, by a factor 2.6 at ten times, and by more if entropy halves within a window. The
  interval then covers 92 to 97 % at 1.2 times, 50 to 86 % at twice and 1 to 14 % at ten times. The interval is for the
  approach; far from the threshold the model is an assumption that ten readings cannot check.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

LEAST_READINGS = 3
"""Fewest readings that a forecast is made from: two for the rate, one more for its error."""
CONFIDENCE = 0.95
"""Coverage of the interval."""
MAX_AUTOCORRELATION = 0.8
"""Largest autocorrelation between readings that is believed when it was estimated from the window."""
LARGEST_FALL = 0.99
"""Largest share of the entropy that one step can take: a noisy reading may claim it all, and log(0) is no rate."""
CALM_READINGS = 3
"""Readings in a row without danger after which the alarm is armed again."""
CALM_HORIZONS = 2.0
"""A forecast of more than this many horizons is without danger."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class EntropyReading:
    """What one probed training step says about entropy.

    Attributes:
        step: optimizer step, counted from any origin.
        H: token entropy of the policy before that step, nats per token, measured on a sample of responses.
        H_se: its standard error, nats per token; independent between readings.
        change: measured change of `H` by that one optimizer step, nats per token, paired on the same responses.
        change_se: its standard error, nats per token.
    """

    step: int
    H: float
    H_se: float
    change: float
    change_se: float

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are finite; a reading from a single prompt has an infinite error."""
        return all(math.isfinite(x) for x in (self.H, self.H_se, self.change, self.change_se))


@dataclass(frozen=True)
class Forecast:
    """Optimizer steps left until the token entropy falls to a threshold.

    Steps are counted from the step after the last reading's: the level forecast from is the entropy after that step,
    and `steps = 12.3` means that the 13th step from there ends below the threshold.

    Attributes:
        steps: point estimate, optimizer steps; 0 if the entropy is at the threshold or below, infinite if it does not
            fall.
        low: lower end of the 95 % interval, optimizer steps; infinite if the threshold is out of reach.
        high: upper end, optimizer steps; infinite if the interval of the drift contains 0 or the drift is upward.
        rate: mean change of `log H` per optimizer step (about the relative change of `H`).
        rate_se: its standard error, autocorrelation included.
        H: token entropy after the last reading's step, nats per token: the levels of all readings, moved to that step.
        threshold: nats per token.
        readings_used: number of readings in the window.
    """

    steps: float
    low: float
    high: float
    rate: float
    rate_se: float
    H: float
    threshold: float
    readings_used: int

    @property
    def expected(self) -> bool:
        """Whether a collapse is resolved: the drift is downward and its interval excludes 0 (`high` is finite)."""
        return math.isfinite(self.high)


@dataclass
class CollapseAlarm:
    """Says when a new collapse alarm starts, and then stays silent until the danger has passed.

    An alarm starts if the collapse is expected within `horizon` steps or the entropy is at the threshold or below.
    It can start again after three readings in a row without danger: not expected, or farther than two horizons.

    The attributes are plain numbers: `dataclasses.asdict` saves the state, `CollapseAlarm(**state)` restores it.

    Attributes:
        horizon: optimizer steps.
        armed: whether an alarm can start.
        calm_readings: readings in a row without danger since the last alarm.
        last_alarm: step at which the last alarm started, or None.

    Raises:
        ValueError: if `horizon` is not positive.
    """

    horizon: float
    armed: bool = True
    calm_readings: int = 0
    last_alarm: int | None = None

    def __post_init__(self) -> None:
        if not self.horizon > 0:
            raise ValueError(f"horizon must be a positive number of optimizer steps, not {self.horizon}")

    def update(self, forecast: Forecast | None, step: int) -> bool:
        """Takes in the forecast of one reading.

        Args:
            forecast: None while there are too few readings; nothing changes then.
            step: the reading's optimizer step.

        Returns:
            Whether a new alarm starts here.
        """
        if forecast is None:
            return False
        collapsed = forecast.threshold >= forecast.H
        if self.armed:
            if collapsed or (forecast.expected and forecast.steps <= self.horizon):
                self.armed, self.calm_readings, self.last_alarm = False, 0, step
                return True
            return False
        far = not forecast.expected or forecast.steps > CALM_HORIZONS * self.horizon
        self.calm_readings = self.calm_readings + 1 if far and not collapsed else 0
        self.armed = self.calm_readings >= CALM_READINGS
        return False


def forecast(
    readings: Sequence[EntropyReading], threshold: float, window: int = 10, momentum: float = 0.0
) -> Forecast | None:
    """Forecasts the number of optimizer steps until the token entropy falls to `threshold`.

    Readings with a number that is not finite are left out.

    Args:
        readings: in increasing order of `step`; the distance between readings may vary.
        threshold: token entropy that counts as collapsed, nats per token.
        window: number of last readings to use.
        momentum: known autocorrelation of the noise from one optimizer step to the next: `beta1` of Adam, the momentum
            of SGD. It is a lower bound; the readings may show more. Without it the interval is too short where
            `momentum` to the power of the distance between readings is above about 0.4.

    Returns:
        The forecast, or None with fewer than three readings.

    Raises:
        ValueError: if `threshold` is not positive, `window` is below 3, `momentum` is not in [0, 1), steps do not
            increase, an `H` is not positive or a standard error is negative.

    Example:
        >>> fall = [EntropyReading(k, 2.0 * 0.99**k, 0.0, -0.01 * 2.0 * 0.99**k, 0.0) for k in range(5)]
        >>> round(forecast(fall, threshold=2.0 * 0.99**105).steps, 6)
        100.0
    """
    if not (threshold > 0 and math.isfinite(threshold)):
        raise ValueError(f"threshold must be a positive entropy in nats per token, not {threshold}")
    if window < LEAST_READINGS:
        raise ValueError(f"window must be at least {LEAST_READINGS} readings, not {window}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), not {momentum}")
    used = _usable(readings)[-window:]
    n = len(used)
    if n < LEAST_READINGS:
        return None
    step = np.array([x.step for x in used])
    H = np.array([x.H for x in used])
    H_variance = np.square([x.H_se for x in used] / H)  # of log H
    relative_change = np.maximum(np.array([x.change for x in used]) / H, -LARGEST_FALL)
    increments = np.log1p(relative_change)
    # log(1 + change / H) moves with an error of `change`, and with one of log H
    by_level = -relative_change / (1 + relative_change)
    change_variance = np.square([x.change_se for x in used] / (H * (1 + relative_change)))
    increment_variance = change_variance + by_level**2 * H_variance

    drift = _fit_drift(step, increments, float(increment_variance.mean()), momentum)
    level = _fit_level(step, increments, np.log(H), H_variance, by_level, drift)
    distance = level.now - math.log(threshold)
    low, high = _first_passage(distance, drift, level)
    steps = 0.0 if distance <= 0 else distance / -drift.rate if drift.rate < 0 else math.inf
    return Forecast(
        steps=steps,
        low=min(low, steps),  # without noise the three differ by rounding
        high=max(high, steps),
        rate=drift.rate,
        rate_se=math.sqrt(drift.variance),
        H=math.exp(level.now),
        threshold=threshold,
        readings_used=n,
    )


def _usable(readings: Sequence[EntropyReading]) -> list[EntropyReading]:
    """The readings that are finite, all of them checked."""
    for before, after in pairwise(readings):
        if after.step <= before.step:
            raise ValueError(
                f"readings must be in increasing order of step: {after.step} follows {before.step}"
            )
    for reading in readings:
        if reading.H <= 0:
            raise ValueError(
                f"the entropy must be positive, but is {reading.H} nats per token at step {reading.step}"
            )
        if reading.H_se < 0 or reading.change_se < 0:
            raise ValueError(f"a standard error is negative at step {reading.step}")
    return [reading for reading in readings if reading.is_finite]


@dataclass(frozen=True)
class _Drift:
    """Drift of `log H` per optimizer step.

    Attributes:
        rate: mean increment of `log H` per step.
        variance: of `rate`.
        step_variance: long-run variance of the real noise: what the variance of the walk grows by in a step.
        reading_variance: mean variance of an increment's measurement.
        quantile: Student t quantile for the interval, with the effective degrees of freedom.
    """

    rate: float
    variance: float
    step_variance: float
    reading_variance: float
    quantile: float


@dataclass(frozen=True)
class _Level:
    """The level `log H` after the last reading's step.

    Attributes:
        now: the level.
        variance: of `now`, without the part from the error of the drift.
        extrapolated: steps, on average over the levels, that were bridged with the drift: an error `e` of the drift
            moves `now` by `extrapolated * e`.
        covariance: of `now` with the drift, without that part: where `H` is read too high, the relative change is read
            too small.
    """

    now: float
    variance: float
    extrapolated: float
    covariance: float


def _fit_drift(
    step: NDArray[np.int64], increments: Array, reading_variance: float, momentum: float
) -> _Drift:
    """The mean increment and its error, with the autocorrelation of the noise.

    The increments' covariance is taken as `real * R + reading_variance * I` with `R[i, j] = phi^|step_i - step_j|`.
    `phi` is estimated from the lag-1 autocorrelation between readings. All formulas are those of the finite window,
    not the asymptotic `(1 + rho) / (1 - rho)`: the sample variance of few autocorrelated readings is too small by the
    factor `(n - inflation) / (n - 1)`, and has fewer degrees of freedom than `n - 1` (Satterthwaite's are used).

    Args:
        step: `(n,)`, increasing.
        increments: `(n,)`, measured changes of `log H` per step.
        reading_variance: mean variance of the measurement of an increment.
        momentum: lower bound of `phi`.
    """
    n = len(increments)
    rate = float(increments.mean())
    deviations = increments - rate
    sample_variance = float(deviations @ deviations) / (n - 1)
    real = max(sample_variance - reading_variance, 0.0)

    spacing = float(np.median(np.diff(step)))
    autocorrelation = 0.0
    if real > 0:
        estimated = float(deviations[1:] @ deviations[:-1]) / ((n - 1) * sample_variance)
        # its mean is rho - (1 + 4 rho) / n (Marriott and Pope 1954); a very short window is corrected in part only,
        # at most by doubling, since the correction multiplies the error of the estimate too
        unbiased = (n * estimated + 1) / max(n - 4, n / 2)
        # measurement noise is white: it dilutes the autocorrelation of the real noise
        autocorrelation = min(max(unbiased * sample_variance / real, 0.0), MAX_AUTOCORRELATION)
    phi = max(autocorrelation ** (1 / spacing), momentum)

    R = np.power(phi, np.abs(step[:, None] - step[None, :]))  # 0^0 is 1 on the diagonal
    inflation = float(R.sum()) / n
    real *= (n - 1) / (n - inflation)
    centred = R - R.mean(0)
    freedom = float(np.trace(centred)) ** 2 / float((centred * centred.T).sum())
    return _Drift(
        rate=rate,
        variance=(real * inflation + reading_variance) / n,
        step_variance=real * (1 + phi) / (1 - phi),
        reading_variance=reading_variance,
        quantile=student_quantile(freedom),
    )


def _fit_level(
    step: NDArray[np.int64], increments: Array, level: Array, variance: Array, by_level: Array, drift: _Drift
) -> _Level:
    """The level after the last reading's step, from the levels of all readings moved there.

    A level is moved by the measured increments of the probed steps in between, which are known, and by the drift in
    the other steps, whose noise adds to its error. The levels are weighted by the inverse of their variances.

    Args:
        step: `(n,)`.
        increments: `(n,)`, changes of `log H`.
        level: `(n,)`, log of the measured entropies.
        variance: `(n,)`, of `level`.
        by_level: `(n,)`, derivative of the measured increment by the measured `level`.
        drift: the drift.
    """
    unprobed = np.append(np.diff(step) - 1, 0)  # steps between a reading's and the next
    bridged = unprobed[::-1].cumsum()[::-1]  # steps between a reading's and now that were not probed
    moved = level + increments[::-1].cumsum()[::-1] + bridged * drift.rate
    total = variance + drift.step_variance * bridged
    weight = 1 / np.maximum(total, 1e-300) if total.any() else np.ones(len(step))
    weight /= weight.sum()
    # the noise of a gap is shared by all levels before it
    gap_variance = unprobed * drift.step_variance + drift.reading_variance
    return _Level(
        now=float(weight @ moved),
        variance=float(weight**2 @ variance + gap_variance @ weight.cumsum() ** 2),
        extrapolated=float(weight @ bridged),
        covariance=float(weight @ (by_level * variance)) / len(step),
    )


def _first_passage(distance: float, drift: _Drift, level: _Level) -> tuple[float, float]:
    """Interval of the steps until the walk has gone down by `distance`.

    The set of `t >= 0` with `(distance + rate t)^2 <= quantile^2 ((t + extrapolated)^2 s^2 + t v + c0)`, where `s^2` is
    the variance of the drift, `v` that of a step and twice the covariance, `c0` the variance of the level: a quadratic
    inequality `a t^2 + b t + c <= 0`. From its two roots:

    - drift downward, its interval excludes 0 (`a > 0`): between the roots;
    - drift's interval contains 0 (`a <= 0`): from the positive root to infinity;
    - drift upward, its interval excludes 0: from the smaller root, if the noise of the walk can get there, to infinity;
    - level not resolved from the threshold (`c <= 0`): from 0;
    - level resolved below the threshold: 0, 0.

    Args:
        distance: log of the ratio of the entropy to the threshold.
        drift: the drift.
        level: the level.

    Returns:
        Lower and upper end, optimizer steps; either may be infinite.
    """
    z2 = drift.quantile**2
    a = drift.rate**2 - z2 * drift.variance
    linear = 2 * level.extrapolated * drift.variance + drift.step_variance + 2 * level.covariance
    b = 2 * distance * drift.rate - z2 * linear
    c = distance**2 - z2 * (level.extrapolated**2 * drift.variance + level.variance)
    if distance <= 0 and c >= 0:
        return 0.0, 0.0
    falling = drift.rate < 0 and a > 0
    discriminant = b * b - 4 * a * c
    if c > 0 and discriminant < 0 and not falling:
        return math.inf, math.inf  # the drift is upward and the noise too small to reach the threshold
    # Roots without cancellation: `half_sum / a` and `c / half_sum`. With a falling drift they are real, since the
    # quadratic is not positive at `t = distance / -rate`; where they are not (`c <= 0 > a`) neither is needed.
    half_sum = (-b + math.copysign(math.sqrt(max(discriminant, 0.0)), 1 if b < 0 else -1)) / 2

    if c <= 0:
        low = 0.0
    elif b < 0:
        low = c / half_sum
    else:  # the positive root of a downward parabola; an upward one has none
        low = half_sum / a if a < 0 else math.inf
    if not falling:
        high = math.inf
    elif b < 0:
        high = half_sum / a
    else:  # the threshold is not resolved from a level just below it
        high = c / half_sum if half_sum else 0.0
    return low, high


def student_quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    """Half the width of a two-sided interval of Student's t distribution.

    With `t = sqrt(freedom) tan(x)` the density is `cos(x)^(freedom - 1)`, here summed up on a grid. Degrees of
    freedom need not be an integer; the relative error is below 2e-3, and below 1e-4 from two on.

    Args:
        freedom: degrees of freedom, at least 1.
        confidence: probability within plus and minus the quantile.

    >>> round(student_quantile(9), 3), round(student_quantile(1), 3)
    (2.262, 12.706)
    """
    # beyond this angle the density is negligible: finer grid for many degrees of freedom
    x = np.linspace(0.0, min(math.pi / 2, 12 / math.sqrt(freedom)), 2001)
    density = np.cos(x).clip(0.0) ** (freedom - 1)
    mass = np.append(0.0, (density[1:] + density[:-1]).cumsum())
    return math.sqrt(freedom) * math.tan(float(np.interp(confidence * mass[-1], mass, x)))
