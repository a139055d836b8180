"""Interventions that weigh tokens, or their advantages, differently."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from probe.attribution.interventions.registry import Plan, check_share, intervention
from probe.attribution.tokens import UpdateTokens
from probe.errors.exceptions import ConfigError
from probe.estimators.advantages import STD_EPSILON, AdvantageKind, group_advantages
from probe.estimators.groups import index_groups
from probe.estimators.losses import update_normaliser


@intervention("steer", "arXiv:2510.10150, zz-haooo/STEER core_algos.py compute_token_weights, exponential")
def steer(plan: Plan, tokens: UpdateTokens, *, w_min: float = 0.8) -> Plan:
    """Weigh every token by `exp(-k |Omega|)`, from 1 down to `w_min` where the estimated entropy change is largest."""
    if not 0 < w_min <= 1:
        raise ConfigError(f"whatif.interventions: expected steer(w_min=...) in (0, 1], found {w_min}")
    p = tokens.p.clamp(1e-8, 1 - 1e-8)
    omega = (
        tokens.A / tokens.old_logprob.exp().clamp_min(1e-8) * p * (1 - p) * (tokens.logprob + tokens.entropy)
    )
    size = torch.where(tokens.mask, omega.abs(), 0.0)
    k = -math.log(w_min) / max(float(size.max()), 0.02)
    return plan.times((-k * size).exp().clamp(w_min, 1.0))


@intervention("stare", "arXiv:2606.19236, hp-luo/STARE core_algos.py compute_stare_token_weights")
def stare(
    plan: Plan,
    tokens: UpdateTokens,
    *,
    share: float = 0.1,
    weight: float = 1.1,
    negative_weight: float = 0.9,
    target: float = 0.3,
) -> Plan:
    """Where the mean entropy is below `target`, weigh the `share` of highest surprisal of each sign of advantage."""
    check_share("stare", "share", share)
    if float(tokens.entropy[tokens.mask].mean()) >= target:
        return plan
    factor = torch.ones_like(tokens.logprob)
    factor[tokens.surprising(tokens.A > 0, share)] = weight
    factor[tokens.surprising(tokens.A < 0, share)] = negative_weight
    return plan.times(factor)


@intervention("positive_advantage", "arXiv:2506.01347 (W-REINFORCE, 0.1), 2511.05993")
def positive_advantage(plan: Plan, tokens: UpdateTokens, *, weight: float = 0.1) -> Plan:
    """Multiply the terms of positive advantage by `weight`."""
    return plan.times(1.0 + (weight - 1.0) * (tokens.A > 0).double())


@intervention("negative_advantage", "the mirror of positive_advantage")
def negative_advantage(plan: Plan, tokens: UpdateTokens, *, weight: float = 0.1) -> Plan:
    """Multiply the terms of negative advantage by `weight`."""
    return plan.times(1.0 + (weight - 1.0) * (tokens.A < 0).double())


@intervention(
    "kl_cov", "arXiv:2505.22617, PRIME-RL/Entropy-Mechanism-of-RL core_algos.py", needs_clipping=True
)
def kl_cov(plan: Plan, tokens: UpdateTokens, *, share: float = 2e-3, coef: float = 1.0) -> Plan:
    """Add `coef |l - l_old|` to the `share` of tokens of largest covariance, and clip no ratio.

    Its gradient is 0 where the policy is the one that sampled: a first step on fresh rollouts is not changed by it.
    """
    check_share("kl_cov", "share", share)
    top = tokens.top(tokens.covariance, max(1, int(share * int(tokens.mask.sum()))))
    normaliser = update_normaliser(plan.settings, plan.inputs)
    penalty = coef * normaliser * (tokens.logprob - tokens.old_logprob).sign() * top.double()
    return _with_extra(plan.with_settings(clip_low=1.0, clip_high=math.inf, delta=None), penalty)


@intervention(
    "entropic", "arXiv:2511.15248 (EntroPIC), yk7333/EntroPIC core_algos.py compute_policy_loss_entropic"
)
def entropic(plan: Plan, tokens: UpdateTokens, *, target: float = 0.1, gain: float = 1.0) -> Plan:
    """Add `-alpha r |A|` on tokens of probability above 0.95, `alpha = gain (H - target)` within [-1, 1].

    The proportional part of its controller; the integral, which a single update has none of, is 0.
    """
    H = float(tokens.entropy[tokens.mask].mean())
    alpha = min(max(gain * (H - target), -1.0), 1.0)
    sure = tokens.mask & (tokens.p > 0.95)
    ratio = (tokens.logprob - tokens.old_logprob).exp()
    normaliser = update_normaliser(
        plan.settings, replace(plan.inputs, mask=plan.inputs.mask & sure, loss_tokens=None)
    )
    return _with_extra(plan, -alpha * normaliser * ratio * tokens.A.abs())


@intervention(
    "ce_gppo", "arXiv:2509.20712, Kwai-Klear/CE-GPPO compute_gppo_loss_general_beta", needs_clipping=True
)
def ce_gppo(plan: Plan, tokens: UpdateTokens, *, beta_low: float = 0.5, beta_high: float = 1.0) -> Plan:
    """Give tokens that the PPO range clips a gradient of that range's end, times `beta_low` and `beta_high`.

    Where the policy is the one that sampled no ratio is clipped, and it changes nothing.
    """
    low, high = 1 - plan.settings.clip_low, 1 + plan.settings.clip_high
    ratio = (tokens.logprob - tokens.old_logprob).exp()
    normaliser = update_normaliser(plan.settings, plan.inputs)
    below, above = (ratio < low) & (tokens.A < 0), (ratio > high) & (tokens.A > 0)
    end = beta_low * low * below.double() + beta_high * high * above.double()
    return _with_extra(plan, -normaliser * end * tokens.A)


@intervention("quantile_baseline", "arXiv:2509.22611 (QAE), its README: torch.quantile", needs_rewards=True)
def quantile_baseline(plan: Plan, tokens: UpdateTokens, *, K: float = 0.4, std: bool = True) -> Plan:
    """Take the group's `K`-quantile of the rewards for its baseline, and divide by its standard deviation (`std`)."""
    if not 0 <= K <= 1:
        raise ConfigError(f"whatif.interventions: expected quantile_baseline(K=...) in [0, 1], found {K}")
    rewards = _rewards(tokens, "quantile_baseline")
    member, size = index_groups(tokens.group)
    baseline = torch.zeros(len(size), dtype=torch.float64)
    spread = torch.zeros(len(size), dtype=torch.float64)
    there = ~rewards.isnan()
    for g in range(len(size)):
        own = rewards[(member == g) & there]
        if len(own):
            baseline[g] = own.quantile(K)
            spread[g] = own.std() if len(own) > 1 else 0.0
    centred = torch.where(there, rewards - baseline[member], 0.0)
    return plan.with_advantages(centred / (spread[member] + STD_EPSILON) if std else centred)


