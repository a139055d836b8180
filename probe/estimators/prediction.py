"""deltaH1 = <grad H, step> = eta * bars_dot: the first-order entropy change of one update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from probe.estimators.entropy_gradient import EntropyGradient
from probe.estimators.estimate import Both, Estimate, estimate
from probe.estimators.weighting import Baseline, Weighting, score_weights
from probe.parameters import inner_product
from probe.scoring.scores import TokenScores, TokenTangents


@dataclass(frozen=True)
class Prediction:
    """The prediction, `sequence` estimand in nats per response and `token` estimand (`_tok`) in nats per token.

    Attributes:
        deltaH1: `<X, step>`.
        bars_dot: `<X, Y> = deltaH1 / eta`, per unit of learning rate.
        pathwise: the part of deltaH1 inside the states visited.
        score: the part from which states are visited; `pathwise + score = deltaH1`.
        deltaH1_tok: like `deltaH1`.
        bars_dot_tok: like `bars_dot`.
        pathwise_tok: like `pathwise`.
        score_tok: like `score`.
        learning_rate: `eta`.
        estimates: errors by estimator (`causal`, `matched`, `causal+cv`): `(sequence, token)`; empty where there are no
            derivatives per token.
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
        deltaH2: `(sequence, token)`, see `curvature`; None where it was not computed.
        curvature_mode: `jvp` or `finite_difference`.
        sd_U: standard deviation over update batches, nats per response and per token; None where not computed.
    """

    deltaH1: float
    bars_dot: float
    pathwise: float
    score: float
    deltaH1_tok: float
    bars_dot_tok: float
    pathwise_tok: float
    score_tok: float
    learning_rate: float
    estimates: Mapping[str, tuple[Estimate, Estimate]] = field(default_factory=dict)
    reported: str = "causal"
    mode: str = "reverse"
    reason: str = ""
    agreement: float | None = None
    step_difference: float | None = None
    step_difference_error: float | None = None
    difference_scale: float | None = None
    difference_error: float | None = None
    control_variates: str = "off: no derivatives per token"
    deltaH2: tuple[Estimate, Estimate] | None = None
    curvature_mode: str | None = None
    sd_U: tuple[float, float] | None = None

    @property
    def total(self) -> Both:
        """DeltaH1 as it is reported, with the errors of the reported estimate.

        Raises:
            KeyError: there are no `estimates`.
        """
        sequence, token = self.estimates[self.reported]
        return Estimate(self.deltaH1, sequence.influence), Estimate(self.deltaH1_tok, token.influence)

    def with_control_variates(self, Z: Sequence[Estimate], note: str) -> Prediction:
        """Subtract the control variates of the `causal` estimates from deltaH1 (from its score part).

        Args:
            Z: see `ControlVariates.shrunk`.
            note: what `control_variates` says.
        """
        sequence, token = (e - z for e, z in zip(self.estimates["causal"], Z, strict=True))
        deltaH1, deltaH1_tok = self.deltaH1 - Z[0].value, self.deltaH1_tok - Z[1].value
        return replace(
            self,
            deltaH1=deltaH1,
            bars_dot=deltaH1 / self.learning_rate,
            score=self.score - Z[0].value,
            deltaH1_tok=deltaH1_tok,
            bars_dot_tok=deltaH1_tok / self.learning_rate,
            score_tok=self.score_tok - Z[1].value,
            estimates={**self.estimates, "causal+cv": (sequence, token)},
            reported="causal+cv",
            control_variates=note,
        )

    def at(self, learning_rate: float) -> Prediction:
        """For another learning rate: the first order times the factor `c`, the second order times `c^2`."""
        c = learning_rate / self.learning_rate
        numbers = ("deltaH1", "pathwise", "score", "deltaH1_tok", "pathwise_tok", "score_tok")
        second, spread = self.deltaH2, self.sd_U
        return replace(
            self,
            **{name: c * getattr(self, name) for name in numbers},
            learning_rate=learning_rate,
            estimates={name: (a.scaled(c), b.scaled(c)) for name, (a, b) in self.estimates.items()},
            difference_scale=None if self.difference_scale is None else self.difference_scale / c,
            deltaH2=None if second is None else (second[0].scaled(c**2), second[1].scaled(c**2)),
            sd_U=None if spread is None else (c * spread[0], c * spread[1]),
        )


def first_order(x: EntropyGradient, step: Mapping[str, Tensor], learning_rate: float) -> Prediction:
    """Put X and the step together; inner products are accumulated in float64.

    Args:
        x: the entropy's gradient.
        step: `theta_new - theta_old` by parameter name.
        learning_rate: `eta > 0`.

    Raises:
        ValueError: the names differ, or the learning rate is not positive.
    """
    if set(step) != set(x.pathwise):
        raise ValueError(
            f"expected a step for the parameters of X, found a difference in {set(step) ^ set(x.pathwise)}"
        )
    if not learning_rate > 0:
        raise ValueError(f"learning_rate: expected a number above 0, found {learning_rate}")
    pathwise = inner_product(x.pathwise.__getitem__, step)
    score = inner_product(x.score.__getitem__, step)
    length = inner_product(x.length.__getitem__, step)
    score_tok = (score - x.H_tok * length) / x.mean_length
    pathwise_tok = pathwise / x.mean_length
    return Prediction(
        deltaH1=pathwise + score,
        bars_dot=(pathwise + score) / learning_rate,
        pathwise=pathwise,
        score=score,
        deltaH1_tok=pathwise_tok + score_tok,
        bars_dot_tok=(pathwise_tok + score_tok) / learning_rate,
        pathwise_tok=pathwise_tok,
        score_tok=score_tok,
        learning_rate=learning_rate,
    )


@dataclass(frozen=True)
class TokenPrediction:
    """DeltaH1 from derivatives per token, with errors over E.

    Attributes:
        pathwise: `(sequence, token)`, the part inside the states visited.
        score: the part from which states are visited.
    """

    pathwise: tuple[Estimate, Estimate]
    score: tuple[Estimate, Estimate]

    @property
    def total(self) -> tuple[Estimate, Estimate]:
        """DeltaH1: `pathwise + score`."""
        return self.pathwise[0] + self.score[0], self.pathwise[1] + self.score[1]


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
    return TokenPrediction(pathwise=(found[0], found[1]), score=(found[2], found[3]))


def from_tokens(parts: TokenPrediction, learning_rate: float) -> Prediction:
    """The numbers of a prediction made per token."""
    (path, path_tok), (score, score_tok) = parts.pathwise, parts.score
    total, total_tok = parts.total
    return Prediction(
        deltaH1=total.value,
        bars_dot=total.value / learning_rate,
        pathwise=path.value,
        score=score.value,
        deltaH1_tok=total_tok.value,
        bars_dot_tok=total_tok.value / learning_rate,
        pathwise_tok=path_tok.value,
        score_tok=score_tok.value,
        learning_rate=learning_rate,
    )
