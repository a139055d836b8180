"""How many optimizer steps are left until the policy's entropy falls to a threshold, with an interval.

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
from dataclasses import dataclass, replace

import numpy as np

from probe.forecast.first_passage import first_passage
from probe.forecast.line import fit_line
from probe.forecast.noise import fit_noise
from probe.forecast.readings import (
    LARGEST_FALL,
    LEAST_READINGS,
    Array,
    EntropyReading,
    since_change,
    usable_readings,
)

SHAPES, MIDDLE_SHAPE = (0.0, 0.5, 1.0), 0.5
"""Powers `p` of the walks in `(H^p - 1) / p` that a forecast stands for: exponential decay, between, straight line."""
DOWNWARD = 1.3
"""Standard errors by which a drift must be downward for an alarm."""


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
    _check(threshold, window, momentum, shape)
    used = since_change(usable_readings(readings)[-window:], momentum)
    if len(used) < LEAST_READINGS:
        return None
    powers = SHAPES if shape is None else (shape,)
    by_shape = {power: _of_shape(used, threshold, momentum, power) for power in powers}
    main = by_shape[MIDDLE_SHAPE if shape is None else shape]
    relative = by_shape[0.0] if 0.0 in by_shape else _of_shape(used, threshold, momentum, 0.0)
    return replace(
        main,
        low=min(
            main.steps, *(x.low for x in by_shape.values())
        ),  # without noise the three differ by rounding
        high=max(main.steps, *(x.high for x in by_shape.values())),
        rate=relative.rate,
        rate_se=relative.rate_se,
    )


def _check(threshold: float, window: int, momentum: float, shape: float | None) -> None:
    """Refuse what no forecast can be made from; see `forecast`."""
    if not (threshold > 0 and math.isfinite(threshold)):
        raise ValueError(f"threshold must be a positive entropy in nats per token, not {threshold}")
    if window < LEAST_READINGS:
        raise ValueError(f"window must be at least {LEAST_READINGS} readings, not {window}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), not {momentum}")
    if shape is not None and not 0 <= shape <= 1:
        raise ValueError(f"shape must be in [0, 1] or None, not {shape}")


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

    noise = fit_noise(step, increments, float(increment_variance.mean()), momentum)
    line = fit_line(step, increments, g(H), increment_variance, level_variance, by_level, noise)
    distance = line.level - float(g(np.array(threshold)))
    low, high = first_passage(distance, line, noise)
    steps = 0.0 if distance <= 0 else distance / -line.rate if line.rate < 0 else math.inf
    now = math.exp(line.level) if power == 0 else max(1 + power * line.level, 0.0) ** (1 / power)
    rate_se = math.sqrt(line.rate_variance)
    return Forecast(steps, low, high, line.rate, rate_se, now, threshold, readings_used=len(used))
