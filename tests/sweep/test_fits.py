"""Slopes on log-log axes."""

from __future__ import annotations

import numpy as np
import pytest

from probe.sweep.fits import fit_power_law


def test_an_exact_power_law_is_found():
    x = np.geomspace(1e-5, 1e-1, 9)
    fit = fit_power_law(x, -3.5 * x**1.75, 0.01 * x**1.75)
    assert fit.slope == pytest.approx(1.75, abs=1e-12)
    assert fit.at(x) == pytest.approx(3.5 * x**1.75)
    assert (fit.points, fit.x_min, fit.x_max) == (9, x[0], x[-1])


def test_groups_have_factors_of_their_own_and_a_slope_in_common():
    x = np.array([1.0, 2.0, 4.0, 1.0, 8.0])
    y = np.array([2.0, 2.0, 2.0, 5.0, 5.0]) * x**2
    fit = fit_power_law(x, y, 0.1 * y, ["a", "a", "a", "b", "b"])
    assert fit.slope == pytest.approx(2)
    assert fit.factors == pytest.approx({"a": 2.0, "b": 5.0})


def test_the_standard_error_is_that_of_repeated_draws():
    """Heteroscedastic errors: the spread of fitted slopes is the stated error, and the mean is the slope."""
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 100, 8)
    y, se = 2 * x**1.5, np.linspace(0.005, 0.03, 8) * 2 * x**1.5
    fits = [fit_power_law(x, y + se * rng.standard_normal(8), se) for _ in range(2000)]
    slopes = np.array([fit.slope for fit in fits])
    assert slopes.mean() == pytest.approx(1.5, abs=4 * slopes.std() / 2000**0.5)
    assert slopes.std() == pytest.approx(fits[0].slope_se, rel=0.06)


def test_without_errors_the_scatter_gives_the_standard_error():
    rng = np.random.default_rng(1)
    x = np.geomspace(1, 100, 12)
    fits = [fit_power_law(x, x**-0.5 * np.exp(0.05 * rng.standard_normal(12))) for _ in range(1000)]
    slopes = np.array([fit.slope for fit in fits])
    errors = np.array([fit.slope_se for fit in fits])
    assert slopes.std() == pytest.approx(np.sqrt((errors**2).mean()), rel=0.08)


def test_too_few_points():
    assert fit_power_law([], []) is None
    assert fit_power_law([2.0, 2.0], [1.0, 3.0]) is None
    assert fit_power_law([1.0, 2.0], [1.0, 3.0], group=["a", "b"]) is None
    assert fit_power_law([1.0, 2.0], [1.0, 4.0]).slope_se is None
