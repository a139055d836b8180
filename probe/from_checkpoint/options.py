"""Every option of TRL's `GRPOConfig`, and what it is to the probe: read, judged, or without a part in the update.

The one table of what a trainer's options mean here. `probe.from_checkpoint` applies it to the arguments that stand
beside a checkpoint; the drop-in probe asks it about the sampling of the trainer that it is attached to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from probe.config.losses import LOSS_OPTIONS, Loss, RatioLevel, SamplerMode
from probe.from_checkpoint.values import (
    Read,
    advantage_kind,
    clipping,
    integer,
    mapping,
    number,
    numbers,
    one_of,
    or_none,
    texts,
    top_k,
    truth,
)

# ---------------------------------------------------------------- options that are read


_OF_THE_LOSS: dict[str, Callable[[Any], Any]] = {
    "importance_sampling_level": one_of(*get_args(RatioLevel)),
    "delta": or_none(number),
    "use_bias_correction_kl": truth,
    "mask_truncated_completions": truth,
    "off_policy_mask_threshold": or_none(number),
    "vllm_importance_sampling_correction": truth,
    "vllm_importance_sampling_mode": one_of(*get_args(SamplerMode)),
    "vllm_importance_sampling_clip_min": or_none(number),
    "vllm_importance_sampling_clip_max": or_none(number),
    "per_device_train_batch_size": integer,
}
READ: dict[str, Read] = {
    "loss_type": Read("probe_rework.loss", one_of(*(x for x in get_args(Loss) if x != "reinforce"))),
    "scale_rewards": Read("probe_rework.advantage", advantage_kind),
    "beta": Read("probe_rework.kl_coef", number),
    "epsilon": Read("probe_rework.clip_range", number),
    "epsilon_high": Read("probe_rework.clip_range_high", or_none(number)),
    "entropy_coef": Read("probe_rework.entropy_coef", number),
    **{name: Read(f"probe_rework.{name}", _OF_THE_LOSS.get(name, number)) for name in LOSS_OPTIONS},
    "router_aux_loss_coef": Read("probe_rework.router_aux_loss_coef", or_none(number)),
    "reward_weights": Read("batch_config.reward_weights", or_none(numbers), only_sampled=True),
    "multi_objective_aggregation": Read(
        "probe_rework.multi_objective_aggregation",
        one_of("sum_then_normalize", "normalize_then_sum"),
        only_sampled=True,
    ),
    "max_grad_norm": Read("probe_rework.max_grad_norm", or_none(clipping)),
    "temperature": Read("generation.temperature", number),
    "max_completion_length": Read("generation.max_new_tokens", integer),
    "top_p": Read("generation.top_p", number, only_sampled=True),
    "top_k": Read("generation.top_k", or_none(top_k, 0), only_sampled=True),
    "min_p": Read("generation.min_p", or_none(number, 0.0), only_sampled=True),
    "num_generations": Read("batch_config.G", integer, only_sampled=True),
    "chat_template_kwargs": Read("batch_config.chat_template_kwargs", or_none(mapping)),
}
"""Options by their name in TRL."""
STOP_STRINGS = Read("generation.stop_strings", texts, only_sampled=True)
"""`stop_strings` in `generation_kwargs`, where there are some."""
PROMPTS_KEY = "batch_config.B_U"
"""What the sizes of batches make up: prompts per optimizer step."""
SIZES = ("gradient_accumulation_steps", "steps_per_generation", "generation_batch_size", "num_iterations")
"""Options that say, with the size of a microbatch, how many responses an update is made from, and how many updates are
made from one generation."""
OTHERWISE: dict[str, Any] = {
    "use_bias_correction_kl": False,
    "loss_type": "grpo",
    "vllm_importance_sampling_correction": False,
    "vllm_importance_sampling_mode": "token_truncate",
}
"""What the versions did that do not have an option yet, where that is not the probe's default."""

# ---------------------------------------------------------------- options that are judged


@dataclass(frozen=True)
class Unsupported:
    """An option with which the update is another one than the probe's.

    Attributes:
        neutral: the values that change nothing.
        what: what the option does, after "which".
        unless: keys with which the configuration takes the matter into its own hands.
        only_sampled: whether it does not matter where U comes from a file.
        only_with_kl: whether it does not matter without a KL penalty.
    """

    neutral: tuple[Any, ...]
    what: str
    unless: tuple[str, ...] = ()
    only_sampled: bool = False
    only_with_kl: bool = False


