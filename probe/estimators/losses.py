"""The policy-gradient losses, as functions of token scores, and their weights `weight[i, t] = d loss / d l[i, t]`.

The loss is written once, as it stands in a trainer; its derivatives by the log-probs `l` and the entropies `h` of the
tokens are autograd's, in float64. So losses that couple the tokens of a response or of a batch (sequence ratios,
entropy quantiles) need nothing of their own. With `A` the advantage and `r = exp(l - l_old)` the ratio (of a token, or
the geometric mean over a response: `importance_sampling_level`), a token's term is

    grpo, dr_grpo, bnpo, dapo, reinforce   -min(min(r, delta) A, clip(r, 1 - low, 1 + high) A)
    cispo      -stop(min(r, high)) A l
    sapo       -4 / T sigmoid(T (r - 1)) A, with T by the sign of A
    vespo      -stop(phi(w)) A l, with w the ratio of the whole response and phi(w) = exp(lambda + k log w - lambda w)

times the sampler's correction where another engine than the policy sampled (`sampler_ratio`), and 0 for responses that
`off_policy_mask_threshold` leaves out, plus `kl_coef * k3(l_ref - l)`, where `k3(d) = exp(d) - d - 1` estimates the KL
divergence to the reference policy. With `use_bias_correction_kl` it is multiplied by `r`: its gradient on samples of
the policy is then that of the divergence, `kl_coef (l - l_ref)`. Terms are averaged as `token_normaliser` says. The
entropy bonus, `-entropy_coef` times a mean of `h` over tokens, is averaged over tokens whatever the loss.

A trainer that accumulates gradients works some of this out one microbatch at a time: the token mean of `bnpo`, the
entropy bonus and the entropy quantile. `per_device_train_batch_size` says how many rows these are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from probe.data.batch import RolloutBatch

Loss = Literal["grpo", "dr_grpo", "dapo", "reinforce", "bnpo", "cispo", "sapo", "vespo", "luspo"]
RatioLevel = Literal["token", "sequence"]
SamplerMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

TOKEN_MEANS: tuple[Loss, ...] = ("dapo", "bnpo", "cispo", "vespo")
"""Losses that are a mean over all tokens of the batch."""
WINDOW_MEANS: tuple[Loss, ...] = ("dapo", "cispo", "vespo")
"""Those whose number of tokens is that of the whole update, however its gradients are accumulated."""
LOSS_OPTIONS = (
    "importance_sampling_level",
    "delta",
    "use_bias_correction_kl",
    "mask_truncated_completions",
    "top_entropy_quantile",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "off_policy_mask_threshold",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_clip_max",
    "per_device_train_batch_size",
)
"""Options that have one name here, in the configuration's section `probe_rework`, and in TRL's `GRPOConfig`."""
SMALLEST_RATIO, LARGEST_LOG_RATIO, SMALLEST_LAMBDA = 1e-8, 20.0, 1e-4
"""Clamps of `vespo`'s ratio of a response, and of its `lambda`, as in TRL."""


@dataclass(frozen=True)
class LossSettings:
    """What fixes a loss; the names of the options are TRL's where they are not those of the configuration.

    Attributes:
        loss: the terms and their normalisation. `luspo` has the terms of `grpo` and the normalisation of `reinforce`.
        max_new_tokens: the constant length of `dr_grpo`.
        clip_low: lower clip range of the ratio.
        clip_high: upper clip range of the ratio; the largest weight of `cispo`.
        kl_coef: weight of the KL penalty.
        entropy_coef: weight of the entropy bonus.
        importance_sampling_level: whose ratio it is, a token's or a response's.
        delta: upper bound of the ratio where the advantage is negative too; None for none.
        use_bias_correction_kl: multiply the KL estimate by the ratio.
        mask_truncated_completions: tokens of responses that the cap cut off have no part in the loss; the responses
            still count where the normalisation is a mean over responses.
        top_entropy_quantile: share of the tokens, those of highest entropy, that have a policy-gradient term and an
            entropy bonus.
        sapo_temperature_pos: `T` where the advantage is positive.
        sapo_temperature_neg: `T` elsewhere.
        vespo_k_pos: `k` where the advantage is not negative.
        vespo_lambda_pos: `lambda` there.
        vespo_k_neg: `k` elsewhere.
        vespo_lambda_neg: `lambda` elsewhere.
        off_policy_mask_threshold: responses of negative advantage have no policy-gradient term where the mean of
            `l_sampling - l` over their tokens is larger than this (nats); None leaves none out.
        vllm_importance_sampling_correction: correct for the sampler, see `sampler_ratio`.
        vllm_importance_sampling_mode: see `sampler_ratio`.
        vllm_importance_sampling_clip_min: likewise.
        vllm_importance_sampling_clip_max: likewise.
        per_device_train_batch_size: rows of a microbatch, in the order of the batch; None takes all at once.
        router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts, see `router_loss`; it has no
            part in the weights of tokens.
    """

    loss: Loss = "dapo"
    max_new_tokens: int = 256
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    importance_sampling_level: RatioLevel = "token"
    delta: float | None = None
    use_bias_correction_kl: bool = True
    mask_truncated_completions: bool = False
    top_entropy_quantile: float = 1.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    off_policy_mask_threshold: float | None = None
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: SamplerMode = "sequence_mask"
    vllm_importance_sampling_clip_min: float | None = None
    vllm_importance_sampling_clip_max: float | None = 3.0
    per_device_train_batch_size: int | None = None
    router_aux_loss_coef: float = 0.0


