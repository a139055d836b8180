"""Derivatives along a direction by central differences of forwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.errors.exceptions import NumericalError
from probe.errors.remedies import Remedy
from probe.scoring.collector import Progress
from probe.scoring.features import FeatureBasis
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens
from probe.scoring.scores import TokenScores, TokenTangents

LARGEST_EXPONENT = 12
"""`choose_scale` looks for the step of the central difference between `4^-12` and `4^12` times the direction."""
GOOD_ENOUGH = 3e-3
"""Relative error of token derivatives up to which the scale 1 is kept: its upper point is the ground truth's own."""


@dataclass(frozen=True)
class DifferencePair:
    """Scores on both sides of the point of differentiation.

    Attributes:
        plus: scores at `theta + scale * direction`.
        minus: scores at `theta - scale * direction`.
        scale: of the difference step, in units of the direction.
        error: estimated relative error of the token derivatives, see `choose_scale`.
    """

    plus: TokenScores
    minus: TokenScores
    scale: float
    error: float

    @property
    def tangents(self) -> TokenTangents:
        """Central differences: the odd part of the scores, per unit of the direction."""
        expected = None
        if self.plus.expected_features is not None and self.minus.expected_features is not None:
            expected = (self.plus.expected_features - self.minus.expected_features) / (2 * self.scale)
        return TokenTangents(
            logprob=(self.plus.logprob - self.minus.logprob) / (2 * self.scale),
            entropy=(self.plus.entropy - self.minus.entropy) / (2 * self.scale),
            expected_features=expected,
        )


def difference_pair(
    policy: Policy,
    batch: RolloutBatch,
    direction: Mapping[str, Tensor],
    scale: float,
    error: float = math.nan,
    upper: Mapping[str, Tensor] | None = None,
    basis: FeatureBasis | None = None,
    progress: Callable[[str], Progress] | None = None,
    names: tuple[str, str] = ("score E after the step", "score E on the other side"),
) -> DifferencePair:
    """Score a batch at `theta + scale * direction` and `theta - scale * direction`.

    Args:
        policy: the policy, at the point of differentiation.
        batch: `B` responses.
        direction: by parameter name.
        scale: of the step, in units of the direction.
        error: what `choose_scale` found.
        upper: exact values of the upper point, where they are known (the optimizer's own result at scale 1).
        basis: also score the expected token features.
        progress: makes a progress callback from the name of a pass.
        names: of the two passes.

    Raises:
        NumericalError: a score is not finite.
    """
    above = policy.at(upper) if upper is not None else policy.moved(direction, scale)
    of_pass = progress if progress is not None else (lambda what: None)
    plus = score_tokens(above, batch, of_pass(names[0]), basis)  # type: ignore[arg-type]
    below = policy.moved(direction, -scale)
    minus = score_tokens(below, batch, of_pass(names[1]), basis)  # type: ignore[arg-type]
    return DifferencePair(plus=plus, minus=minus, scale=scale, error=error)


class DifferenceQuotients:
    """Difference quotients of all token scores of a batch along a direction, at scales `4^k`; each computed once."""

    def __init__(self, policy: Policy, batch: RolloutBatch, direction: Mapping[str, Tensor]) -> None:
        """Args: `policy` at the point of differentiation, a `batch` of a few sequences, and the `direction`."""
        self._policy, self._batch, self._direction = policy, batch, direction
        self._found: dict[int, Tensor | None] = {}

    def at(self, k: int) -> Tensor | None:
        """`D(4^k)` as one vector: those of the log-probs, then of the entropies; None where scores are not finite."""
        if k not in self._found:
            try:
                found = difference_pair(self._policy, self._batch, self._direction, 4.0**k).tangents
                self._found[k] = found.vector()
            except NumericalError:  # too large a step
                self._found[k] = None
        return self._found[k]

    def error(self, k: int) -> float:
        """`e(4^k)`, see `choose_scale`; infinite where there is nothing to compare."""
        below, here = self.at(k - 1), self.at(k)
        if below is None or here is None or not bool(here.any()):
            return math.inf
        return float((here - below).norm() / here.norm())


def choose_scale(policy: Policy, batch: RolloutBatch, direction: Mapping[str, Tensor]) -> tuple[float, float]:
    """The scale of the central difference at which rounding and curvature are smallest together.

    For scales `c = 4^k` the difference quotients `D(c)` of all token log-probs and entropies are compared:
    `e(c) = |D(c) - D(c/4)| / |D(c)|` (Euclidean norms over tokens). Where curvature dominates, that is 15/16 of the
    error of `D(c)`, which grows like `c^2`; where rounding does, about four times it, since rounding grows like `1/c`.
    From 1 on, the search goes downhill in `e`; it stays at 1 where `e(1)` is at most 0.003, because the point
    `theta + direction` is needed anyway.

    Args:
        policy: the policy, at the point of differentiation.
        batch: a few sequences are enough; the cost is some six scorings of them.
        direction: by parameter name.

    Returns:
        `(scale, e(scale))`; `(1, 0)` where the policy has no choice left in these sequences: all derivatives are 0, and
        a larger step would only leave that region.

    Raises:
        NumericalError: no scale gives a usable derivative.
    """
    if not bool(score_tokens(policy, batch).undecided.any()):
        return 1.0, 0.0
    quotients = DifferenceQuotients(policy, batch, direction)
    quotient, error = quotients.at, quotients.error
    best = 0
    while error(best) > (GOOD_ENOUGH if best == 0 else 0.0) and abs(best) < LARGEST_EXPONENT:
        # where neither neighbour is finite, the step is far too large
        lost = quotient(best) is not None and not bool(quotient(best).any())  # type: ignore[union-attr]
        better = best + 1 if lost else min((best - 1, best + 1), key=error)
        if not error(better) < error(best) and math.isfinite(error(best)):
            break
        best = better
    if not error(best) < 1.0:
        raise NumericalError(
            f"expected a step size at which central differences settle, found a relative error of {error(best):.2g} "
            "at the best of them; the arithmetic is too coarse for this update (use ",
            Remedy.FLOAT32,
            ", or ",
            Remedy.NO_DIFFERENCES,
            ")",
        )
    return 4.0**best, error(best)
