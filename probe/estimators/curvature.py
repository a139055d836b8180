"""deltaH2 = 1/2 step' (hess H) step, the second-order term, and eta_10, where it is a tenth of the first.

Two ways to the same number: second derivatives per token by nested forward mode, put through the estimator; or the even
part of the measured change, `(deltaH(+c step) + deltaH(-c step)) / (2 c^2)`.

Where the first derivatives are known, what one side has beyond them, `(deltaH(+c step) - c dH) / c^2`, is the even part
and odd terms of third order. These are small beside it and differ little between responses, so that both sides of a few
responses are enough to take them off (`corrected_curvature`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from probe.estimand import PerEstimand
from probe.estimators.entropy_change import (
    Reweighting,
    entropy_change,
    first_derivative,
    second_derivative,
)
from probe.estimators.estimate import Estimate, Estimates, estimate
from probe.scoring.differences import DifferencePair
from probe.scoring.scores import TokenScores, TokenTangents


def nested_curvature(
    scores: TokenScores,
    first: TokenTangents,
    second: TokenTangents,
    group: Tensor,
    estimator: Reweighting = "per_decision",
) -> Estimates:
    """`deltaH2` in nats from derivatives per token; exact on the batch.

    Args:
        scores: scores of E at `theta`.
        first: first derivatives along the step.
        second: second derivatives along the step.
        group: `(B,)` prompts.
        estimator: whose second derivative.
    """
    return PerEstimand.of(
        estimate(lambda q: second_derivative(q, scores, first, second, estimator) / 2, group)
    )


def symmetric_curvature(
    scores: TokenScores, pair: DifferencePair, group: Tensor, estimator: Reweighting = "per_decision"
) -> Estimates:
    """`deltaH2` in nats from scores on both sides; its error is of fourth order in the step.

    Args:
        scores: scores of E at `theta`.
        pair: scores at `theta +- scale * step`.
        group: `(B,)` prompts.
        estimator: used on both sides.
    """

    def even(q: Tensor) -> Tensor:
        sides = [entropy_change(q, scores, side, estimator) for side in (pair.plus, pair.minus)]
        return (sides[0] + sides[1]) / (2 * pair.scale**2)

    return PerEstimand.of(estimate(even, group))


def corrected_curvature(
    scores: TokenScores,
    first: TokenTangents,
    end: TokenScores,
    pair: DifferencePair,
    rows: Tensor,
    group: Tensor,
    scale: float = 1.0,
    estimator: Reweighting = "per_decision",
) -> tuple[Estimates, Estimates]:
    """`deltaH2` in nats from one side of all responses, and both sides of some; its error is of fourth order too.

    `mean of all (one side beyond first order) + mean of some (even part - one side beyond first order)`: a difference
    estimator. Both terms are one function of the weights of the prompts, so that the standard error knows that they
    share some.

    Args:
        scores: scores of E at `theta`.
        first: first derivatives along the step.
        end: scores of E at `theta + scale * step`.
        pair: scores on both sides, at a scale of its own; looked at in `rows` only.
        rows: of several prompts, all responses of each.
        group: `(B,)` prompts.
        scale: of `end`.
        estimator: used everywhere.

    Returns:
        `(deltaH2, correction)`: the second term is a part of the first.
    """
    few, upper, lower = (side.rows(rows) for side in (scores, pair.plus, pair.minus))
    few_first, few_end = first.rows(rows), end.rows(rows)

    def beyond(q: Tensor, old: TokenScores, new: TokenScores, tangents: TokenTangents) -> Tensor:
        change = entropy_change(q, old, new, estimator)
        return (change - scale * first_derivative(q, old, tangents, estimator)) / scale**2

    def both(q: Tensor) -> Tensor:
        own = q[rows]
        sides = [entropy_change(own, few, side, estimator) for side in (upper, lower)]
        correction = (sides[0] + sides[1]) / (2 * pair.scale**2) - beyond(own, few, few_end, few_first)
        return torch.cat([beyond(q, scores, end, first) + correction, correction])

    found = estimate(both, group)
    return PerEstimand.of(found[:2]), PerEstimand.of(found[2:])


def eta_10(learning_rate: float, deltaH1: float, deltaH2: Estimate) -> float | None:
    """The learning rate at which `|deltaH2| = 0.1 |deltaH1|`: `eta |deltaH1| / (10 |deltaH2|)`.

    `deltaH1` grows like `eta` and `deltaH2` like `eta^2`.

    Args:
        learning_rate: `eta` of both.
        deltaH1: nats.
        deltaH2: nats.

    Returns:
        None where the 95 % interval of `deltaH2` contains 0.
    """
    low, high = deltaH2.ci95
    if not (low > 0 or high < 0):
        return None
    return learning_rate * abs(deltaH1) / (10 * abs(deltaH2.value))
