"""Differences of two runs' estimates, with their errors: paired on one E, or of independent samples.

On one E most of the sampling error is common to both runs, and cancels where influences are subtracted (`Estimate`):

    se(b - a)^2 = P / (P - 1) sum_p (s_p(b) - s_p(a))^2
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.estimand import Number, PerEstimand
from probe.estimators.entropy_change import snis_entropy
from probe.estimators.estimate import Estimate, Estimates, estimate
from probe.estimators.student import student_interval


@dataclass(frozen=True)
class Difference:
    """A difference of two numbers with its error.

    Attributes:
        value: nats.
        se: standard error, nats.
        df: degrees of freedom of `se`.
    """

    value: float
    se: float
    df: float

    @property
    def ci95(self) -> tuple[float, float]:
        """`value` minus and plus Student's `t` standard errors."""
        return student_interval(self.value, self.se, self.df)

    @property
    def number(self) -> Number:
        """The difference as a result gives a number."""
        return Number(self.value, self.se, self.ci95, df=self.df)


def paired_difference(a: Estimate, b: Estimate, same_fit: bool = True) -> Difference:
    """`b - a` of two estimates from one E.

    Args:
        a: an estimate.
        b: another one, its influences in the same order of prompts.
        same_fit: whether the folds of the two fits of control variates are the same prompts, so that what the fits add
            to the errors is subtracted too; else it is added as if independent.

    >>> a, b = (Estimate(v, torch.tensor([0.3, -0.3]) + v * torch.tensor([0.01, -0.01])) for v in (1.0, 2.0))
    >>> found = paired_difference(a, b)
    >>> found.value, round(found.se, 6), round(math.hypot(a.se, b.se), 6)
    (1.0, 0.02, 0.891067)
    """
    if same_fit or not (len(a.fit) and len(b.fit)):
        found = b - a
    else:
        found = Estimate(b.value - a.value, b.influence - a.influence, torch.cat([a.fit, b.fit]))
    return Difference(found.value, found.se, found.df)


def independent_difference(a: tuple[float, float, float], b: tuple[float, float, float]) -> Difference:
    """`b - a` of two independent numbers, each `(value, se, df)`; degrees of freedom by Welch and Satterthwaite.

    >>> found = independent_difference((1.0, 0.3, 10.0), (2.0, 0.4, 20.0))
    >>> found.value, round(found.se, 6), round(found.df, 2)
    (1.0, 0.5, 29.9)
    """
    (a_value, a_se, a_df), (b_value, b_se, b_df) = a, b
    se = math.hypot(a_se, b_se)
    if se == 0.0 or not math.isfinite(se):
        return Difference(b_value - a_value, se, min(a_df, b_df))
    inverse = (a_se / se) ** 4 / a_df + (b_se / se) ** 4 / b_df
    return Difference(b_value - a_value, se, 1 / inverse)


def level_elsewhere(log_w: Tensor, N: Tensor, T: Tensor, group: Tensor) -> Estimates:
    """The entropy of another policy than the one that E was drawn from, nats, by one weight per response.

    Influences are linear in the estimator: levels of several policies on one E, subtracted, have the error of the
    difference. A change of entropy is such a difference, and so is a difference of changes.

    Args:
        log_w: `(B,)` log-probs of the responses under the other policy minus those under the one that drew them.
        N: `(B,)` the other policy's entropy summed over each response, nats.
        T: `(B,)` tokens.
        group: `(B,)` prompts.
    """
    return PerEstimand.of(estimate(lambda q: snis_entropy(q, log_w, N, T), group))