@intervention(
    "advantage",
    "arXiv:2402.03300 (grpo), 2503.20783 (dr_grpo); TRL's scale_rewards (batch)",
    needs_rewards=True,
)
def advantage(plan: Plan, tokens: UpdateTokens, *, kind: str = "dr_grpo") -> Plan:
    """Other advantages: normalised by the group (`grpo`), only centred (`dr_grpo`), or by all of U (`batch`)."""
    kinds: tuple[AdvantageKind, ...] = ("grpo", "dr_grpo", "batch")
    if kind not in kinds:
        raise ConfigError(
            f"whatif.interventions: expected advantage(kind=...) with one of {', '.join(kinds)}, found {kind!r}"
        )
    rewards = _rewards(tokens, "advantage")
    return plan.with_advantages(group_advantages(rewards, tokens.group, next(k for k in kinds if k == kind)))


def _with_extra(plan: Plan, weights: torch.Tensor) -> Plan:
    """The plan with more weights of `l`, with the advantages and tokens that it has now; later steps act on them."""
    return replace(plan, extra=plan.extra + torch.where(plan.acting, weights, 0.0))


def _rewards(tokens: UpdateTokens, name: str) -> torch.Tensor:
    """The rewards of U."""
    assert tokens.rewards is not None, name  # see `Intervention.lacks`
    return tokens.rewards.double()
