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

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor

from probe.config.losses import TOKEN_MEANS, WINDOW_MEANS, Loss
from probe.estimators.loss_settings import LossSettings
from probe.estimators.loss_terms import high_entropy, loss_terms, sampler_ratio


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
    inputs, parts = replace(inputs, mask=acting_tokens(settings, inputs)), _microbatches(settings, inputs)
    normaliser = _normalisers(settings, inputs, parts)
    losses = [_part_loss(settings, inputs.rows(part), normaliser[part], len(parts)) for part in parts]
    return torch.stack(losses).sum()


def acting_tokens(settings: LossSettings, inputs: LossInputs) -> Tensor:
    """The tokens that have a part in the loss, `(B, T)` bool: without those of responses that it masks.

    Raises:
        ValueError: which responses were truncated is not known, and is needed.
    """
    if not settings.mask_truncated_completions:
        return inputs.mask
    if inputs.truncated is None:
        raise ValueError("mask_truncated_completions: expected which responses were truncated, found nothing")
    return inputs.mask & ~inputs.truncated.unsqueeze(1)


def update_normaliser(settings: LossSettings, inputs: LossInputs) -> Tensor:
    """What the loss multiplies the term of every token by, `(B, T)`.

    `token_normaliser`, one microbatch at a time where the loss is worked out so, and by the number of tokens that was
    recorded where one was.
    """
    inputs = replace(inputs, mask=acting_tokens(settings, inputs))
    return _normalisers(settings, inputs, _microbatches(settings, inputs))


def _microbatches(settings: LossSettings, inputs: LossInputs) -> tuple[Tensor, ...]:
    """The rows of each microbatch."""
    size = settings.per_device_train_batch_size or len(inputs.mask)
    order = torch.arange(len(inputs.mask)) if inputs.order is None else inputs.order
    return order.split(size)


def _normalisers(settings: LossSettings, inputs: LossInputs, parts: Sequence[Tensor]) -> Tensor:
    """See `update_normaliser`; of masked tokens and microbatches that are known."""
    if settings.loss in WINDOW_MEANS and inputs.loss_tokens is not None:
        return inputs.mask.double() / inputs.loss_tokens
    if settings.loss in WINDOW_MEANS:
        return token_normaliser(settings.loss, inputs.mask, settings.max_new_tokens)
    found = torch.zeros(inputs.mask.shape, dtype=torch.float64)
    for part in parts:
        found[part] = token_normaliser(settings.loss, inputs.mask[part], settings.max_new_tokens) / len(parts)
    return found


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
    terms = loss_terms(settings, A, l, log_ratio, ratio, correction)
    if settings.off_policy_mask_threshold is not None:
        sampled = old if inputs.sampling_logprob is None else inputs.sampling_logprob
        ahead = torch.where(mask, sampled - l.detach(), 0.0).nan_to_num(nan=0.0)
        drift = ahead.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
        terms = torch.where((A >= 0) | (drift <= settings.off_policy_mask_threshold), terms, 0.0)
    chosen = high_entropy(settings.top_entropy_quantile, h.detach(), mask)
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


@dataclass(frozen=True)
class LossWeights:
    """Derivatives of a loss by the scores of every token, `(B, T)` float64, in the parts that the loss is a sum of.

    Attributes:
        policy: of the policy-gradient term, by the token's log-prob.
        kl: of the KL penalty, by the log-prob.
        bonus: of the entropy bonus, by the token's entropy.
    """

    policy: Tensor
    kl: Tensor
    bonus: Tensor


def loss_weight_parts(settings: LossSettings, inputs: LossInputs) -> LossWeights:
    """`loss_weights` in its parts: `policy + kl` is its first value, `bonus` its second.

    Raises:
        ValueError: see `policy_loss`.
    """
    policy, _ = loss_weights(replace(settings, kl_coef=0.0, entropy_coef=0.0), inputs)
    whole, bonus = loss_weights(settings, inputs)
    return LossWeights(policy=policy, kl=whole - policy, bonus=bonus)
