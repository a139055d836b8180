"""How many optimizer steps are left until the policy's entropy falls to a threshold, with an interval, and an alarm.

The model is a random walk with drift in `g(H) = (H^p - 1) / p` of the token entropy (`log H` for `p = 0`): `g`
changes by `r + e_k` in step `k`. The drift `r` is constant over a window of readings. In RL runs entropy falls
sometimes about exponentially (`p = 0`), sometimes along a straight line (`p = 1`), and readings far above the
threshold cannot tell: the forecast takes the shape between, `p = 1/2`, and its interval goes from the lowest end to
the highest of all three.

The noise `e_k` is real (every batch pushes differently) and autocorrelated: an update with momentum `beta1` is a
moving average of gradients, so with independent batches its noise has the autocorrelation `beta1` from one step to
the next.

The measured change of one step is paired on the same responses: a good velocity, of that step. The levels `H`, whose
sampling errors are independent, sum up all steps between them. Drift and present level are fitted to both together by
generalised least squares. The interval is the set of times at which the threshold lies within the prediction error of
the extrapolated level (Cox and Miller, The theory of stochastic processes (1965), chapter 5, for the walk; Fieller
1954 for the interval of a ratio).

Measured coverage of the 95 % interval where the shape is known (`p = 0`), in percent (2,000 walks per cell: standard
error 0.4 at 97 %, 1.1 at 63 %; drift -0.004 per step, step noise half of it, levels e times the threshold and read
with 3 % error, changes with 10 %):

| readings | autocorrelation of steps: 0 | 0.5, `momentum` not told | 0.5, told | 0.9, not told | 0.9, told |
|---|---|---|---|---|---|
| 10, at every step | 96.0 | 86.2 | 96.5 | 63.2 | 97.4 |
| 10, at every 5th | 96.0 | 95.3 | 96.9 | 82.5 | 96.5 |
| 10, at every 10th | 97.0 | 93.7 | 96.5 | 83.5 | 96.7 |
| 5, at every 5th | 97.4 | 96.8 | 97.2 | 87.2 | 97.2 |

With noise as large as the drift the numbers are the same to a point or two, and more upper ends are infinite. Where
changes are read with errors as large as the drift the interval is too wide (99 to 100 %). Limits:

- Ten readings cannot show how strongly they depend on each other. So tell `momentum`, as the drop-in probe does; the
  interval is then rightly wide.
- Where entropy falls along a straight line and the forecast is made for an exponential (`p = 0`), it comes too late: by
  10 % at 1.2 times the threshold, about 40 % at twice, by a factor of 2.6 or more at ten times. With all shapes the
  interval covers at least what the right one does.
- The drift itself may change. Readings before a clear change are left out; less clear ones are averaged over, and the
  forecast of a collapse that speeds up is late: mind the lower end. On a GRPO run of the demo policy that collapses
  (`benchmarks/collapse.py`), whose fall slows down and then speeds up, the interval of all shapes held the truth at
  98 % of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

SHAPES, MIDDLE_SHAPE = (0.0, 0.5, 1.0), 0.5
"""Powers `p` of the walks in `(H^p - 1) / p` that a forecast stands for: exponential decay, between, straight line."""
LEAST_READINGS = 3
"""Fewest readings that a forecast is made from: two for the rate, one more for its error."""
LEAST_SINCE_CHANGE = 4
"""Fewest readings that show that the drift has changed."""
CHANGED = 4.0
"""Standard errors by which it must have."""
CONFIDENCE = 0.95
"""Coverage of the interval."""
MAX_AUTOCORRELATION = 0.8
"""Largest autocorrelation between readings that is believed when it was estimated from the window."""
LARGEST_FALL = 0.99
"""Largest share of the entropy that one step can take: a noisy reading may claim it all, and log(0) is no rate."""
DOWNWARD = 1.3
"""Standard errors by which a drift must be downward for an alarm."""
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
        """Whether the drift is downward by more than 1.3 standard errors: nine times out of ten it really is.

        Less than what a finite `high` asks for: an alarm that waits for certainty comes after the collapse.
        """
        return self.rate < -DOWNWARD * self.rate_se


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
    readings: Sequence[EntropyReading],
    threshold: float,
    window: int = 10,
    momentum: float = 0.0,
    shape: float | None = None,
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
        shape: `p` if entropy falls at a rate proportional to `H^(1 - p)`: 0 exponentially, 1 along a straight line.
            None does not choose: `steps` is for 1/2, the interval from the lowest to the highest end of 0, 1/2 and 1.

    Returns:
        The forecast, or None with fewer than three readings.

    Raises:
        ValueError: if `threshold` is not positive, `window` is below 3, `momentum` is not in [0, 1), `shape` not in
            [0, 1], steps do not increase, an `H` is not positive or a standard error is negative.

    Example:
        >>> fall = [EntropyReading(k, 2.0 * 0.99**k, 0.0, -0.01 * 2.0 * 0.99**k, 0.0) for k in range(5)]
        >>> round(forecast(fall, threshold=2.0 * 0.99**105, shape=0.0).steps, 6)
        100.0
    """
    if not (threshold > 0 and math.isfinite(threshold)):
        raise ValueError(f"threshold must be a positive entropy in nats per token, not {threshold}")
    if window < LEAST_READINGS:
        raise ValueError(f"window must be at least {LEAST_READINGS} readings, not {window}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), not {momentum}")
    if shape is not None and not 0 <= shape <= 1:
        raise ValueError(f"shape must be in [0, 1] or None, not {shape}")
    used = _since_change(_usable(readings)[-window:], momentum)
    n = len(used)
    if n < LEAST_READINGS:
        return None
    powers = SHAPES if shape is None else (shape,)
    found = {power: _of_shape(used, threshold, momentum, power) for power in powers}
    main = found[MIDDLE_SHAPE if shape is None else shape]
    relative = found[0.0] if 0.0 in found else _of_shape(used, threshold, momentum, 0.0)
    steps = main.steps
    return Forecast(
        steps=steps,
        low=min(steps, *(x.low for x in found.values())),  # without noise the three differ by rounding
        high=max(steps, *(x.high for x in found.values())),
        rate=relative.rate,
        rate_se=relative.rate_se,
        H=main.H,
        threshold=threshold,
        readings_used=n,
    )


