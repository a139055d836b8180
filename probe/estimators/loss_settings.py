"""Which loss an update has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
