"""The losses that an update can have, and the options that have one name here and in TRL."""

from __future__ import annotations

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