def token_normaliser(loss: Loss, mask: Tensor, max_new_tokens: int) -> Tensor:
    """The factor `c[i, t]` of every token, `(B, T)` float64, 0 outside `mask`.

    - `grpo`, `sapo`: mean over the tokens of each sequence, then over sequences: `1 / (B T_i)`
    - `dr_grpo`: a constant length: `1 / (B max_new_tokens)`
    - `dapo`, `bnpo`, `cispo`, `vespo`: mean over all tokens: `1 / sum_j T_j`
    - `reinforce`, `luspo`: mean over sequences of the sum over tokens: `1 / B`

    Args:
        loss: one of the above.
        mask: `(B, T)` bool, the response tokens.
        max_new_tokens: the constant of `dr_grpo`.

    Raises:
        ValueError: an unknown loss.

    Example:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> token_normaliser("grpo", mask, 4)
        tensor([[0.2500, 0.2500],
                [0.5000, 0.0000]], dtype=torch.float64)
    """
    tokens = mask.double()
    B, lengths = len(mask), tokens.sum(1, keepdim=True).clamp_min(1.0)
    if loss in ("grpo", "sapo"):
        return tokens / (B * lengths)
    if loss == "dr_grpo":
        return tokens / (B * max_new_tokens)
    if loss in TOKEN_MEANS:
        return tokens / tokens.sum().clamp_min(1.0)
    if loss in ("reinforce", "luspo"):
        return tokens / B
    raise ValueError(f"loss: expected one of {', '.join(get_args(Loss))}, found {loss!r}")


@dataclass(frozen=True)
class LossInputs:
    """What a loss is a function of, for `B` responses of at most `T` tokens.

    Attributes:
        mask: `(B, T)` bool, the response tokens.
        advantages: `A`, `(B,)`.
        logprob: `l` under the current policy, `(B, T)`, nats.
        entropy: `h`, `(B, T)`, nats.
        truncated: `(B,)` bool, needed with `mask_truncated_completions`.
        old_logprob: `l_old` under the policy that sampled, `(B, T)`; None means the current policy: ratio 1.
        ref_logprob: `l_ref`, `(B, T)`, needed where `kl_coef > 0`.
        sampling_logprob: the log-probs that the sampling engine gave, `(B, T)`, NaN where it gave none; None where the
            policy itself sampled.
        order: `(B,)` int64, in which the responses are cut into microbatches; None takes them as they stand.
        loss_tokens: what the losses that are a mean over the tokens of the update divide by, where it is another number
            than theirs (TRL takes that of a generation, by the share of it that an update uses).
    """

    mask: Tensor
    advantages: Tensor
    logprob: Tensor
    entropy: Tensor
    truncated: Tensor | None = None
    old_logprob: Tensor | None = None
    ref_logprob: Tensor | None = None
    sampling_logprob: Tensor | None = None
    order: Tensor | None = None
    loss_tokens: float | None = None

    def rows(self, part: Tensor) -> LossInputs:
        """Those of some responses."""
        given: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        cut: dict[str, Any] = {name: x[part] if isinstance(x, Tensor) else x for name, x in given.items()}
        return LossInputs(**cut)


