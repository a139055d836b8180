"""The policy-gradient losses, as weights on log-probs: `weight[i, t] = d loss / d l[i, t]`.

With `A` the advantage, `r = exp(l - l_old)` the ratio and `c[i, t]` the loss's normalisation,

    loss = sum_(i,t) c[i, t] * ( -min(r A, clip(r, 1 - low, 1 + high) A) + kl_coef * k3(l_ref - l) - entropy_coef * h )

where `k3(d) = exp(d) - d - 1` estimates the KL divergence to the reference policy. The entropy bonus has the loss's own
normalisation (TRL averages it over all tokens of the batch whatever the loss; with `dapo` the two are the same).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Loss = Literal["grpo", "dr_grpo", "dapo", "reinforce"]


@dataclass(frozen=True)
class LossSettings:
    """What fixes a loss.

    Attributes:
        loss: the normalisation, see `token_normaliser`.
        max_new_tokens: the constant length of `dr_grpo`.
        clip_low: lower clip range of the ratio.
        clip_high: upper clip range of the ratio.
        kl_coef: weight of the KL penalty.
        entropy_coef: weight of the entropy bonus.
    """

    loss: Loss = "grpo"
    max_new_tokens: int = 256
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    entropy_coef: float = 0.0


def token_normaliser(loss: Loss, mask: Tensor, max_new_tokens: int) -> Tensor:
    """The factor `c[i, t]` of every token, `(B, T)` float64, 0 outside `mask`.

    - `grpo`: mean over the tokens of each sequence, then over sequences: `1 / (B T_i)`
    - `dr_grpo`: a constant length: `1 / (B max_new_tokens)`
    - `dapo`: mean over all tokens: `1 / sum_j T_j`
    - `reinforce`: mean over sequences of the sum over tokens: `1 / B`

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
    if loss == "grpo":
        return tokens / (B * lengths)
    if loss == "dr_grpo":
        return tokens / (B * max_new_tokens)
    if loss == "dapo":
        return tokens / tokens.sum().clamp_min(1.0)
    if loss == "reinforce":
        return tokens / B
    raise ValueError(f"loss: expected 'grpo', 'dr_grpo', 'dapo' or 'reinforce', found {loss!r}")


def loss_weights(
    settings: LossSettings,
    normaliser: Tensor,
    advantages: Tensor,
    logprob: Tensor,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights of `l` and of `h` in the loss's gradient, elementwise on tensors of one (broadcastable) shape.

    Args:
        settings: the loss.
        normaliser: `c`, from `token_normaliser`.
        advantages: `A` of the token's sequence.
        logprob: `l` under the current policy, nats.
        old_logprob: `l_old` under the policy that sampled; None means the current policy: ratio 1, nothing clipped.
        ref_logprob: `l_ref`, needed where `kl_coef > 0`.

    Returns:
        `(d loss / d l, d loss / d h)`.

    Raises:
        ValueError: `kl_coef > 0` without reference log-probs.

    Example:
        >>> one = torch.ones(1)
        >>> loss_weights(LossSettings(), one, 2 * one, -one, old_logprob=-1.1 * one)[0]  # ratio 1.105, inside the clip
        tensor([-2.2103])
        >>> loss_weights(LossSettings(), one, 2 * one, -one, old_logprob=-2 * one)[0]  # ratio 2.7, clipped
        tensor([0.])
    """
    if old_logprob is None:
        of_logprob = -advantages * torch.ones_like(logprob)
    else:
        ratio = (logprob - old_logprob).exp()
        inside = torch.where(advantages >= 0, ratio <= 1 + settings.clip_high, ratio >= 1 - settings.clip_low)
        of_logprob = torch.where(inside, -advantages * ratio, 0.0)  # a clipped ratio may be infinite
    if settings.kl_coef > 0:
        if ref_logprob is None:
            raise ValueError("kl_coef > 0: expected reference log-probs, found none")
        of_logprob = of_logprob + settings.kl_coef * (1.0 - (ref_logprob - logprob).exp())
    of_entropy = torch.full_like(logprob, -settings.entropy_coef)
    return normaliser * of_logprob, normaliser * of_entropy
