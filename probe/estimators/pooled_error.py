"""How large an error is, from several samples: the variance of neighbouring probes, pooled.

The standard error of one sample knows only the responses in it. Where few responses carry the error, the samples that
lack them are wrong by more than their own error says, and nothing in them tells so. A training draws one sample after
the other from nearly the same policy. Once the length of the step and the number of prompts are taken out, their errors
are draws from one distribution of sizes (steps of one length in other directions have other sizes too), and the mean of
their variances counts the rare responses at the rate at which they come. Intervals so made cover on average over
probes, which is what single samples fail at; for one probe they are as wide as its neighbours' errors ask for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

POOLED_SAMPLES = 10
"""Samples whose variances are pooled, the newest among them."""
CONTRADICTION = 2.326
"""Standard errors of the logarithm of a variance (one-sided 1 %) beyond which the newest sample is taken to be of
another kind than those before it."""


@dataclass(frozen=True)
class ErrorSize:
    """The size of an error, as known from one sample or several.

    Attributes:
        variance: of what was estimated, in units that do not change from sample to sample.
        df: degrees of freedom of `variance`, see `Estimate.df`.
    """

    variance: float
    df: float


def pooled_error(own: ErrorSize, earlier: Sequence[ErrorSize]) -> ErrorSize:
    """The size of the newest sample's error, from it and those before it.

    The mean of the variances, with Satterthwaite's degrees of freedom `(sum v)^2 / sum (v^2 / df)`, or the newest
    variance where that is larger: an error is never made smaller than its own sample says, as errors that grow from
    sample to sample would be. Where the newest variance is larger than the mean of the earlier ones by more than
    `CONTRADICTION` errors of their ratio (`log v` has the variance `2 / df`), the policy or the step is of another
    kind now, and its degrees of freedom are its own too.

    Args:
        own: of the newest sample.
        earlier: of those before it; the last `POOLED_SAMPLES - 1` are used.

    >>> pooled_error(ErrorSize(1.0, 10.0), [ErrorSize(3.0, 10.0)])
    ErrorSize(variance=2.0, df=16.0)
    >>> pooled_error(ErrorSize(100.0, 10.0), [ErrorSize(3.0, 10.0)]).variance
    100.0
    """
    recent = list(earlier)[-(POOLED_SAMPLES - 1) :]
    if not recent or not _finite(own):
        return own
    before = _pooled(recent)
    error = CONTRADICTION * math.sqrt(2 / own.df + 2 / before.df)
    if own.variance > before.variance * math.exp(error):
        return own
    together = _pooled([*recent, own])
    return replace(together, variance=max(together.variance, own.variance))


def _pooled(sizes: Sequence[ErrorSize]) -> ErrorSize:
    """The mean variance; all of the degrees of freedom where it is 0."""
    total = sum(one.variance for one in sizes)
    if total == 0.0:
        return ErrorSize(0.0, sum(one.df for one in sizes))
    shares = sum((one.variance / total) ** 2 / one.df for one in sizes)
    return ErrorSize(total / len(sizes), 1 / shares)


def _finite(size: ErrorSize) -> bool:
    """Whether there is a size to speak of: that of a single prompt is infinite."""
    return math.isfinite(size.variance) and math.isfinite(size.df)
