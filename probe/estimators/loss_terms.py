"""Terms of the losses, token by token."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from probe.config.losses import SamplerMode
from probe.data.batch import RolloutBatch
from probe.estimators.loss_settings import LossSettings

SMALLEST_RATIO, LARGEST_LOG_RATIO, SMALLEST_LAMBDA = 1e-8, 20.0, 1e-4
"""Clamps of `vespo`'s ratio of a response, and of its `lambda`, as in TRL."""


def sampler_ratio(settings: LossSettings, mask: Tensor, old: Tensor, sampling: Tensor) -> Tensor:
    """What the terms are multiplied by where an inference engine sampled: `pi_old / pi_sampling`, `(B, T)`.

    Per token (`token_*`) or of the whole response (`sequence_*`); with `*_truncate` clamped to the range from
    `vllm_importance_sampling_clip_min` to `_clip_max`, with `*_mask` 0 outside of it. Tokens that the engine gave no
    log-prob for (NaN) count as 1.

    Args:
        settings: with the mode and the range.
        mask: `(B, T)` bool.
        old: `l_old`, `(B, T)`.
        sampling: the engine's log-probs, `(B, T)`.

    Raises:
        ValueError: an unknown mode.

    Example:
        >>> settings = LossSettings(vllm_importance_sampling_mode="token_truncate")
        >>> old, sampling = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -3.0]])
        >>> sampler_ratio(settings, torch.ones(1, 2, dtype=torch.bool), old, sampling)
        tensor([[1., 3.]])
    """
    level, _, how = settings.vllm_importance_sampling_mode.partition("_")
    if settings.vllm_importance_sampling_mode not in get_args(SamplerMode):
        raise ValueError(
            f"vllm_importance_sampling_mode: expected one of {', '.join(get_args(SamplerMode))}, found "
            f"{settings.vllm_importance_sampling_mode!r}"
        )
    ahead = torch.where(mask, old.detach() - sampling, 0.0).nan_to_num(nan=0.0)
    ratio = (ahead.sum(1, keepdim=True).expand_as(ahead) if level == "sequence" else ahead).exp()
    low, high = settings.vllm_importance_sampling_clip_min, settings.vllm_importance_sampling_clip_max
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if how == "truncate":
        return ratio.clamp(low, high)
    return torch.where((ratio < low) | (ratio > high), 0.0, ratio)


def loss_terms(
    settings: LossSettings,
    A: Tensor,
    l: Tensor,
    log_ratio: Tensor,
    ratio: Tensor,
    correction: Tensor | None,
) -> Tensor:
    """The policy-gradient term of every token, `(B, T)`; `correction` is the sampler's."""
    if settings.loss == "vespo":
        largest, smallest = LARGEST_LOG_RATIO, math.log(SMALLEST_RATIO)
        whole = log_ratio.detach().clamp(-largest, largest).sum(1, keepdim=True)
        if correction is not None:
            per_response = settings.vllm_importance_sampling_mode.startswith("sequence")
            own = correction[:, :1] if per_response else correction
            whole = whole + own.log().clamp(smallest, largest).sum(1, keepdim=True)
        log_w = whole.clamp(smallest, largest)
        k = _by_sign(A >= 0, settings.vespo_k_pos, settings.vespo_k_neg)
        scale = _by_sign(A >= 0, settings.vespo_lambda_pos, settings.vespo_lambda_neg)
        scale = scale.clamp_min(SMALLEST_LAMBDA)
        phi = (scale + k * log_w - scale * log_w.exp()).exp()
        return -phi.nan_to_num(nan=0.0, posinf=0.0) * A * l
    terms = _uncorrected(settings, A, l, ratio)
    return terms if correction is None else terms * correction


def _uncorrected(settings: LossSettings, A: Tensor, l: Tensor, ratio: Tensor) -> Tensor:
    """The terms of the losses that the sampler's correction multiplies."""
    if settings.loss == "cispo":
        return -ratio.clamp(max=settings.clip_high).detach() * A * l
    if settings.loss == "sapo":
        T = _by_sign(A > 0, settings.sapo_temperature_pos, settings.sapo_temperature_neg)
        return -4.0 / T * torch.sigmoid(T * (ratio - 1.0)) * A
    clipped = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    bounded = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
    return -torch.min(bounded * A, clipped * A)


def _by_sign(condition: Tensor, yes: float, no: float) -> Tensor:
    """One of two numbers for every response, float64 (`torch.where` on numbers alone rounds to the default type)."""
    return torch.where(
        condition, torch.tensor(yes, dtype=torch.float64), torch.tensor(no, dtype=torch.float64)
    )


def high_entropy(share: float, h: Tensor, mask: Tensor) -> Tensor:
    """The tokens of the batch whose entropy is in the uppermost `share`, `(B, T)` bool."""
    if share >= 1.0 or not bool(mask.any()):
        return mask
    found = h[mask].sort().values
    place = (1.0 - share) * (len(found) - 1)  # linear between neighbours; torch.quantile has a limit on sizes
    low = int(place)
    high = min(low + 1, len(found) - 1)
    threshold = found[low] + (place - low) * (found[high] - found[low])
    return (h >= threshold) & mask


def needs_scores(settings: LossSettings, batch: RolloutBatch) -> bool:
    """Whether the weights depend on the scores: off-policy ratios, a KL term, a choice of tokens by entropy."""
    given = batch.old_logprobs is not None or batch.sampling_logprobs is not None
    return given or settings.kl_coef > 0 or settings.top_entropy_quantile < 1.0
