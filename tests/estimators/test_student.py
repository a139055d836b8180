"""Quantiles of Student's t, against scipy's."""

from __future__ import annotations

import pytest
from scipy import stats

from probe.estimators.student import student_quantile


def test_student_quantile():
    for freedom in (2, 2.5, 3, 5.3, 9, 29, 57.6, 58, 200, 5000):
        assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-4)
    for freedom in (1, 1.01, 1.1, 1.5, 1.9):
        assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)
    assert student_quantile(9, 0.5) == pytest.approx(stats.t.ppf(0.75, 9), rel=1e-4)
