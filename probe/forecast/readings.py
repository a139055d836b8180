"""Readings of the entropy, and those that a forecast can use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

LEAST_READINGS = 3
"""Fewest measured changes that a forecast is made from."""
LEAST_LOGGED = 5
"""Fewest logged levels whose scatter tells their error."""
OUTLIER = 5.0
"""Errors by which a logged level is off its neighbours to be doubted."""
SMALLEST_LOGGED_ERROR = 0.005
"""Share of the entropy that a logged level is at least uncertain by."""
WINDOW_HORIZONS, LEAST_WINDOW = 4, 5
"""Older readings do not enter the forecast, unless there are fewer than so many: rates change in a run's course."""
SMALLEST_ENTROPY = 1e-9
"""Nats per token that a policy without any choice left is taken to have, for the logarithm's sake."""


@dataclass(frozen=True)
class EntropyReading:
    """What one training step says about entropy: a probe of it, or a level that the training has logged by itself.

    Attributes:
        step: optimizer step, counted from any origin.
        H: token entropy of the policy before that step, nats per token, measured on a sample of responses.
        H_se: its standard error, nats per token; independent between readings.
        change: measured change of `H` by that one optimizer step, nats per token, paired on the same responses; None
            where only the level is known.
        change_se: its standard error, nats per token; None likewise.
        logged: whether it is a level that the training has logged of batches of its own, which may differ from those
            of probes by a constant.
    """

    step: int
    H: float
    H_se: float
    change: float | None = None
    change_se: float | None = None
    logged: bool = False

    @property
    def has_change(self) -> bool:
        """Whether the change by the step was measured."""
        return self.change is not None and self.change_se is not None

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are finite; a reading from a single prompt has an infinite error."""
        numbers = (self.H, self.H_se, self.change, self.change_se)
        return all(math.isfinite(x) for x in numbers if x is not None)


def recent_readings(readings: Sequence[EntropyReading], horizon: int, window: int) -> list[EntropyReading]:
    """The last `window` readings as far as they lie within four horizons of the last one; at least five in any case.

    Args:
        readings: in the order of their steps.
        horizon: optimizer steps.
        window: number of readings.

    >>> readings = [EntropyReading(step, 1.0, 0.0, 0.0, 0.0) for step in range(0, 100, 10)]
    >>> [one.step for one in recent_readings(readings, horizon=15, window=20)]
    [30, 40, 50, 60, 70, 80, 90]
    >>> [one.step for one in recent_readings(readings, horizon=1, window=20)]
    [50, 60, 70, 80, 90]
    """
    oldest = readings[-1].step - WINDOW_HORIZONS * horizon
    recent = [one for one in readings[:-LEAST_WINDOW] if one.step >= oldest]
    return [*recent, *readings[-LEAST_WINDOW:]][-window:]


def logged_readings(levels: Sequence[tuple[int, float]]) -> list[EntropyReading]:
    """Levels that a training has logged, with their error: what they scatter by from one to the next.

    The error is the median absolute deviation of the differences of neighbouring logarithms, scaled to a standard
    deviation and divided by the square root of 2. What the steps in between have really done is in it, so it is rather
    too large; that of a level below the median is that of the median. A level more than `OUTLIER` errors off the middle
    one of itself and its two neighbours is an odd batch and no odd policy, unless the next one confirms it: its error
    is as large as that distance. Fewer than five levels do not tell, and are left out, as are those that are not
    positive and finite.

    Args:
        levels: optimizer step and entropy in nats per token, in the order of steps.

    >>> [round(one.H_se, 3) for one in logged_readings([(k, 1.0 + 0.01 * (k % 2)) for k in range(7)])][:2]
    [0.01, 0.011]
    """
    usable = [(step, H) for step, H in levels if math.isfinite(H) and H > 0]
    if len(usable) < LEAST_LOGGED:
        return []
    differences = [math.log(after / before) for (_, before), (_, after) in pairwise(usable)]
    middle = median(differences)
    spread = median(abs(one - middle) for one in differences)
    error = max(1.4826 * spread / math.sqrt(2), SMALLEST_LOGGED_ERROR)
    usual = median(H for _, H in usable)
    odd = _oddities([H for _, H in usable])
    return [
        EntropyReading(
            step, H, max(error * max(H, usual), off if off > OUTLIER * error * usual else 0.0), logged=True
        )
        for (step, H), off in zip(usable, odd, strict=True)
    ]


def _oddities(levels: Sequence[float]) -> list[float]:
    """Distance of each level from the middle one of itself and its two neighbours, at the ends of the nearest three."""
    last = len(levels) - 3
    return [abs(H - median(levels[min(max(k - 1, 0), last) :][:3])) for k, H in enumerate(levels)]


def above_zero(H: float) -> float:
    """A level in nats per token that has a logarithm: a policy without any choice left has none."""
    return max(H, SMALLEST_ENTROPY)


def usable_readings(readings: Sequence[EntropyReading]) -> list[EntropyReading]:
    """The readings that are finite, all of them checked."""
    for before, after in pairwise(readings):
        if after.step < before.step or (after.step == before.step and not after.logged):
            raise ValueError(
                f"readings must be in increasing order of step: {after.step} follows {before.step}"
            )
    for reading in readings:
        if reading.H <= 0:
            raise ValueError(
                f"the entropy must be positive, but is {reading.H} nats per token at step {reading.step}"
            )
        if reading.H_se < 0 or (reading.change_se or 0.0) < 0:
            raise ValueError(f"a standard error is negative at step {reading.step}")
    return [reading for reading in readings if reading.is_finite]
