"""deltaH1 = <grad H, step> = eta * bars_dot: the first-order entropy change of one update."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from probe.estimand import PerEstimand
from probe.estimators.entropy_gradient import EntropyGradient
from probe.estimators.estimate import Estimates, estimate
from probe.estimators.weighting import Baseline, Weighting, score_weights
from probe.parameters import inner_product
from probe.scoring.scores import TokenScores, TokenTangents


@dataclass(frozen=True)
class Prediction:
    """The prediction, per response (nats per response) and per token (nats per token).

    Attributes:
        pathwise: the part of deltaH1 inside the states visited.
        score: the part from which states are visited.
        learning_rate: `eta`.
        estimates: errors by estimator (`causal`, `matched`, `causal+cv`); empty where there are no derivatives
            per token.
        reported: the key of the estimate whose value the numbers above are.
        mode: how deltaH1 was differentiated: `jvp`, `reverse` or `finite_difference`.
        reason: why that way.
        agreement: relative difference of deltaH1 by two ways (backward, and derivatives per token); None with one way.
        step_difference: relative difference of the derivatives per token and differences of forwards along the step, on
            a few responses, see `StepCheck`; None where forwards are the only way.
        step_difference_error: what these differences may themselves be wrong by.
        difference_scale: of central differences, in units of the step; None without.
        difference_error: estimated relative error of the token derivatives, see `choose_scale`; None without.
        control_variates: `on: ...` or `off: ...` with the reason.
        deltaH2: see `curvature`; None where it was not computed.
        curvature_mode: `jvp` or `finite_difference`.
        sd_U: standard deviation over update batches; None where not computed.
    """

    pathwise: PerEstimand[float]
    score: PerEstimand[float]
    learning_rate: float
    estimates: Mapping[str, Estimates] = field(default_factory=dict)
    reported: str = "causal"
    mode: str = "reverse"
    reason: str = ""
    agreement: float | None = None
    step_difference: float | None = None
    step_difference_error: float | None = None
    difference_scale: float | None = None
    difference_error: float | None = None
    control_variates: str = "off: no derivatives per token"
    deltaH2: Estimates | None = None
    curvature_mode: str | None = None
    sd_U: PerEstimand[float] | None = None

    @property
    def deltaH1(self) -> PerEstimand[float]:  # noqa: N802
        """`<X, step>`: `pathwise + score`."""
        return self.pathwise.with_other(operator.add, self.score)

    @property
    def bars_dot(self) -> PerEstimand[float]:
        """`<X, Y> = deltaH1 / eta`, per unit of learning rate."""
        return self.deltaH1.map(lambda value: value / self.learning_rate)

    @property
    def total(self) -> Estimates:
        """DeltaH1 as it is reported, with the errors of the reported estimate.

        Raises:
            KeyError: there are no `estimates`.
        """
        return self.deltaH1.with_other(
            lambda value, estimate: replace(estimate, value=value), self.estimates[self.reported]
        )

    def with_control_variates(self, Z: Estimates, note: str) -> Prediction:
        """Subtract the control variates of the `causal` estimates from deltaH1 (from its score part).

        Args:
            Z: see `ControlVariates.shrunk`.
            note: what `control_variates` says.
        """
        less_noisy = self.estimates["causal"].with_other(operator.sub, Z)
        return replace(
            self,
            score=self.score.with_other(lambda value, control: value - control.value, Z),
            estimates={**self.estimates, "causal+cv": less_noisy},
            reported="causal+cv",
            control_variates=note,
        )

    def at(self, learning_rate: float) -> Prediction:
        """For another learning rate: the first order times the factor `c`, the second order times `c^2`."""
        c = learning_rate / self.learning_rate
        second, spread = self.deltaH2, self.sd_U
        return replace(
            self,
            pathwise=self.pathwise.map(lambda value: c * value),
            score=self.score.map(lambda value: c * value),
            learning_rate=learning_rate,
            estimates={name: found.map(lambda one: one.scaled(c)) for name, found in self.estimates.items()},
            difference_scale=None if self.difference_scale is None else self.difference_scale / c,
            deltaH2=None if second is None else second.map(lambda one: one.scaled(c**2)),
            sd_U=None if spread is None else spread.map(lambda value: c * value),
        )


def change_along(x: EntropyGradient, step: Mapping[str, Tensor]) -> PerEstimand[float]:
    """DeltaH1 by backward: `<X, step>` in nats, accumulated in float64.

    Args:
        x: the entropy's gradient.
        step: `theta_new - theta_old` by parameter name.

    Raises:
        ValueError: the names differ.
    """
    if set(step) != set(x.total):
        raise ValueError(
            f"expected a step for the parameters of X, found a difference in {set(step) ^ set(x.total)}"
        )
    total, length = (inner_product(of.__getitem__, step) for of in (x.total, x.length))
    return PerEstimand(total, (total - x.H_tok * length) / x.mean_length)


def first_order(x: EntropyGradient, step: Mapping[str, Tensor], learning_rate: float) -> Prediction:
    """DeltaH1 by backward and its two parts, where there are no derivatives per token; see `change_along`.

    Args:
        x: the entropy's gradient, with its pathwise part.
        step: `theta_new - theta_old` by parameter name.
        learning_rate: `eta > 0`.

    Raises:
        ValueError: the names differ, the pathwise part is not there, or the learning rate is not positive.
    """
    if x.pathwise is None:
        raise ValueError("expected X with its pathwise part, found none; ask `entropy_gradient` for `parts`")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate: expected a number above 0, found {learning_rate}")
    total = change_along(x, step)
    sequence = inner_product(x.pathwise.__getitem__, step)
    pathwise = PerEstimand(sequence, sequence / x.mean_length)
    return Prediction(
        pathwise=pathwise, score=total.with_other(operator.sub, pathwise), learning_rate=learning_rate
    )


@dataclass(frozen=True)
class TokenPrediction:
    """DeltaH1 from derivatives per token, with errors over E.

    Attributes:
        pathwise: the part inside the states visited.
        score: the part from which states are visited.
    """

    pathwise: Estimates
    score: Estimates

    @property
    def total(self) -> Estimates:
        """DeltaH1: `pathwise + score`."""
        return self.pathwise.with_other(operator.add, self.score)


def token_first_order(
    scores: TokenScores,
    tangents: TokenTangents,
    group: Tensor,
    weighting: Weighting = "causal",
    baseline: Baseline = "loo_position",
) -> TokenPrediction:
    """DeltaH1 as a sum over tokens: `mean_i sum_t dh[i,t] + weight[i,t] dl[i,t]`, the same number as `first_order`.

    Args:
        scores: scores of E at `theta`: they make the score weights.
        tangents: derivatives of the scores along the step.
        group: `(B,)` prompts, the independent units of the errors.
        weighting: see `score_weights`.
        baseline: see `score_weights`; the error of the ridge baseline takes its predictions as given.
    """
    ridge = score_weights(scores, weighting, baseline) if baseline == "ridge" else None

    def parts(q: Tensor) -> Tensor:
        w = q / q.sum()
        weights = score_weights(scores, weighting, baseline, w) if ridge is None else ridge
        pathwise = (w * tangents.entropy.sum(1)).sum()
        score, length = ((w * (x * tangents.logprob).sum(1)).sum() for x in (weights.entropy, weights.length))
        N, T = (w * scores.sequence_entropy).sum(), (w * scores.lengths).sum()
        return torch.stack([pathwise, pathwise / T, score, (score - N / T * length) / T])

    found = estimate(parts, group)
    return TokenPrediction(pathwise=PerEstimand.of(found[:2]), score=PerEstimand.of(found[2:]))


def from_tokens(parts: TokenPrediction, learning_rate: float) -> Prediction:
    """The numbers of a prediction made per token."""
    return Prediction(
        pathwise=parts.pathwise.map(lambda one: one.value),
        score=parts.score.map(lambda one: one.value),
        learning_rate=learning_rate,
    )
