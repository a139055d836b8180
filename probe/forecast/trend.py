"""What readings say about the trend of the entropy: level and drift under every hypothesis, by a Kalman filter.

In the coordinate `g` of a hypothesis (`probe.forecast.hypotheses`), with `k` the optimizer step,

    level      y[k+1] = y[k] + r[k] + e[k]
    drift      r[k+1] = rho r[k] + w[k]                    variance of w: (kappa D)^2
    noise      e[k+1] = phi e[k] + sqrt(1 - phi^2) u[k]    variance of e: (nu D)^2

`D` is the usual size of a step. The noise is real, since every batch pushes differently, and autocorrelated: with
independent batches an update of momentum `beta1` is correlated by `phi = beta1` with the next. Readings are

    measured level     g(H)                 = y[k] + its error
    measured change    g(H + change) - g(H) = r[k] + e[k] + its error
    logged level       g(H)                 = y[k] + H g'(H) o + its error

where `o` is the constant share by which the entropy that a training logs of its own batches may differ from the
probe's. Everything is linear and Gaussian: the filter gives mean and covariance of `(y, r, e, o)`, and the likelihood
of the readings, which weighs the hypotheses (West and Harrison, Bayesian Forecasting and Dynamic Models, 1997,
chapters 4 and 12).

A training may change its kind, as where the learning rate is cut. So there are hypotheses of a split (`SPLITS`): from
one reading on, drift and noise are drawn anew and are of a hypothesis of their own, with a usual step that the readings
from there on tell; the level goes on where it is. Their probability is the prior one of the split, times the likelihood
of the readings before it, averaged over the hypotheses of the same coordinate, times that of the readings after it. The
average over hypotheses is handed on as a normal distribution of level and offset, with its mean and covariance.

Level and change of one probe are measured on one E, and their errors are taken as independent. They are correlated,
with a sign that depends on the update: between -0.9 and 0.8 on the enumerated policies of known tails, within 0.1 on
the demo policy with control variates (-0.45 without). That matters little, as many levels say what a level's error was.
On 150 trainings with changes read with an error of their own size and correlations of -0.9, 0 and 0.9: 99.4, 99.2 and
98.6 % of the intervals with an end hold the collapse of exponential falls, the median lead is 53, 60 and 68 steps, and
falls that flatten have 0.02, 0.03 and 0.06 false alarms per 100 steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probe.forecast.hypotheses import Array, Hypotheses, coordinate

LARGEST_FALL = 0.95
"""Largest share of the entropy that one step can take: a noisy reading may claim it all, and log(0) is no rate."""
FIRST_LEVEL = 10.0
"""Prior standard deviation of the level, in units of the first one read."""
FIRST_DRIFT = 1.5
"""Prior standard deviation of the drift, in units of the usual size of a step."""
OFFSET = 0.3
"""Prior standard deviation of a logged level's constant difference, as a share of the entropy."""
LEAST_SHARE = 0.05
"""A level that a filter holds possible counts as at least this share of the one that was read with it."""
LEAST_LEVEL_ERROR, LEAST_CHANGE_ERROR = 1e-6, 1e-3
"""Errors that readings have at least: levels in units of the first one, changes in units of the usual step. Without any
they would leave nothing of the state's covariance but rounding."""
SPLITS = {32: 0.1, 16: 0.1, 8: 0.1}
"""Measured changes since which everything but the level may be of another kind than before, as after a change of the
learning rate, with the probability of that before any reading, in units of that of no such split."""
LEAST_EARLY = 4
"""Fewest measured changes before a split."""
LEVEL, DRIFT, NOISE, OFF = range(4)
"""Places in the state."""


@dataclass(frozen=True)
class ReadingArrays:
    """Readings of `S` trainings at the same steps, in their order; nats per token.

    Attributes:
        step: `(N,)` optimizer steps.
        logged: `(N,)`, whether a level comes from the training's own log.
        has_change: `(N,)`, whether the change by the step was measured.
        level: `(S, N)`, before the step.
        level_se: `(S, N)`.
        change: `(S, N)`, by the step; only used where `has_change`.
        change_se: `(S, N)`.
    """

    step: NDArray[np.int64]
    logged: NDArray[np.bool_]
    has_change: NDArray[np.bool_]
    level: Array
    level_se: Array
    change: Array
    change_se: Array

    def part(self, places: NDArray[np.int64] | slice) -> ReadingArrays:
        """Some of the readings."""
        numbers = (x[:, places] for x in (self.level, self.level_se, self.change, self.change_se))
        return ReadingArrays(self.step[places], self.logged[places], self.has_change[places], *numbers)

    def in_units_of(self, unit: Array) -> ReadingArrays:
        """Levels and changes divided by `unit`, `(S, 1)`."""
        numbers = (self.level, self.level_se, self.change, self.change_se)
        return ReadingArrays(self.step, self.logged, self.has_change, *(x / unit for x in numbers))


