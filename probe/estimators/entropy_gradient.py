"""X, the gradient of the policy's entropy, from a batch of its own samples (the reverse-mode way).

    grad H_seq = E[ sum_t grad h_t + sum_t grad l_t (sum_{s>t} h_s - b_t) ]
    grad H_tok = ( grad H_seq - H_tok grad E[T] ) / E[T]

`H_seq = E[N]` is the entropy of a response (nats per response), `H_tok = E[N] / E[T]` that of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.estimators.weighting import Baseline, ScoreWeights, Weighting, score_weights
from probe.scoring.collector import Progress
from probe.scoring.differentiable import whole_gradients
from probe.scoring.gradients import token_gradients
from probe.scoring.policy import Policy
from probe.scoring.scores import TokenScores


@dataclass(frozen=True)
class EntropyGradient:
    """X, from which the gradient of both estimands follows.

    Attributes:
        total: `grad H_seq = mean_i sum_t grad h[i, t] + entropy_weight[i, t] grad l[i, t]`, by parameter name.
        length: `mean_i sum_t length_weight[i, t] grad l[i, t]`, the gradient of `E[T]`.
        pathwise: `mean_i sum_t grad h[i, t]`, the part of `total` inside the states visited; None where nobody asked.
        H_seq: mean of `N` on this batch, nats per response.
        H_tok: `mean(N) / mean(T)`, nats per token.
        mean_length: mean of `T`, tokens.
        weights: the score weights used.
        weighting: `causal` or `matched`.
    """

    total: Mapping[str, Tensor]
    length: Mapping[str, Tensor]
    pathwise: Mapping[str, Tensor] | None
    H_seq: float
    H_tok: float
    mean_length: float
    weights: ScoreWeights
    weighting: Weighting

    def sequence(self, name: str) -> Tensor:
        """`grad H_seq` with respect to the parameter `name`."""
        return self.total[name]

    def token(self, name: str) -> Tensor:
        """`grad H_tok` with respect to the parameter `name`."""
        return (self.total[name] - self.H_tok * self.length[name]) / self.mean_length

    @property
    def responses(self) -> int:
        """How many responses it was taken from."""
        return len(self.weights.entropy)


def entropy_gradient(
    policy: Policy,
    batch: RolloutBatch,
    scores: TokenScores,
    weighting: Weighting = "causal",
    baseline: Baseline = "loo_position",
    sequence_weights: Tensor | None = None,
    progress: Progress | None = None,
    parts: bool = True,
) -> EntropyGradient:
    """The gradient of the entropy from samples of the policy itself.

    Unbiased for `sequence` with `causal` weights; `token` divides by estimates of `E[T]` and `H_tok` from the same
    batch, a bias of order `1 / B`; `matched` see `score_weights`.

    Args:
        policy: the policy the batch was drawn from.
        batch: E, `B` responses.
        scores: the scores of E at the same weights: they make the score weights, which are constants.
        weighting: see `score_weights`.
        baseline: see `score_weights`.
        sequence_weights: `(B,)` probabilities of the sequences where `batch` enumerates them; by default `1 / B`.
        progress: called after each microbatch.
        parts: also give `pathwise`, for one more backward through the network.

    Raises:
        RolloutError: all responses are empty.
        NumericalError: a score or gradient is not finite.
    """
    B = len(batch)
    w = (
        torch.full((B,), 1.0 / B, dtype=torch.float64)
        if sequence_weights is None
        else sequence_weights.double()
    )
    weights = score_weights(scores, weighting, baseline, w)
    objectives = 3 if parts else 2

    def token_weights(i: Tensor, t: Tensor, l: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        zero, one = torch.zeros_like(h), torch.ones_like(h)
        of_logprob = torch.stack([weights.entropy[i, t], weights.length[i, t], zero][:objectives])
        of_entropy = torch.stack([one, zero, one][:objectives])
        return w[i] * of_logprob, w[i] * of_entropy

    with whole_gradients(policy.model):
        (total, length, *pathwise), _ = token_gradients(policy, batch, token_weights, objectives, progress)
    H_seq, mean_length = float((w * scores.sequence_entropy).sum()), float((w * scores.lengths).sum())
    return EntropyGradient(
        total=total,
        length=length,
        pathwise=pathwise[0] if parts else None,
        H_seq=H_seq,
        H_tok=H_seq / mean_length,
        mean_length=mean_length,
        weights=weights,
        weighting=weighting,
    )
