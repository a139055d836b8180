"""The entropy of a nearby policy from samples of this one: two importance-sampling estimators, as functions of weights.

With `r[i,t] = exp(l_new[i,t] - l_old[i,t])`, sequences weighted by `q_i` (all 1 for a batch as drawn):

- `snis`: `w_i = q_i prod_t r[i,t]`, `E[N] = sum_i w_i N_new_i / sum_i w_i`, `E[T] = sum_i w_i T_i / sum_i w_i`.
- `per_decision`: `h_t` needs the prefix only: `rho[i,t] = q_i prod_(s<t) r[i,s]`, self-normalised at each position over
  all `B` sequences (a finished one keeps its final weight and adds nothing): `E[N] = sum_t sum_i rho h / sum_i rho`,
  and `E[T]` likewise with 1 for `h`. Precup, Sutton and Singh, Eligibility traces for off-policy policy evaluation
  (2000).

`H_seq = E[N]`, `H_tok = E[N] / E[T]`. Both are consistent, with a bias of order `1 / B`. They are differentiable, so
that their exact derivatives along a step, first and second, and their influence functions come from one definition.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from probe.scoring.scores import TokenScores, TokenTangents

Reweighting = Literal["snis", "per_decision"]


def entropy(q: Tensor, h: Tensor, mask: Tensor) -> Tensor:
    """`[H_seq, H_tok]` of the policy that sampled, nats.

    Args:
        q: `(B,)` weights of the sequences.
        h: `(B, T)` entropies, 0 outside the mask.
        mask: `(B, T)` bool.
    """
    N, T = (q * h.sum(1)).sum() / q.sum(), (q * mask.sum(1)).sum() / q.sum()
    return torch.stack([N, N / T])


def reweighted_entropy(
    q: Tensor,
    log_ratio: Tensor,
    h_new: Tensor,
    mask: Tensor,
    estimator: Reweighting,
    clip: float | None = None,
) -> Tensor:
    """`[H_seq, H_tok]` of the new policy, nats, from samples of the old one.

    Args:
        q: `(B,)` weights of the sequences.
        log_ratio: `l_new - l_old`, `(B, T)`, 0 outside the mask.
        h_new: `(B, T)` entropies under the new policy, 0 outside the mask.
        mask: `(B, T)` bool.
        estimator: `snis` or `per_decision`.
        clip: of `snis`, clamp the sequences' log-weights to `[-clip, clip]` (biased).

    Raises:
        ValueError: an unknown estimator, or clipping with `per_decision`.

    Example:
        >>> q, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
        >>> h, mask = torch.tensor([[0.5], [0.7]]).double(), torch.ones(2, 1, dtype=torch.bool)
        >>> [round(x, 6) for x in reweighted_entropy(q, zero, h, mask, "snis").tolist()]  # no change: the mean
        [0.6, 0.6]
    """
    tokens = mask.to(h_new.dtype)
    if estimator == "snis":
        log_w = log_ratio.sum(1)
        if clip is not None:
            log_w = log_w.clamp(-clip, clip)
        return snis_entropy(q, log_w, h_new.sum(1), tokens.sum(1))
    if estimator != "per_decision" or clip is not None:
        raise ValueError(
            f"estimator: expected 'snis' or 'per_decision' (clipping with 'snis' only), found {estimator!r}"
        )
    before = log_ratio.cumsum(1) - log_ratio
    rho = q.unsqueeze(1) * _shifted(before, q.unsqueeze(1)).exp()
    N, T = ((rho * x).sum(0) / rho.sum(0) for x in (h_new, tokens))
    return torch.stack([N.sum(), N.sum() / T.sum()])


def snis_entropy(q: Tensor, log_w: Tensor, N: Tensor, T: Tensor) -> Tensor:
    """`[H_seq, H_tok]` nats by one self-normalised weight per response, from sums over responses.

    Args:
        q: `(B,)` weights of the sequences.
        log_w: `(B,)` log-weights, up to a constant.
        N: `(B,)` entropies of the responses, nats.
        T: `(B,)` their tokens.
    """
    w = q * _shifted(log_w, q).exp()
    mean_N, mean_T = (w * N).sum() / w.sum(), (w * T).sum() / w.sum()
    return torch.stack([mean_N, mean_N / mean_T])


def _shifted(log_w: Tensor, q: Tensor) -> Tensor:
    """Log-weights less their maximum (at each position) over the sequences that are not left out by `q = 0`."""
    kept = log_w.masked_fill(q == 0, -torch.inf)
    return kept - kept.detach().amax(0)


def entropy_change(
    q: Tensor, old: TokenScores, new: TokenScores, estimator: Reweighting, clip: float | None = None
) -> Tensor:
    """`[deltaH_seq, deltaH_tok]`, nats, measured on the same sequences before and after; see `reweighted_entropy`."""
    log_ratio = new.logprob - old.logprob
    return reweighted_entropy(q, log_ratio, new.entropy, old.mask, estimator, clip) - entropy(
        q, old.entropy, old.mask
    )


def first_derivative(q: Tensor, scores: TokenScores, first: TokenTangents, estimator: Reweighting) -> Tensor:
    """`d/ds [H_seq, H_tok]` of an estimator at `s = 0`, nats, from derivatives per token."""

    def moved(s: Tensor) -> Tensor:
        h = scores.entropy + s * first.entropy
        return reweighted_entropy(q, s * first.logprob, h, scores.mask, estimator)

    zero = torch.zeros((), dtype=torch.float64)
    return torch.func.jvp(moved, (zero,), (torch.ones_like(zero),))[1]  # type: ignore[no-any-return]


def second_derivative(
    q: Tensor, scores: TokenScores, first: TokenTangents, second: TokenTangents, estimator: Reweighting
) -> Tensor:
    """`d^2/ds^2 [H_seq, H_tok]` of an estimator at `s = 0`, nats, from first and second derivatives per token."""

    def slope(s: Tensor) -> Tensor:
        def moved(s: Tensor) -> Tensor:
            log_ratio = s * first.logprob + s**2 / 2 * second.logprob
            h = scores.entropy + s * first.entropy + s**2 / 2 * second.entropy
            return reweighted_entropy(q, log_ratio, h, scores.mask, estimator)

        return torch.func.jvp(moved, (s,), (torch.ones_like(s),))[1]  # type: ignore[no-any-return]

    zero = torch.zeros((), dtype=torch.float64)
    return torch.func.jvp(slope, (zero,), (torch.ones_like(zero),))[1]  # type: ignore[no-any-return]