@dataclass(frozen=True)
class Trend:
    """Level and drift after an optimizer step, under `G` hypotheses for `S` trainings.

    Attributes:
        step: that step.
        given: the hypotheses: those without a split, then those of each split.
        phi: autocorrelation of the noise.
        unit: `(S, 1)` nats per token: levels are in units of this.
        mean: `(4, S, G)` of level, drift, noise, offset, in the hypothesis' coordinate.
        covariance: `(4, 4, S, G)`.
        wander: `(S, G)`, variance of the drift's change per step.
        noise: `(S, G)`, variance of the steps' noise.
        weight: `(S, G)`, probabilities of the hypotheses given the readings.
    """

    step: int
    given: Hypotheses
    phi: float
    unit: Array
    mean: Array
    covariance: Array
    wander: Array
    noise: Array
    weight: Array

    @property
    def level(self) -> Array:
        """`(S,)` nats per token: the mean of what the hypotheses say."""
        H = self.given.inverse(self.mean[LEVEL], least=0.0)
        return np.asarray((self.weight * H).sum(1) * self.unit[:, 0])

    @property
    def rate(self) -> tuple[Array, Array]:
        """`(S,)` each: mean relative change of the entropy per step now, and its standard error."""
        least = LEAST_SHARE * self.level / self.unit[:, 0]
        H = self.given.inverse(self.mean[LEVEL], least[:, None])
        relative = 1 / (H * self.given.slope(H))  # dlog H / dg
        each = relative * self.mean[DRIFT]
        mean = (self.weight * each).sum(1)
        square = relative**2 * self.covariance[DRIFT, DRIFT] + (each - mean[:, None]) ** 2
        return mean, np.sqrt((self.weight * square).sum(1))


def fit_trend(
    readings: ReadingArrays,
    given: Hypotheses,
    momentum: float,
    now: int | None = None,
    splits: Mapping[int, float] = SPLITS,
) -> Trend:
    """What the readings say of level and drift after a step.

    Args:
        readings: the first one of a probe, one of them with a change; levels above 0.
        given: the hypotheses.
        momentum: autocorrelation `phi` of the noise from one step to the next, in [0, 1).
        now: the step, not before the last reading's; None where it is that.
        splits: see `SPLITS`.

    Raises:
        ValueError: `now` is before the last reading's step.
    """
    last = int(readings.step[-1])
    now = last if now is None else now
    if now < last:
        raise ValueError(f"now must not be before the last reading's step {last}, but is {now}")
    unit = readings.level[:, :1]
    own = readings.in_units_of(unit)
    size = _usual_step(own, given)
    state = _Filter(given, momentum, own, size)
    starts = split_places(own, splits)
    for j in range(len(own.step)):
        if j:
            state.advance(int(own.step[j] - own.step[j - 1]))
        if j in starts:
            state.split(j, starts[j])
        state.take_level(j)
        if own.has_change[j]:
            state.take_change(j)
    state.advance(now + 1 - last)  # a level is that before its step
    weight = np.exp(state.log_weight - state.log_weight.max(1, keepdims=True))
    weight /= weight.sum(1, keepdims=True)
    return Trend(
        now, state.given, momentum, unit, state.mean, state.covariance, state.wander, state.noise, weight
    )


