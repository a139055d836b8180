"""Interventions that leave tokens out."""

from __future__ import annotations

from dataclasses import replace

import torch

from probe.attribution.interventions.registry import Plan, check_share, intervention
from probe.attribution.tokens import UpdateTokens
from probe.config.losses import TOKEN_MEANS
from probe.errors.exceptions import ConfigError


@intervention("clip_cov", "arXiv:2505.22617, PRIME-RL/Entropy-Mechanism-of-RL core_algos.py")
def clip_cov(
    plan: Plan,
    tokens: UpdateTokens,
    *,
    ratio: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    seed: int = 0,
) -> Plan:
    """Leave out `ratio` of the tokens, at random among those whose covariance is in (low, high); at least one.

    Tokens that the loss clips already are not chosen, and what the loss divides by stays.
    """
    check_share("clip_cov", "ratio", ratio)
    acting = plan.weights.policy != 0
    C = tokens.covariance
    eligible = (tokens.mask & acting & (low < C) & (high > C)).flatten().nonzero().flatten()
    count = min(max(int(ratio * int(tokens.mask.sum())), 1), len(eligible))
    order = torch.randperm(len(eligible), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(tokens.mask.numel(), dtype=torch.bool)
    chosen[eligible[order[:count]]] = True
    return plan.without(chosen.reshape(tokens.mask.shape))


@intervention("clip_b", "arXiv:2602.03392, Trinity-RFT clipb_advantage.py")
def clip_b(plan: Plan, tokens: UpdateTokens, *, mu: float = 2.5) -> Plan:
    """Mask tokens of negative advantage whose `S` is more than `mu` standard deviations below the batch's mean."""
    S = tokens.discriminator
    sigma = tokens.spread(S)
    if sigma < 1e-12:
        return plan
    below = S - S[tokens.mask].mean() < -mu * sigma
    return plan.masked(tokens.mask & (tokens.A < 0) & below)


@intervention("clip_v", "arXiv:2602.03392, Trinity-RFT clipv_advantage.py")
def clip_v(plan: Plan, tokens: UpdateTokens, *, mu: float = 8.5, most: float = 1e-4) -> Plan:
    """Mask tokens of negative advantage whose `E[S] - S` is above `mu` standard deviations; at most a share `most`."""
    check_share("clip_v", "most", most)
    ahead = tokens.expected_discriminator - tokens.discriminator
    chosen = tokens.mask & (tokens.A < 0) & (ahead > mu * tokens.spread(ahead))
    N = int(tokens.mask.sum())
    if int(chosen.sum()) > most * N:
        chosen = tokens.top(ahead, max(int(most * N), 1), chosen)
    return plan.masked(chosen)


@intervention("top_entropy", "arXiv:2506.01939; TRL's top_entropy_quantile")
def top_entropy(plan: Plan, tokens: UpdateTokens, *, share: float = 0.2) -> Plan:
    """The policy gradient of the `share` of tokens of highest entropy alone, as TRL does it (its denominator stays)."""
    check_share("top_entropy", "share", share)
    if share == 0:
        raise ConfigError("whatif.interventions: expected top_entropy(share=...) above 0, found 0")
    return plan.with_settings(top_entropy_quantile=share)


@intervention("mask_truncated", "arXiv:2503.14476 (DAPO); TRL's mask_truncated_completions")
def mask_truncated(plan: Plan, tokens: UpdateTokens) -> Plan:
    """Leave responses that the cap cut off out of the loss."""
    truncated = plan.inputs.truncated
    if truncated is None or not bool(truncated.any()):
        return plan
    return plan.masked(tokens.mask & truncated.unsqueeze(1))


@intervention("drop", "ablation")
def drop(plan: Plan, tokens: UpdateTokens, *, tokens_of: str = "highest fifth") -> Plan:
    """Leave a class of tokens out (`right`, `wrong`, `eos`, `digits`, `words`, `highest fifth`, `tenth 1`, ...)."""
    if tokens_of not in tokens.classes:
        raise ConfigError(
            f"whatif.interventions: expected drop(tokens_of=...) with one of {', '.join(tokens.classes)}, which U has, "
            f"found {tokens_of!r}"
        )
    return plan.without(tokens.classes[tokens_of])


@intervention("drop_zero_advantage", "arXiv:2503.14476 (DAPO), dynamic sampling, without sampling others")
def drop_zero_advantage(plan: Plan, tokens: UpdateTokens) -> Plan:
    """Leave responses of advantage 0 out of the batch, so that they do not count in what the loss divides by."""
    acting = plan.acting.any(1)
    left, kept = acting & (tokens.advantages == 0), acting & (tokens.advantages != 0)
    if not bool(kept.any()):
        return plan
    shrunk = plan.masked(left.unsqueeze(1) & tokens.mask)
    if plan.settings.loss in TOKEN_MEANS:
        return shrunk
    return replace(shrunk, scale=shrunk.scale * int((left | kept).sum()) / int(kept.sum()))


@intervention(
    "negative_only", "arXiv:2506.01347 (NSR); what Entrocraft (2604.26326) does below its lower bound"
)
def negative_only(plan: Plan, tokens: UpdateTokens) -> Plan:
    """The terms of responses of negative advantage alone."""
    return plan.without(tokens.A > 0)


@intervention("positive_only", "arXiv:2506.01347 (PSR)")
def positive_only(plan: Plan, tokens: UpdateTokens) -> Plan:
    """The terms of responses of positive advantage alone."""
    return plan.without(tokens.A < 0)
