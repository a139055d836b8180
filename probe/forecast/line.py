"""A line through readings, weighted by what each is worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probe.forecast.noise import Noise
from probe.forecast.readings import Array


@dataclass(frozen=True)
class Line:
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


def fit_line(
    step: NDArray[np.int64],
    increments: Array,
    level: Array,
    increment_variance: Array,
    level_variance: Array,
    by_level: Array,
    noise: Noise,
) -> Line:
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
    n = len(step)
    left = (step[-1] + 1 - step).astype(np.float64)  # steps from a reading's to now
    V = _noise_covariance(step, left, noise.phi) * noise.variance
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
    return Line(
        rate=float(rate),
        level=float(now),
        rate_variance=float(covariance[0, 0]),
        level_variance=float(covariance[1, 1]),
        covariance=float(covariance[0, 1]),
    )


def _noise_covariance(step: NDArray[np.int64], left: Array, phi: float) -> Array:
    """Covariance of the readings' `(increments, levels)` by the noise of the steps, `(2n, 2n)`, for a variance of 1.

    Args:
        step: `(n,)`.
        left: `(n,)`, steps from each reading's to now.
        phi: autocorrelation of the noise.
    """
    apart = np.abs(step[:, None] - step[None, :])
    tail = np.minimum(left[:, None], left[None, :])
    # covariances of e[step_i], and of the sums from step_i to now
    of_steps = np.power(phi, apart)
    of_sums = _sum_variance(tail, phi) + _adjacent_sums(apart, tail, phi)
    inside = left[:, None] <= left[None, :]  # step_i lies in the sum from step_j
    outside_it = np.power(phi, apart) * _geometric(left[None, :], phi)
    inside_it = _geometric(left[:, None], phi) + _geometric(apart + 1, phi) - 1
    mixed = np.where(inside, inside_it, outside_it)
    return np.block([[of_steps, -mixed], [-mixed.T, of_sums]])


def _geometric(n: Array, phi: float) -> Array:
    """`1 + phi + ... + phi^(n - 1)`."""
    return (1 - np.power(phi, n)) / (1 - phi)


def _sum_variance(n: Array, phi: float) -> Array:
    """Variance of the sum of `n` neighbouring steps of an autoregressive noise of variance 1."""
    return n * (1 + phi) / (1 - phi) - 2 * phi * _geometric(n, phi) / (1 - phi)


def _adjacent_sums(n: Array, m: Array, phi: float) -> Array:
    """Covariance of the sum of `n` steps with that of the `m` steps right after them."""
    return phi * _geometric(n, phi) * _geometric(m, phi)