def _since_change(readings: Sequence[EntropyReading], momentum: float) -> Sequence[EntropyReading]:
    """The readings since the drift last changed: a learning rate that was lowered, a collapse that speeds up.

    At every split with three readings before and four after it, the mean relative changes of both sides are compared,
    in units of the error that their scatter about these means and the correlation through momentum give them. While
    the clearest split differs by more than four of them, what is before it is left out. (Four, since there are many
    splits, and the scatter is estimated from few readings.)
    """
    while len(readings) >= LEAST_READINGS + LEAST_SINCE_CHANGE:
        step = np.array([x.step for x in readings])
        relative = np.log1p(np.maximum([x.change / x.H for x in readings], -LARGEST_FALL))
        rho = momentum ** float(np.median(np.diff(step)))
        longest, n = (1 + rho) / (1 - rho), len(readings)
        clearness = {}
        for k in range(LEAST_READINGS, n - LEAST_SINCE_CHANGE + 1):
            old, new = relative[:k], relative[k:]
            scatter = (float(old.var()) * k + float(new.var()) * (n - k)) / (n - 2)
            variance = scatter * (min(longest / k, 1.0) + min(longest / (n - k), 1.0))
            size = abs(float(new.mean() - old.mean()))
            # differences that are rounding are none
            clearness[k] = size / math.sqrt(variance + 1e-18) if size > 1e-9 else 0.0
        cut = max(clearness, key=clearness.__getitem__)
        if clearness[cut] < CHANGED:
            break
        readings = readings[cut:]
    return readings


def _of_shape(used: Sequence[EntropyReading], threshold: float, momentum: float, power: float) -> Forecast:
    """The forecast of a walk in `g(H) = (H^power - 1) / power`, or `log H` for a power of 0."""

    def g(H: Array) -> Array:
        return np.log(H) if power == 0 else (H**power - 1) / power

    step = np.array([x.step for x in used])
    H = np.array([x.H for x in used])
    level_variance = np.square(H ** (power - 1) * [x.H_se for x in used])  # of g(H)
    relative = np.maximum(np.array([x.change for x in used]) / H, -LARGEST_FALL)
    after = H * (1 + relative)
    increments = g(after) - g(H)
    # g(H + change) - g(H) moves with an error of `change`, and with one of g(H)
    by_level = (1 + relative) ** (power - 1) - 1
    change_variance = np.square(after ** (power - 1) * [x.change_se for x in used])
    increment_variance = change_variance + by_level**2 * level_variance

    noise = _fit_noise(step, increments, float(increment_variance.mean()), momentum)
    line = _fit_line(step, increments, g(H), increment_variance, level_variance, by_level, noise)
    distance = line.level - float(g(np.array(threshold)))
    low, high = _first_passage(distance, line, noise)
    steps = 0.0 if distance <= 0 else distance / -line.rate if line.rate < 0 else math.inf
    now = math.exp(line.level) if power == 0 else max(1 + power * line.level, 0.0) ** (1 / power)
    rate_se = math.sqrt(line.rate_variance)
    return Forecast(steps, low, high, line.rate, rate_se, now, threshold, readings_used=len(used))


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
class _Noise:
    """How the steps of the walk scatter about its drift.

    Attributes:
        variance: of the real noise of one step.
        phi: its autocorrelation from one step to the next.
        quantile: Student t quantile for the interval, with the effective degrees of freedom.
    """

    variance: float
    phi: float
    quantile: float

    @property
    def long_run(self) -> float:
        """What the variance of the walk grows by in a step, far ahead."""
        return self.variance * (1 + self.phi) / (1 - self.phi)


