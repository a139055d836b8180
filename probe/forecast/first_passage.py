"""When a drifting level first passes a threshold."""

from __future__ import annotations

import math

from probe.forecast.line import Line
from probe.forecast.noise import Noise


def first_passage(distance: float, line: Line, noise: Noise) -> tuple[float, float]:
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
