"""Intervals beside what they should hold, and how benchmarks of coverage sum them up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from probe.estimators.estimate import NORMAL_975, Estimate
from probe.verdict.words import WORDS

VERDICT_HEADS = f"{' | '.join(WORDS)} | headline misses | trustworthy and misses"
"""Of what `verdict_cells` gives."""
ROUNDING = 1e-9
"""Standard errors below this share of their value are none: of sums in float64."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval and the truth, nats.

    Attributes:
        value: estimated.
        se: standard error.
        ci95: as reported.
        exact: what is estimated.
    """

    value: float
    se: float
    ci95: tuple[float, float]
    exact: float

    @classmethod
    def of(cls, one: Estimate, exact: float) -> Interval:
        """That of an estimate."""
        return cls(one.value, one.se, one.ci95, exact)

    @property
    def error(self) -> float:
        """What it is wrong by, nats."""
        return self.value - self.exact

    @property
    def holds(self) -> bool:
        """Whether the exact value is in the interval as reported."""
        low, high = self.ci95
        return low <= self.exact <= high

    @property
    def holds_as_normal(self) -> bool:
        """Whether it is within 1.96 standard errors."""
        return abs(self.error) <= NORMAL_975 * self.se


def coverage(intervals: Sequence[Interval]) -> tuple[float, float]:
    """Share that holds the exact value: with 1.96 standard errors, and as reported."""
    count = len(intervals)
    return sum(one.holds_as_normal for one in intervals) / count, sum(one.holds for one in intervals) / count


def coverage_cell(intervals: Sequence[Interval]) -> str:
    """`coverage` in percent, `normal to reported`."""
    normal, own = coverage(intervals)
    return f"{100 * normal:.0f} to {100 * own:.0f}"


def spread(intervals: Sequence[Interval]) -> float:
    """Standard deviation of errors in standard errors; 1 is right.

    Left out are samples of equal responses, whose standard error is 0 up to rounding.
    """
    scored = [one.error / one.se for one in intervals if one.se > ROUNDING * abs(one.value)]
    return float(torch.tensor(scored, dtype=torch.float64).std())


def bias(intervals: Sequence[Interval]) -> float:
    """The mean error in its own standard error, from how errors scatter."""
    errors = torch.tensor([one.error for one in intervals], dtype=torch.float64)
    return float(errors.mean() / errors.std()) * math.sqrt(len(errors))


def verdict_cells(words: Sequence[str], missed: Sequence[bool]) -> str:
    """Shares in percent, under `VERDICT_HEADS`.

    Args:
        words: the verdict of each run.
        missed: whether the interval of its prediction or its measurement, per token, does not hold the exact value.
    """
    counts, runs = Counter(words), len(words)
    both = sum(word == "trustworthy" and miss for word, miss in zip(words, missed, strict=True))
    shares = " | ".join(f"{100 * counts[word] / runs:.0f}" for word in WORDS)
    return f"{shares} | {100 * sum(missed) / runs:.1f} | {100 * both / runs:.1f}"