def policy_loss(settings: LossSettings, inputs: LossInputs) -> Tensor:
    """The loss of a batch, a scalar that can be differentiated by the inputs' `logprob` and `entropy`.

    Raises:
        ValueError: what an option needs is missing, or the loss is unknown.
    """
    if settings.mask_truncated_completions:
        if inputs.truncated is None:
            raise ValueError(
                "mask_truncated_completions: expected which responses were truncated, found nothing"
            )
        inputs = replace(inputs, mask=inputs.mask & ~inputs.truncated.unsqueeze(1))
    size = settings.per_device_train_batch_size or len(inputs.mask)
    order = torch.arange(len(inputs.mask)) if inputs.order is None else inputs.order
    parts = order.split(size)
    whole: Tensor | None = None
    if settings.loss in WINDOW_MEANS and inputs.loss_tokens is not None:
        whole = inputs.mask.double() / inputs.loss_tokens
    elif settings.loss in WINDOW_MEANS:
        whole = token_normaliser(settings.loss, inputs.mask, settings.max_new_tokens)
    losses = []
    for part in parts:
        own = inputs.rows(part)
        if whole is None:
            normaliser = token_normaliser(settings.loss, own.mask, settings.max_new_tokens) / len(parts)
        else:
            normaliser = whole[part]
        losses.append(_part_loss(settings, own, normaliser, len(parts)))
    return torch.stack(losses).sum()


def _part_loss(settings: LossSettings, inputs: LossInputs, normaliser: Tensor, parts: int) -> Tensor:
    """What one of `parts` microbatches adds to the loss."""
    mask, A = inputs.mask, inputs.advantages.double().unsqueeze(1)
    # what stands outside the mask must not reach a sum, not even times 0
    l, h = torch.where(mask, inputs.logprob, 0.0), torch.where(mask, inputs.entropy, 0.0)
    old = l.detach() if inputs.old_logprob is None else torch.where(mask, inputs.old_logprob, 0.0)
    log_ratio = l - old
    ratio = log_ratio.exp()
    if settings.importance_sampling_level == "sequence":
        ratio = (log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)).exp().expand_as(l)
    elif settings.importance_sampling_level != "token":
        raise ValueError(
            f"importance_sampling_level: expected token or sequence, found {settings.importance_sampling_level!r}"
        )
    correction = None
    if inputs.sampling_logprob is not None and settings.vllm_importance_sampling_correction:
        correction = sampler_ratio(settings, mask, old, inputs.sampling_logprob)
    terms = _terms(settings, A, l, log_ratio, ratio, correction)
    if settings.off_policy_mask_threshold is not None:
        sampled = old if inputs.sampling_logprob is None else inputs.sampling_logprob
        ahead = torch.where(mask, sampled - l.detach(), 0.0).nan_to_num(nan=0.0)
        drift = ahead.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
        terms = torch.where((A >= 0) | (drift <= settings.off_policy_mask_threshold), terms, 0.0)
    chosen = _high_entropy(settings.top_entropy_quantile, h.detach(), mask)
    terms = torch.where(chosen, terms, 0.0)
    if settings.kl_coef > 0:
        if inputs.ref_logprob is None:
            raise ValueError("kl_coef > 0: expected reference log-probs, found none")
        ahead = torch.where(mask, inputs.ref_logprob, 0.0) - l
        kl = ahead.exp() - ahead - 1.0
        terms = terms + settings.kl_coef * (kl * ratio if settings.use_bias_correction_kl else kl)
    loss = (normaliser * terms).sum()
    if settings.entropy_coef != 0.0:
        acting = chosen.double()
        bonus = (acting * h).sum() / acting.sum().clamp_min(1.0)
        loss = loss - settings.entropy_coef * bonus / parts
    return loss


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


def _terms(
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


def _high_entropy(share: float, h: Tensor, mask: Tensor) -> Tensor:
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


def loss_weights(settings: LossSettings, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Derivatives of `policy_loss` by every token's log-prob and entropy, at the scores given.

    Returns:
        `(d loss / d l, d loss / d h)`, `(B, T)` float64, 0 outside the mask.

    Raises:
        ValueError: see `policy_loss`.

    Example:
        >>> mask, one = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1).double()
        >>> inputs = LossInputs(mask, torch.tensor([2.0]), -one, one, old_logprob=-1.1 * one)
        >>> loss_weights(LossSettings(), inputs)[0]  # ratio 1.105, inside the clip
        tensor([[-2.2103]], dtype=torch.float64)
        >>> loss_weights(LossSettings(), replace(inputs, old_logprob=-2 * one))[0]  # ratio 2.7, clipped
        tensor([[0.]], dtype=torch.float64)
    """
    with torch.enable_grad():
        l = inputs.logprob.detach().double().requires_grad_()
        h = inputs.entropy.detach().double().requires_grad_()
        value = policy_loss(settings, replace(inputs, logprob=l, entropy=h))
        of_l, of_h = torch.autograd.grad(value, [l, h], allow_unused=True)
    return tuple(torch.zeros_like(l) if g is None else g for g in (of_l, of_h))  # type: ignore[return-value]
