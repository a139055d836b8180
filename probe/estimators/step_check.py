"""Derivatives along a step, compared with differences of forwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.estimand import PerEstimand
from probe.estimators.derivative_check import HALF_TOLERANCE, TOLERANCE
from probe.estimators.estimate import Estimates
from probe.scoring.differences import DifferenceQuotients
from probe.scoring.policy import Policy
from probe.scoring.scores import TokenScores, TokenTangents

STEP_RESPONSES = 8
"""Responses that derivatives along the step are compared on with differences of forwards."""
STEP_SCALES = range(-5, 5)
"""Their difference steps, as powers of 4 times the optimizer's step."""
ROUNDING, HALF_ROUNDING = 2e-3, 0.05
"""Relative difference below which the comparison looks no further, and calls nothing a contradiction; the second where
forwards run in half precision."""
OWN_ERRORS = 3.0
"""Differences contradict a derivative when it lies more than so many of their own errors away."""


@dataclass(frozen=True)
class StepCheck:
    """Derivatives per token along a step beside differences of forwards along it.

    Attributes:
        difference: `|T - D(c)| / |D(c)|`, Euclidean over the log-probs and entropies of some responses, at the scale
            `c` of the step where it is smallest. 1 where no difference has finite scores.
        error: the relative error that `D(c)` has by its own measure, `|D(c) - D(c/4)| / |D(c)|`, at most 1; 0 where
            `difference` leaves no question.
        scale: `c` as a power of 4.
        rounding: a difference below this is none.
    """

    difference: float
    error: float
    rounding: float
    scale: int = 0

    @property
    def contradicted(self) -> bool:
        """Whether the differences know better: they lie further off than what they themselves may be wrong by."""
        return self.difference > self.rounding and self.difference > OWN_ERRORS * self.error


def step_check(
    policy: Policy,
    batch: RolloutBatch,
    scores: TokenScores,
    step: Mapping[str, Tensor],
    tangents: TokenTangents,
    start: int = 0,
) -> StepCheck:
    """Compare derivatives along a step with what forwards do along it.

    The size of the difference step is searched for in powers of 4 until the two agree but for rounding, or are within
    5 % (25 % in half precision) and come no nearer: rounding wants a large one, curvature and routers of experts (which
    choose others, a jump that is no part of the derivative) a small one. Mostly that is two to eight scorings of the
    few responses of the largest entropy, where there is something to differentiate.

    Args:
        policy: the policy, at the point of differentiation.
        batch: the batch that was differentiated.
        scores: its scores.
        step: the direction.
        tangents: of `batch`, by another way than differences.
        start: the `scale` of an earlier check of such a step.
    """
    rows = scores.sequence_entropy.argsort(descending=True, stable=True)[:STEP_RESPONSES]
    rows = rows[batch.lengths[rows] > 0]
    expected, quotients = tangents.vector(rows), DifferenceQuotients(policy, batch.subset(rows), step)
    half = policy.half_precision
    tolerance, rounding = (HALF_TOLERANCE, HALF_ROUNDING) if half else (TOLERANCE, ROUNDING)
    difference, best = math.nan, start
    for k in sorted(STEP_SCALES, key=lambda k: (abs(k - start), k)):
        found = quotients.at(k)
        if found is None:
            continue
        size = float(found.norm()) or float(expected.norm())
        off = float((expected - found).norm()) / size if size else 0.0
        if difference <= min(off, tolerance):
            break
        if not difference <= off:
            difference, best = off, k
        if difference <= rounding:
            break
    if math.isnan(difference):
        return StepCheck(1.0, 1.0, rounding, start)
    error = min(quotients.error(best), 1.0) if difference > rounding else 0.0
    return StepCheck(min(difference, 1.0), error, rounding, best)


def agreement_check(
    backward: PerEstimand[float], tokens: Estimates, size: PerEstimand[float], known: float
) -> StepCheck:
    """Compare deltaH1 by backward with the one of differences per token: the same question as `step_check`'s.

    Args:
        backward: deltaH1.
        tokens: the same from differences of forwards, with errors.
        size: of the parts that each is the sum of, which may nearly cancel: differences know those to `known`.
        known: relative error of the differences.

    Returns:
        The estimand that is further off, relative to deltaH1 or to its standard error, whichever is larger.
    """
    found = []
    for value, estimate, part in zip(backward, tokens, size, strict=True):
        scale = max(abs(estimate.value), estimate.se if math.isfinite(estimate.se) else 0.0) or 1.0
        found.append((min(abs(value - estimate.value) / scale, 1.0), min(known * part / scale, 1.0)))
    difference, error = max(found, key=lambda pair: pair[0] - OWN_ERRORS * pair[1])
    return StepCheck(difference, error, ROUNDING)


def stopped_gradients(checked: StepCheck) -> str:
    """Why forwards are believed and not the derivatives that they contradict."""
    return (
        f"derivatives along the step differ by {100 * checked.difference:.2g} % from what forwards do, and differences "
        f"of forwards are known to {100 * checked.error:.2g} %: a layer takes a part of what it computes as a "
        "constant (as DoRA does with its norm)"
    )
