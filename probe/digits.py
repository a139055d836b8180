"""Numbers as text: as many digits as their errors make meaningful."""

from __future__ import annotations

import math
from collections.abc import Sequence

NOT_RESOLVED = "not resolved"
"""What stands in the place of a value that is null in the result."""


def with_error(value: float | None, error: float | None) -> str:
    """`value +/- error` with as many digits as the error (two of its own) makes meaningful.

    Without an error, four significant digits; small numbers get a common power of ten.

    >>> with_error(-0.00112345, 0.00031), with_error(-1.12345e-7, 3.1e-8), with_error(0.25, None)
    ('-0.00112 +/- 0.00031', '(-1.12 +/- 0.31)e-07', '0.25')
    """
    if value is None or not math.isfinite(value):
        return NOT_RESOLVED
    if error is None or not math.isfinite(error) or error <= 0:
        return number_text(value)
    scale, decimals, power = _digits(max(abs(value), error), error)
    shown = f"{_fixed(value * scale, decimals)} +/- {_fixed(error * scale, decimals)}"
    return f"({shown}){power}" if power else shown


def interval_text(interval: Sequence[float | None] | None) -> str:
    """`[low, high]` with two digits of a standard error (its width over four), or nothing for none.

    >>> interval_text([-0.00173, -0.00051]), interval_text([-1.73e-7, 5.1e-8]), interval_text(None)
    ('[-0.00173, -0.00051]', '[-1.73, 0.51]e-07', '')
    """
    ends = [end for end in interval or () if end is not None and math.isfinite(end)]
    if len(ends) != 2:
        return ""
    error = abs(ends[1] - ends[0]) / 4
    if error == 0:
        return f"[{number_text(ends[0])}, {number_text(ends[1])}]"
    scale, decimals, power = _digits(max(abs(ends[0]), abs(ends[1])), error)
    return f"[{_fixed(ends[0] * scale, decimals)}, {_fixed(ends[1] * scale, decimals)}]{power}"


def _digits(largest: float, error: float) -> tuple[float, int, str]:
    """How to show numbers up to `largest` known to `error`: a scale, decimals, and the power of ten taken out."""
    size = math.floor(math.log10(largest))
    decimals = 1 - math.floor(math.log10(error))
    if size >= -4 and decimals <= 8:
        return 1.0, decimals, ""
    return 10.0**-size, min(decimals + size, 8), f"e{size:+03d}"


def plain_words(name: str | None) -> str:
    """A name from the result as words."""
    return "none" if name is None else name.replace("_", " ")


def _fixed(value: float, decimals: int) -> str:
    """`value` with so many decimals; never `-0.00`."""
    decimals = max(decimals, 0)
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def number_text(value: float | None) -> str:
    """A number with four significant digits."""
    return NOT_RESOLVED if value is None or not math.isfinite(value) else f"{value:.4g}"
