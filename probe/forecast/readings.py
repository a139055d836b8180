"""Readings of the entropy, and those that a forecast can use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

LEAST_READINGS = 3
"""Fewest readings that a forecast is made from: two for the rate, one more for its error."""
LEAST_SINCE_CHANGE = 4
"""Fewest readings that show that the drift has changed."""
CHANGED = 4.0
"""Standard errors by which it must have."""
LARGEST_FALL = 0.99
"""Largest share of the entropy that one step can take: a noisy reading may claim it all, and log(0) is no rate."""
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


def since_change(readings: Sequence[EntropyReading], momentum: float) -> Sequence[EntropyReading]:
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


def usable_readings(readings: Sequence[EntropyReading]) -> list[EntropyReading]:
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
