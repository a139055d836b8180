"""The scatter of readings around their trend."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from probe.estimators.student import student_quantile
from probe.forecast.readings import Array

MAX_AUTOCORRELATION = 0.8
"""Largest autocorrelation between readings that is believed when it was estimated from the window."""


@dataclass(frozen=True)
class Noise:
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


def fit_noise(step: NDArray[np.int64], increments: Array, reading_variance: float, momentum: float) -> Noise:
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
    return Noise(variance=real, phi=phi, quantile=student_quantile(freedom))