@dataclass(frozen=True)
class _Line:
    """The walk's drift per step and its level after the last reading's step, with their errors.

    Attributes:
        rate: drift per optimizer step.
        level: `g(H)` now.
        rate_variance: of `rate`.
        level_variance: of `level`.
        covariance: of both.
    """

    rate: float
    level: float
    rate_variance: float
    level_variance: float
    covariance: float


def _fit_noise(
    step: NDArray[np.int64], increments: Array, reading_variance: float, momentum: float
) -> _Noise:
    """Variance and autocorrelation of the real noise, from the scatter of the measured increments.

    The increments' covariance is taken as `real * R + reading_variance * I` with `R[i, j] = phi^|step_i - step_j|`.
    `phi` is estimated from the lag-1 autocorrelation between readings. All formulas are those of the finite window,
    not the asymptotic `(1 + rho) / (1 - rho)`: the sample variance of few autocorrelated readings is too small by the
    factor `(n - inflation) / (n - 1)`, and has fewer degrees of freedom than `n - 1` (Satterthwaite's are used).

    Args:
        step: `(n,)`, increasing.
        increments: `(n,)`, measured changes of `g(H)` per step.
        reading_variance: mean variance of the measurement of an increment.
        momentum: lower bound of `phi`.
    """
    n = len(increments)
    deviations = increments - increments.mean()
    sample_variance = float(deviations @ deviations) / (n - 1)
    # The difference, bent up where it is not known to be positive: by the error of its second term's estimate from n
    # readings. Cut off at 0 it would often be 0 by chance, and the interval too short.
    excess = sample_variance - reading_variance
    real = (excess + math.hypot(excess, 2 * reading_variance * math.sqrt(2 / (n - 1)))) / 2

    spacing = float(np.median(np.diff(step)))
    autocorrelation = 0.0
    if real > 0 and sample_variance > 0:
        estimated = float(deviations[1:] @ deviations[:-1]) / ((n - 1) * sample_variance)
        # its mean is rho - (1 + 4 rho) / n (Marriott and Pope 1954); a very short window is corrected in part only,
        # at most by doubling, since the correction multiplies the error of the estimate too
        unbiased = (n * estimated + 1) / max(n - 4, n / 2)
        # measurement noise is white: it dilutes the autocorrelation of the real noise
        diluted = min(real / sample_variance, 1.0)
        autocorrelation = min(max(unbiased / diluted, 0.0), MAX_AUTOCORRELATION)
    phi = max(autocorrelation ** (1 / spacing), momentum)

    R = np.power(phi, np.abs(step[:, None] - step[None, :]))  # 0^0 is 1 on the diagonal
    inflation = float(R.sum()) / n
    real *= (n - 1) / (n - inflation)
    centred = R - R.mean(0)
    freedom = float(np.trace(centred)) ** 2 / float((centred * centred.T).sum())
    return _Noise(variance=real, phi=phi, quantile=student_quantile(freedom))