# fmt: off
_ADAM = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_hf", "adamw_apex_fused",
    "adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "adamw_bnb_8bit", "adamw_8bit",
    "paged_adamw_32bit", "paged_adamw_8bit", "paged_adamw",
)
UNSUPPORTED: dict[str, Unsupported] = {
    "optim": Unsupported(
        _ADAM, "is not known as Adam or AdamW (where it is one all the same, checkpoint.optimizer says which)",
        ("checkpoint.optimizer",)
    ),
    "neftune_noise_alpha": Unsupported((None, 0), "adds noise to the embeddings"),
    "use_adaptive_entropy": Unsupported(
        (False,), "changes the entropy bonus from step to step", ("probe_rework.entropy_coef",)
    ),
    "sync_ref_model": Unsupported(
        (False,), "moves the reference policy of the KL penalty", ("probe_rework.kl_coef",), only_with_kl=True
    ),
    "vllm_structured_outputs_regex": Unsupported((None,), "restricts what can be sampled", only_sampled=True),
    "vllm_guided_decoding_regex": Unsupported((None,), "restricts what can be sampled", only_sampled=True),
    "auto_find_batch_size": Unsupported(
        (False,), "may have changed the size of the update's batch", (PROMPTS_KEY,), only_sampled=True
    ),
}
# fmt: on
"""Options that the probe's update does not have. Those of sampling are in `NEUTRAL_SAMPLING`."""
SAMPLING = ("repetition_penalty", "generation_kwargs")
"""Options of sampling that have no equivalent of their own; `generation_kwargs` has further ones in it."""

# ---------------------------------------------------------------- the others

# fmt: off
IRRELEVANT: dict[str, tuple[str, ...]] = {
    "the optimizer's state has it": (
        "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args",
        "optim_target_modules", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    ),
    "the length and order of a training, not a step of it": (
        "num_train_epochs", "max_steps", "seed", "data_seed", "shuffle_dataset", "train_sampling_strategy",
        "length_column_name", "dataloader_drop_last", "ignore_data_skip", "resume_from_checkpoint", "do_train",
        "full_determinism", "restore_callback_states_from_checkpoint",
    ),
    "arithmetic, memory and speed": (
        "bf16", "fp16", "tf32", "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
        "activation_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode",
        "use_liger_kernel", "liger_kernel_config", "use_cache", "torch_empty_cache_steps", "use_cpu",
        "cast_lm_head_to_fp32", "pad_to_multiple_of", "cache_implementation", "model_init_kwargs",
        "trust_remote_code",
    ),
    "read beside the table, for a flag": ("disable_dropout",),
    "how processes share the work": (
        "average_tokens_across_devices", "accelerator_config", "parallelism_config", "deepspeed", "fsdp", "fsdp_config",
        "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
        "ddp_timeout", "local_rank", "ds3_gather_for_generation", "dataloader_num_workers", "dataloader_pin_memory",
        "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
        "dataloader_in_order",
    ),
    "the engine that samples": (
        "use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_server_base_url",
        "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
        "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size",
        "vllm_importance_sampling_cap", "use_transformers_continuous_batching",
        "transformers_continuous_batching_config", "use_transformers_paged", "max_tool_calling_iterations",
    ),
    "acts through another option, which is judged": (
        "ref_model_mixup_alpha", "ref_model_sync_steps", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta",
        "entropy_target",
    ),
    "not used by GRPO's loss": ("label_smoothing_factor", "label_names", "remove_unused_columns"),
    "evaluation": (
        "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size",
        "prediction_loss_only", "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object",
        "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval",
        "metric_for_best_model", "greater_is_better", "load_best_model_at_end", "num_generations_eval",
    ),
    "logging, saving and publishing": (
        "output_dir", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node",
        "logging_nan_inf_filter", "include_num_input_tokens_seen", "log_level", "log_level_replica", "disable_tqdm",
        "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
        "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit",
        "enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy",
        "hub_always_push", "hub_revision", "debug", "skip_memory_metrics", "log_completions", "log_multimodal",
        "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo",
    ),
}
"""Options of TRL 1.16 without a part in the update, by the reason."""
EARLIER = (
    "overwrite_output_dir", "evaluation_strategy", "no_cuda", "use_mps_device", "per_gpu_train_batch_size",
    "per_gpu_eval_batch_size", "logging_dir", "save_safetensors", "half_precision_backend", "fp16_backend",
    "fp16_opt_level", "use_ipex", "jit_mode_eval", "torchdynamo", "ray_scope", "split_batches", "dispatch_batches",
    "tpu_num_cores", "past_index", "include_tokens_per_second", "include_inputs_for_metrics",
    "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token", "group_by_length", "warmup_ratio",
    "adafactor", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap", "mp_parameters",
    "max_prompt_length", "wandb_log_unique_prompts", "use_liger_loss", "vllm_device", "vllm_dtype",
    "vllm_enable_prefix_caching", "vllm_max_model_len",
)
"""Options of earlier versions without a part in the update."""
MADE = ("mixed_precision", "distributed_state", "fsdp_plugin_args", "deepspeed_plugin", "hf_deepspeed_config")
"""What the trainers' arguments make of themselves."""
# fmt: on


def known_options() -> list[str]:
    """Every option that the table has, once for each entry."""
    judged = (*READ, *SIZES, *UNSUPPORTED, *SAMPLING)
    return [*judged, *(name for names in IRRELEVANT.values() for name in names), *EARLIER, *MADE]