class _Filter:
    """The filter's state; see `Trend` for its arrays."""

    def __init__(self, given: Hypotheses, phi: float, readings: ReadingArrays, size: Array) -> None:
        """Nothing is read yet.

        Args:
            given: the hypotheses.
            phi: autocorrelation of the noise.
            readings: in units of the first level.
            size: `(S, G)`, the usual size of a step.
        """
        self.given, self._phi, self._readings = given, phi, readings
        self._first, self._size = given, size
        self.wander, self.noise = (given.wander * size) ** 2, (given.noise * size) ** 2
        self.mean = np.zeros((4, *size.shape))
        self.covariance = np.zeros((4, 4, *size.shape))
        # the level is not known at all: the first reading sets it
        self.mean[LEVEL] = given.transform(readings.level[:, :1])
        self.covariance[LEVEL, LEVEL] = (
            1e4 * (given.slope(readings.level[:, :1]) * readings.level[:, :1]) ** 2
        )
        self.covariance[DRIFT, DRIFT] = (FIRST_DRIFT * size) ** 2
        self.covariance[NOISE, NOISE] = self.noise
        self.covariance[OFF, OFF] = OFFSET**2
        self.log_weight = np.broadcast_to(given.log_prior, size.shape).copy()

    def split(self, j: int, prior: float) -> None:
        """Join hypotheses whose drift, noise and usual step are drawn anew at reading `j`.

        What all readings before say of level and offset stays, averaged over the hypotheses of the same coordinate, as
        does how well these have foretold them.

        Args:
            j: the first reading of the late segment.
            prior: probability of the split, in units of that of none.
        """
        given = self._first
        size = _usual_step(self._readings.part(slice(j, None)), given)
        late = _Filter(given, self._phi, self._readings, size)
        for power in np.unique(given.power):
            of = np.flatnonzero(given.power == power)
            top = self.log_weight[:, of].max(1, keepdims=True)
            weight = np.exp(self.log_weight[:, of] - top)
            total = weight.sum(1, keepdims=True)
            weight = weight / total
            means = {k: (weight * self.mean[k][:, of]).sum(1, keepdims=True) for k in (LEVEL, OFF)}
            for (k, mean), (n, other) in itertools.product(means.items(), repeat=2):
                apart = (self.mean[k][:, of] - mean) * (self.mean[n][:, of] - other)
                spread = weight * (self.covariance[k, n][:, of] + apart)
                late.mean[k][:, of] = mean
                late.covariance[k, n][:, of] = spread.sum(1, keepdims=True)
            # the prior of the coordinate is in the evidence of the early segment
            late.log_weight[:, of] += top + np.log(total * prior / np.exp(given.log_prior[of]).sum())
        self.given = self.given.joined(given)
        for name in ("_size", "wander", "noise", "mean", "covariance", "log_weight"):
            setattr(self, name, np.concatenate([getattr(self, name), getattr(late, name)], axis=-1))

    def advance(self, steps: int) -> None:
        """So many optimizer steps pass."""
        given, phi = self.given, self._phi
        a, b = geometric(given.persistence, steps), geometric(phi, steps)
        rho, fade = given.persistence**steps, phi**steps

        def moved(x: Array) -> Array:
            """`A x` over the first axis."""
            level = x[LEVEL] + a * x[DRIFT] + b * x[NOISE]
            return np.stack([level, rho * x[DRIFT], fade * x[NOISE], x[OFF]])

        self.mean = moved(self.mean)
        P = moved(self.covariance)
        self.covariance = moved(P.swapaxes(0, 1))
        by_wander, by_noise = added_variance(given.persistence, steps), added_variance(phi, steps)
        for variance, part, place in ((self.wander, by_wander, DRIFT), (self.noise, by_noise, NOISE)):
            # the noise is stationary, with variance 1 - phi^2 in what is new
            scaled = variance * (1 - phi * phi) if place == NOISE else variance
            self.covariance[LEVEL, LEVEL] += scaled * part[0]
            self.covariance[LEVEL, place] += scaled * part[1]
            self.covariance[place, LEVEL] += scaled * part[1]
            self.covariance[place, place] += scaled * part[2]

    def take_level(self, j: int) -> None:
        """Take the level of reading `j` in."""
        H, se = self._readings.level[:, j, None], self._readings.level_se[:, j, None]
        slope = self.given.slope(H)
        of = {LEVEL: np.ones(1), OFF: H * slope} if self._readings.logged[j] else {LEVEL: np.ones(1)}
        variance = (slope * se) ** 2 + (slope * LEAST_LEVEL_ERROR) ** 2
        self._take(of, self.given.transform(H), variance, slope)

    def take_change(self, j: int) -> None:
        """Take the change of reading `j` in, from the level that all readings up to this one give."""
        read = self._readings.level[:, j, None]
        H = self.given.inverse(self.mean[LEVEL], LEAST_SHARE * read)
        relative = np.maximum(self._readings.change[:, j, None] / H, -LARGEST_FALL)
        change = self.given.transform(H * (1 + relative)) - self.given.transform(H)
        slope = self.given.slope(H * (1 + relative))  # of g(H + change) by the change
        error = slope * self._readings.change_se[:, j, None]
        self._take(
            {DRIFT: np.ones(1), NOISE: np.ones(1)},
            change,
            error**2 + (LEAST_CHANGE_ERROR * self._size) ** 2,
            slope,
        )

    def _take(self, of: Mapping[int, Array], value: Array, variance: Array, slope: Array) -> None:
        """One reading of a sum of some places of the state.

        Args:
            of: what is read: place and factor.
            value: `(S, G)`, the reading.
            variance: `(S, G)`, of its error.
            slope: `(S, G)`, `dg / dH`: hypotheses are compared by the likelihood of what was read, nats.
        """
        with_state = np.sum([factor * self.covariance[:, place] for place, factor in of.items()], axis=0)
        own = np.sum([factor * with_state[place] for place, factor in of.items()], axis=0)
        total = np.maximum(own, 0.0) + variance
        surprise = value - np.sum([factor * self.mean[place] for place, factor in of.items()], axis=0)
        self.log_weight += np.log(slope) - 0.5 * (np.log(total) + surprise**2 / total)
        gain = with_state / total
        self.mean = self.mean + gain * surprise
        self.covariance = self.covariance - gain[:, None] * with_state[None]


