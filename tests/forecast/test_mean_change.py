"""The mean change over the last probes: exact where it can be, its variance written out, its interval right."""

from __future__ import annotations

import math

import numpy as np
import pytest

from probe.forecast.curves import scatter
from probe.forecast.mean_change import LARGEST_FREEDOM, ProbedChange, mean_change


def test_it_is_the_plain_mean_where_every_step_is_probed():
    g = np.random.default_rng(0)
    values, errors, df = g.standard_normal(12), g.random(12), g.integers(3, 60, 12)
    changes = [
        ProbedChange(k + 4, float(x), float(e), float(f))
        for k, (x, e, f) in enumerate(zip(values, errors, df, strict=True))
    ]
    found = mean_change(changes, phi=0.9)
    variances = (errors / 12) ** 2
    assert found.value == pytest.approx(values.mean(), abs=1e-14)
    assert found.se == pytest.approx(math.sqrt(variances.sum()), rel=1e-12)
    assert found.df == pytest.approx((variances.sum() / (variances / np.sqrt(df)).sum()) ** 2, rel=1e-12)


@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_its_variance_is_that_of_its_weights_and_of_the_steps_between(phi):
    steps = [3, 4, 9, 12, 20]
    values, errors = [-0.5, 0.9, -0.3, 0.8, -1.0], [0.1, 0.02, 0.05, 0.1, 0.03]

    def mean(given, noise=errors):
        rows = zip(steps, given, noise, strict=True)
        return mean_change([ProbedChange(k, x, e, 30.0) for k, x, e in rows], phi)

    weights = np.array([mean(row).value for row in np.eye(5).tolist()])
    assert weights.sum() == pytest.approx(1)
    by_step = np.interp(np.arange(3, 21), steps, values)
    assert mean(values).value == pytest.approx(by_step.mean())
    gap, x, e = np.diff(steps), np.array(values), np.array(errors)
    excess = np.diff(x) ** 2 - e[1:] ** 2 - e[:-1] ** 2
    between = sum(scatter(int(n), phi) * d / (2 * (1 - phi**n)) for n, d in zip(gap, excess, strict=True))
    assert between > 0
    assert mean(values).se == pytest.approx(math.sqrt(((weights * e) ** 2).sum() + between / 18**2))
    assert 1 <= mean(values).df < 5
    # equal changes read without error are known; a trend is taken for scatter, on the safe side
    assert mean([0.1] * 5, [0.0] * 5).se == 0.0
    line = mean([0.1 * k for k in steps], [0.0] * 5)
    assert line.value == pytest.approx(0.1 * 11.5)
    assert line.se > 0


def test_what_it_cannot_be_made_from():
    one, unknown = ProbedChange(1, 0.1, 0.0, 5.0), ProbedChange(2, 0.1, math.inf, 1.0)
    assert mean_change([]) is None
    assert mean_change([one, unknown]) is None
    still = mean_change([one, unknown, ProbedChange(3, 0.1, 0.0, 5.0)])
    assert (still.value, still.se, still.df) == (pytest.approx(0.1), 0.0, LARGEST_FREEDOM)
    assert still.ci95 == (still.value, still.value)


def coverage(every, phi, noise, spread=1.0, probes=10, runs=2000):
    """How often the interval holds the mean over the steps of that stretch."""
    g = np.random.default_rng(every + int(100 * phi))
    n = every * (probes - 1) + 1
    e = g.standard_normal((runs, n))
    for k in range(1, n):
        e[:, k] = phi * e[:, k - 1] + math.sqrt(1 - phi**2) * e[:, k]
    true = 0.3 + spread * e
    read = true[:, ::every] + noise * g.standard_normal((runs, probes))
    # the errors' own sizes are estimates too, of 63 degrees of freedom
    said = noise * np.sqrt(g.chisquare(63, read.shape) / 63)
    held = 0
    for truth, values, errors in zip(true.mean(1), read, said, strict=True):
        rows = zip(values.tolist(), errors.tolist(), strict=True)
        low, high = mean_change(
            [ProbedChange(every * k, x, s, 63.0) for k, (x, s) in enumerate(rows)], phi
        ).ci95
        held += low - 1e-12 <= truth <= high + 1e-12
    return held / runs


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("every", "noise"), [(1, 0.0), (1, 1.0), (5, 0.0), (5, 0.3), (5, 1.0)])
def test_its_interval_holds_as_often_as_it_says(every, noise, phi):
    found = coverage(every, phi, noise)
    if every == 1 and noise == 0.0:
        assert found == 1.0
    else:
        assert 0.93 <= found <= 0.97, found
