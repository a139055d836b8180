"""Score weights of the entropy's gradient: which multiple of `grad l[i, t]` belongs to token `(i, t)`.

The entropy of a response depends on its tokens in two ways: through the distributions met on the way (the pathwise
part, weight 1 on every `grad h`), and through *which* states are met (the score part, weights made here).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from probe.scoring.scores import TokenScores

Weighting = Literal["causal", "matched"]
Baseline = Literal["loo_position", "ridge", "none"]

RIDGE_FOLDS = 5
"""Cross-fitting folds of the ridge baseline."""
RIDGE_PENALTY = 1e-3
"""Ridge penalty per token, on standardised features."""
NO_WEIGHT = 1e-13
"""Weights, which sum to 1, below this are rounding: there is no other sequence."""


@dataclass(frozen=True)
class ScoreWeights:
    """Weights of `grad l[i, t]`, `(B, T)` float64, 0 outside the mask.

    Attributes:
        entropy: weights whose mean-gradient is the score part of `grad E[N]` (nats).
        length: weights whose mean-gradient is `grad E[T]` (tokens).
    """

    entropy: Tensor
    length: Tensor


def score_weights(
    scores: TokenScores,
    weighting: Weighting = "causal",
    baseline: Baseline = "loo_position",
    sequence_weights: Tensor | None = None,
) -> ScoreWeights:
    """Score weights of both estimands; `H_tok`'s are `(entropy - H_tok * length) / E[T]`.

    - `causal`: `sum_{s>t} h_s - b_t` and `sum_{s>t} 1 - b'_t`. The baselines `b` depend on the prefix and on other
      sequences only, so that `E[grad l_t b_t] = 0`: the gradient is unbiased.
    - `matched`: `N_i - mean(N)` and `T_i - mean(T)` for every token: the exact derivative of the SNIS estimator on
      the same sequences. (A sequence takes part in its own mean, which shrinks the score part by `1 - 1/B`.)

    Args:
        scores: scores of E, `B` sequences.
        weighting: `causal` or `matched`.
        baseline: of the causal weights: leave-one-out mean over the sequences that reach position `t`, cross-fitted
            ridge regression on features of the prefix, or none.
        sequence_weights: `(B,)` weights that sum to 1 in every mean over sequences; by default `1 / B`.

    Raises:
        ValueError: an unknown weighting or baseline.

    Example:
        >>> h = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
        >>> scores = TokenScores(torch.zeros_like(h), h, torch.ones(1, 3, dtype=torch.bool))
        >>> score_weights(scores, baseline="none").entropy
        tensor([[6., 4., 0.]], dtype=torch.float64)
    """
    B = len(scores.mask)
    w = (
        torch.full((B,), 1.0 / B, dtype=torch.float64)
        if sequence_weights is None
        else sequence_weights.double()
    )
    mask = scores.mask.double()
    if weighting == "matched":
        N, T = scores.sequence_entropy, scores.lengths
        return ScoreWeights(
            entropy=(N - (w * N).sum()).unsqueeze(1) * mask, length=(T - (w * T).sum()).unsqueeze(1) * mask
        )
    if weighting != "causal":
        raise ValueError(f"weighting: expected 'causal' or 'matched', found {weighting!r}")
    to_go = [still_to_come(scores.entropy), still_to_come(mask)]
    if baseline == "none":
        expected = [torch.zeros_like(g) for g in to_go]
    elif baseline == "loo_position":
        expected = [_leave_one_out_mean(g, mask, w) for g in to_go]
    elif baseline == "ridge":
        expected = _ridge_predictions(to_go, scores)
    else:
        raise ValueError(f"baseline: expected 'loo_position', 'ridge' or 'none', found {baseline!r}")
    entropy, length = ((g - b) * mask for g, b in zip(to_go, expected, strict=True))
    return ScoreWeights(entropy=entropy, length=length)


def still_to_come(values: Tensor) -> Tensor:
    """`sum_{s>t} values[:, s]` for every `t`, `(B, T)`.

    Example:
        >>> still_to_come(torch.tensor([[1.0, 2.0, 4.0]]))
        tensor([[6., 4., 0.]])
    """
    return values.flip(1).cumsum(1).flip(1) - values


def _leave_one_out_mean(to_go: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    """Weighted mean of `to_go[:, t]` over the *other* sequences that reach `t`; 0 where there is none."""
    weight = mask * w.unsqueeze(1)
    total, count = (weight * to_go).sum(0), weight.sum(0)
    others = count - weight
    # A lone sequence has no one to learn from: its baseline is 0, which is as unbiased as any other constant.
    alone = others < NO_WEIGHT
    return torch.where(alone, 0.0, (total - weight * to_go) / others.masked_fill(alone, 1.0))


def _ridge_predictions(to_go: list[Tensor], scores: TokenScores) -> list[Tensor]:
    """Predictions of `to_go` from the prefix, each sequence's from a fit on the other folds' sequences."""
    features = prefix_features(scores)
    mask, B = scores.mask, len(scores.mask)
    fold = torch.arange(B) % min(RIDGE_FOLDS, B)
    out = [torch.zeros_like(g) for g in to_go]
    for k in range(int(fold.max()) + 1):
        train, test = mask & (fold != k).unsqueeze(1), mask & (fold == k).unsqueeze(1)
        if not bool(train.any()):
            continue  # a single sequence: no one to learn from, baseline 0
        mean, std = features[train].mean(0), features[train].std(0, unbiased=False).clamp_min(1e-12)
        x = (features[train] - mean) / std
        gram = x.T @ x + RIDGE_PENALTY * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        for target, prediction in zip(to_go, out, strict=True):
            y = target[train]
            coefficients = torch.linalg.solve(gram, x.T @ (y - y.mean()))
            prediction[test] = y.mean() + (features[test] - mean) / std @ coefficients
    return out


def prefix_features(scores: TokenScores) -> Tensor:
    """Features `(B, T, F)` of the state before token `t`: functions of the prompt and of `y_<t` only."""
    h, l = scores.entropy, scores.logprob
    t = torch.arange(h.shape[1], dtype=torch.float64).expand_as(h)
    entropy_so_far, surprise_so_far = h.cumsum(1), l.cumsum(1) - l
    return torch.stack([t, t**2, h, t * h, entropy_so_far, surprise_so_far, entropy_so_far / (t + 1)], dim=-1)