def split_places(readings: ReadingArrays, splits: Mapping[int, float]) -> dict[int, float]:
    """First reading of each late segment, and the prior probability of its split; see `SPLITS`."""
    measured = np.flatnonzero(readings.has_change)
    return {
        int(measured[-late]): prior for late, prior in splits.items() if len(measured) >= late + LEAST_EARLY
    }


def geometric(x: Array | float, n: int) -> Array:
    """`1 + x + ... + x^(n - 1)`.

    >>> geometric(0.5, 3).item(), geometric(1.0, 3).item()
    (1.75, 3.0)
    """
    x = np.asarray(x, dtype=np.float64)
    below = np.where(x == 1, 0.0, x)
    return np.where(x == 1, float(n), (1 - below**n) / (1 - below))


def added_variance(x: Array | float, n: int) -> tuple[Array, Array, Array]:
    """Variance that `n` steps add to a level and to its drift, for a drift `r' = x r + w` with `w` of variance 1.

    By doubling: probes may lie thousands of steps apart.

    Args:
        x: persistence of the drift, or autocorrelation of the noise.
        n: steps.

    Returns:
        Variance of the level, covariance of level and drift, variance of the drift.

    >>> [float(v) for v in added_variance(1.0, 3)]  # w1 counts twice in the level, w2 once
    [5.0, 3.0, 3.0]
    """
    x = np.asarray(x, dtype=np.float64)
    if n < 2:
        zero = np.zeros_like(x)
        return zero, zero, zero + n
    half = added_variance(x, n // 2)
    level, both, drift = _carried(half, x, n // 2)
    level, both, drift = level + half[0], both + half[1], drift + half[2]
    if n % 2:
        level, both, drift = _carried((level, both, drift), x, 1)
        drift = drift + 1
    return level, both, drift


def _carried(variance: tuple[Array, Array, Array], x: Array, n: int) -> tuple[Array, Array, Array]:
    """Variances of level and drift after `n` more steps in which nothing is added."""
    level, both, drift = variance
    reach, left = geometric(x, n), x**n
    return level + 2 * reach * both + reach**2 * drift, left * (both + reach * drift), left**2 * drift


def _usual_step(readings: ReadingArrays, given: Hypotheses) -> Array:
    """`(S, G)`: root mean square of the measured changes, that of their errors taken off in part.

    Half of it only, and never more than nine tenths: the difference of two noisy numbers is often 0 by chance. Where
    logged levels have moved faster between probes than any probe has seen, it is what they have clearly moved by.
    """
    measured = readings.has_change
    H = readings.level[:, measured]
    relative = np.maximum(readings.change[:, measured] / H, -LARGEST_FALL)
    sizes = {}
    for power in np.unique(given.power):
        slope = H ** (power - 1)
        # log(1 + x) and x differ in the second order only; a step is small
        change = np.log1p(relative) if power == 0 else slope * H * relative
        square, error = (change**2).mean(1), ((slope * readings.change_se[:, measured]) ** 2).mean(1)
        usual = np.sqrt(np.maximum(square - 0.5 * error, 0.1 * square)) + 1e-9
        sizes[power] = np.maximum(usual, _logged_slope(readings, power))
    return np.stack([sizes[power] for power in given.power], axis=1)


def _logged_slope(readings: ReadingArrays, power: float) -> Array:
    """`(S,)`: what the last half of the logged levels has moved by per step, two standard errors taken off."""
    places = np.flatnonzero(readings.logged)
    places = places[len(places) // 2 :]
    step = readings.step[places].astype(np.float64)
    if len(places) < 3 or step[0] == step[-1]:
        return np.zeros(len(readings.level))
    H = readings.level[:, places]
    g = coordinate(H, power)
    centred = step - step.mean()
    slope = g @ centred / (centred @ centred)
    error = (H ** (power - 1) * readings.level_se[:, places]).max(1) / np.sqrt(centred @ centred)
    return np.maximum(np.abs(slope) - 2 * error, 0.0)
