"""Numbers with their errors as text."""

from __future__ import annotations

import math

import pytest

from probe.digits import interval_text, with_error


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        ([-0.00173, -0.00051], "[-0.00173, -0.00051]"),
        ((1200.0, 1300.0), "[1200, 1300]"),
        ([-1.73e-7, 5.1e-8], "[-1.73, 0.51]e-07"),
        ([0.5, 0.5], "[0.5, 0.5]"),
        ([0.0, 0.0], "[0, 0]"),
        ([None, 1.0], ""),
        ([math.nan, math.inf], ""),
        (None, ""),
    ],
)
def test_intervals(interval, text):
    assert interval_text(interval) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-0.00112345, 0.00031, "-0.00112 +/- 0.00031"),
        (1234.5, 56.7, "1234 +/- 57"),
        (1234.5, 5678.0, "1234 +/- 5678"),
        (-1.12345e-7, 3.1e-8, "(-1.12 +/- 0.31)e-07"),
        (1e-9, 3.1e-8, "(0.1 +/- 3.1)e-08"),
        (-1e-9, 0.012, "0.000 +/- 0.012"),
        (0.25, None, "0.25"),
        (0.123456, 0.0, "0.1235"),
        (0.123456, math.inf, "0.1235"),
        (None, 0.1, "not resolved"),
        (math.nan, 0.1, "not resolved"),
        (0.0, 0.0, "0"),
    ],
)
def test_digits_follow_the_error(value, error, text):
    assert with_error(value, error) == text
