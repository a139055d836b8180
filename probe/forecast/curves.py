"""Curves over a training: sums of the changes of steps of which only some were probed."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class CumulativeSum:
    """A cumulative sum of per-step changes, known on probed steps and interpolated linearly between them.

    The steps `k_j .. k_(j+1) - 1`, of which the first is probed, change entropy by
    `g c_j + (g - 1) / 2 (c_(j+1) - c_j)` with `g = k_(j+1) - k_j`: their exact sum for `g = 1`, and wherever the
    change is linear in the step. Its variance has two parts. The errors of the `c_j` enter with their weights in the
    whole sum. What was not probed scatters about the line: with a noise of the steps of variance `s^2` and
    autocorrelation `phi` from one to the next, by `scatter(g, phi) s^2`, and `s^2` is taken from
    `E[(c_(j+1) - c_j)^2] = 2 s^2 (1 - phi^g) + their errors`, summed over all gaps.

    Attributes:
        total: the sum from the first probed step up to but without the last one, nats.
        sampling: variance of `total` from the errors of the changes.
        scattering: variance from the steps that were not probed, before it is cut off at 0.
        step: the last probed step, or None.
        change: its change, nats.
        change_variance: and the variance of that.
        weight: what the last change counts in `total` so far.
        unit: what `scattering` is for steps of variance 1.
    """

    total: float = 0.0
    sampling: float = 0.0
    scattering: float = 0.0
    step: int | None = None
    change: float = 0.0
    change_variance: float = 0.0
    weight: float = 0.0
    unit: float = 0.0

    @property
    def step_variance(self) -> float:
        """Variance of the steps about the line, nats squared, at least 0; 0 where all are probed."""
        return max(self.scattering, 0.0) / self.unit if self.unit > 0 else 0.0

    def advance(self, step: int, change: float, se: float, phi: float = 0.0) -> tuple[float, float]:
        """Take the change of one probed step in.

        Args:
            step: the probed step, larger than the last one.
            change: its change, nats.
            se: standard error of `change`, independent of the others'.
            phi: autocorrelation of the steps' noise: Adam's `beta1`, SGD's momentum.

        Returns:
            The sum of the changes from the first probed step up to but without this one, and its standard error.
        """
        if self.step is not None:
            gap = step - self.step
            before, here = (gap + 1) / 2, (gap - 1) / 2
            self.total += before * self.change + here * change
            # the last change was in the sum already with the weight of the gap before it
            self.sampling += ((self.weight + before) ** 2 - self.weight**2) * self.change_variance
            self.sampling += here**2 * se**2
            excess = (change - self.change) ** 2 - self.change_variance - se**2
            self.unit += scatter(gap, phi)
            self.scattering += scatter(gap, phi) * excess / (2 * (1 - phi**gap))
            self.weight = here
        self.step, self.change, self.change_variance = step, change, se**2
        return self.total, math.sqrt(self.sampling + max(self.scattering, 0.0))


@dataclass
class Anchor:
    """Where a curve of summed changes starts: by all levels, not by the first one alone.

    Every level says what the first one was: itself minus the sum of the changes since, with its own error and that of
    the sum, a random walk. The best linear estimate is that of generalised least squares, here step by step: a Kalman
    filter of the start `a` and the sum's error `e`, of which each level reads `a + e`.

    Attributes:
        known: whether there was a level with a finite error.
        value: the entropy at the first probe, nats.
        variance: of `value`.
        error: estimate of `e`, nats.
        error_variance: what is left of its variance.
        covariance: of both.
        walked: variance of `e` before any level is taken in: that of the sum.
    """

    known: bool = False
    value: float = 0.0
    variance: float = math.inf
    error: float = 0.0
    error_variance: float = 0.0
    covariance: float = 0.0
    walked: float = 0.0

    def take(self, level: float, level_se: float, total: float, total_se: float) -> tuple[float, float]:
        """Take a level in.

        Args:
            level: now, nats.
            level_se: its standard error, independent of all others.
            total: sum of the changes since the first probe, nats.
            total_se: its standard error.

        Returns:
            The curve now, start plus sum, and its standard error.
        """
        grown = max(total_se**2 - self.walked, 0.0)
        self.walked += grown
        self.error_variance += grown
        start = level - total
        if not self.known:
            self.value = start
            if math.isfinite(level_se):
                # nothing was known of the start, and `e` is as large as the sum's error
                self.known, self.variance = True, level_se**2 + self.walked
                self.covariance, self.error_variance = -self.walked, self.walked
        else:
            self._correct(start, level_se)
        return self.value + total, self._curve_se

    def _correct(self, start: float, level_se: float) -> None:
        """The filter's step; a level without a finite error says nothing."""
        with_start, with_error = self.variance + self.covariance, self.covariance + self.error_variance
        spread = with_start + with_error + level_se**2
        if not (math.isfinite(spread) and spread > 0):
            return
        surprise = start - self.value - self.error
        self.value += with_start / spread * surprise
        self.error += with_error / spread * surprise
        self.variance -= with_start**2 / spread
        self.covariance -= with_start * with_error / spread
        self.error_variance -= with_error**2 / spread

    @property
    def _curve_se(self) -> float:
        """Of start plus sum: the sum's error is as it was, whatever the levels say of it."""
        return math.sqrt(max(self.variance + 2 * self.covariance + self.walked, 0.0))


def level_change(level: float, se: float, first: tuple[float, float] | None) -> tuple[float, float]:
    """A level minus the first one, nats, with its standard error.

    Args:
        level: now, nats.
        se: its standard error, nats, independent of the first one's.
        first: the first level and its standard error; None where this one is it.

    >>> level_change(2.0, 0.3, first=(1.5, 0.4)), level_change(2.0, 0.3, first=None)
    ((0.5, 0.5), (0.0, 0.0))
    """
    if first is None:
        return 0.0, 0.0
    return level - first[0], math.hypot(se, first[1])


def scatter(gap: int, phi: float) -> float:
    """What a gap adds to the variance of the interpolated sum about the true one, for steps of variance 1.

    In the difference of the two, a probed step counts `gap - 1` (half of that for the gap on either side) and each of
    the `gap - 1` steps after it -1. This is the variance of such a sum over many gaps, for one of them.

    >>> scatter(1, 0.5), scatter(3, 0.0)
    (0.0, 6.0)
    """
    weights = [gap - 1.0, *[-1.0] * (gap - 1)]
    reach = 0.0  # sum of the weights before, each times phi to the power of its distance
    for weight in weights:
        reach = phi * (reach + weight)
    reach /= 1 - phi**gap  # and of those in all gaps before
    total = 0.0
    for weight in weights:
        total += weight * weight + 2 * weight * reach
        reach = phi * (reach + weight)
    return total