def _fit_line(
    step: NDArray[np.int64],
    increments: Array,
    level: Array,
    increment_variance: Array,
    level_variance: Array,
    by_level: Array,
    noise: _Noise,
) -> _Line:
    """Drift and present level from increments and levels together, by generalised least squares.

    With `L` the level now, `T` now, and `e` the noise of the steps,

        increment_j = r + e[step_j] + its error
        level_j     = L - sum over s = step_j .. T - 1 of (r + e[s]) + its error

    Increments know the drift of their own step well; levels, read worse, know the sum of all steps between them.

    Args:
        step: `(n,)`.
        increments: `(n,)`, measured changes of `g(H)` per step.
        level: `(n,)`, `g` of the measured entropies.
        increment_variance: `(n,)`, of the measurement of `increments`.
        level_variance: `(n,)`, of the measurement of `level`.
        by_level: `(n,)`, derivative of the measured increment by the measured `level`.
        noise: of the steps.
    """
    n, phi = len(step), noise.phi
    left = (step[-1] + 1 - step).astype(np.float64)  # steps from a reading's to now
    apart = np.abs(step[:, None] - step[None, :])
    tail = np.minimum(left[:, None], left[None, :])
    # covariances of e[step_i], and of the sums from step_i to now, in units of the noise's variance
    of_steps = np.power(phi, apart)
    of_sums = _sum_variance(tail, phi) + _adjacent_sums(apart, tail, phi)
    inside = left[:, None] <= left[None, :]  # step_i lies in the sum from step_j
    before = np.power(phi, apart) * _geometric(left[None, :], phi)
    both = _geometric(left[:, None], phi) + _geometric(apart + 1, phi) - 1
    mixed = np.where(inside, both, before)

    V = np.block([[of_steps, -mixed], [-mixed.T, of_sums]]) * noise.variance
    shared = by_level * level_variance
    V += np.block(
        [[np.diag(increment_variance), np.diag(shared)], [np.diag(shared), np.diag(level_variance)]]
    )
    design = np.concatenate([np.stack([np.ones(n), np.zeros(n)], 1), np.stack([-left, np.ones(n)], 1)])
    data = np.concatenate([increments, level])
    # readings without any error leave V singular: they agree, and any weights do
    V += np.eye(2 * n) * max(float(np.trace(V)) * 1e-13, 1e-24)
    weighted = np.linalg.solve(V, design)
    covariance = np.linalg.inv(design.T @ weighted)
    rate, now = covariance @ (weighted.T @ data)
    if abs(rate) < 1e-12 * float(np.abs(increments).max() + np.abs(np.diff(level)).max()):
        rate = 0.0  # rounding, of an entropy that does not move
    return _Line(
        rate=float(rate),
        level=float(now),
        rate_variance=float(covariance[0, 0]),
        level_variance=float(covariance[1, 1]),
        covariance=float(covariance[0, 1]),
    )


def _geometric(n: Array, phi: float) -> Array:
    """`1 + phi + ... + phi^(n - 1)`."""
    return (1 - np.power(phi, n)) / (1 - phi)


def _sum_variance(n: Array, phi: float) -> Array:
    """Variance of the sum of `n` neighbouring steps of an autoregressive noise of variance 1."""
    return n * (1 + phi) / (1 - phi) - 2 * phi * _geometric(n, phi) / (1 - phi)


def _adjacent_sums(n: Array, m: Array, phi: float) -> Array:
    """Covariance of the sum of `n` steps with that of the `m` steps right after them."""
    return phi * _geometric(n, phi) * _geometric(m, phi)


def _first_passage(distance: float, line: _Line, noise: _Noise) -> tuple[float, float]:
    """Interval of the steps until the walk has gone down by `distance`.

    The set of `t >= 0` with `(distance + rate t)^2 <= quantile^2 (t^2 var(rate) + t v + var(level))`, where `v` is the
    long-run variance of a step and twice the covariance of level and rate: a quadratic inequality
    `a t^2 + b t + c <= 0`. From its two roots:

    - drift downward, its interval excludes 0 (`a > 0`): between the roots;
    - drift's interval contains 0 (`a <= 0`): from the positive root to infinity;
    - drift upward, its interval excludes 0: from the smaller root, if the noise of the walk can get there, to infinity;
    - level not resolved from the threshold (`c <= 0`): from 0;
    - level resolved below the threshold: 0, 0.

    Args:
        distance: of the level from the threshold, in units of `g`.
        line: the drift and the level.
        noise: of the steps.

    Returns:
        Lower and upper end, optimizer steps; either may be infinite.
    """
    z2 = noise.quantile**2
    a = line.rate**2 - z2 * line.rate_variance
    b = 2 * distance * line.rate - z2 * (noise.long_run + 2 * line.covariance)
    c = distance**2 - z2 * line.level_variance
    if distance <= 0 and c >= 0:
        return 0.0, 0.0
    falling = line.rate < 0 and a > 0
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
