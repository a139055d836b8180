"""The configuration schema: one dataclass per section of the YAML, one doc line per field.

The same schema serves the command line (`entropy-probe run --config FILE`), `OfflineEntropyProbe(config)` and
`OfflineEntropyProbe.from_config_file(FILE)`. Values are checked where a section is built; every message names the
key, what was expected and what was found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from probe.errors import ConfigError
from probe.limits import LARGEST_COUNT, LARGEST_SEED
from probe.text import shown

LogLevel = Literal["minimal", "standard", "detailed", "debug"]
LOG_LEVELS: tuple[LogLevel, ...] = ("minimal", "standard", "detailed", "debug")


def _require(condition: bool, key: str, expected: str, found: Any) -> None:
    """Raise `ConfigError` naming `key` unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, found {shown(found, 200)}")


def check_numbers(settings: Any, prefix: str, unbounded: tuple[str, ...] = ()) -> None:
    """Refuse numbers that are not finite, and whole numbers beyond what any run can have.

    Args:
        settings: a dataclass; its annotations say which of its fields are numbers or lists of them.
        prefix: put before the names of the fields in messages.
        unbounded: whole numbers that nothing is made so many times of; they are bounded as seeds are.

    Raises:
        ConfigError: one is.
    """
    for setting in fields(settings):
        found, hint = getattr(settings, setting.name), str(setting.type)
        for value in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if "float" in hint:
                _require(is_finite(value), f"{prefix}{setting.name}", "a finite number", found)
            elif "int" in hint:
                seeds = "seed" in setting.name or setting.name in unbounded
                most = LARGEST_SEED if seeds else LARGEST_COUNT
                _require(value <= most, f"{prefix}{setting.name}", f"an integer of at most {most}", found)


def is_finite(value: float) -> bool:
    """Whether a number is one in floating point; whole numbers can be too large for that.

    >>> is_finite(1.0), is_finite(float("nan")), is_finite(10**400)
    (True, False, False)
    """
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


@dataclass(frozen=True)
class CheckpointConfig:
    """Which policy is probed, and how it is loaded."""

    checkpoint_path: str | None = None
    """Folder of the checkpoint: `.../checkpoint` or `.../checkpoint/model` (with `optimizer.pt` beside `model/`), or a
    flat `checkpoint-N` as transformers' Trainer and TRL write it. `demo` is the built-in demo policy."""
    optimizer_path: str | None = None
    """File with the optimizer's `state_dict`; by default `optimizer.pt` found from `checkpoint_path`."""
    backbone: str | None = None
    """Base model of an adapter: a short name (`qwen2_5_15`), a hub id or a local folder. Default: the adapter's own."""
    tokenizer_path: str | None = None
    """Folder or hub id of the tokenizer; by default the checkpoint's, else the base model's."""
    revision: str | None = None
    """Hub revision of the base model."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Type of the frozen weights. Trainable weights are always kept in float32 or better."""
    load_in_4bit: bool = False
    """Quantise the frozen base with bitsandbytes (QLoRA)."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit data type."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the quantisation constants as well."""
    device_map: str | None = None
    """`device_map` of `from_pretrained` (for example `auto`); by default Fabric's device holds the whole model."""
    attn_implementation: str | None = None
    """Attention implementation of `from_pretrained` (`sdpa`, `eager`, ...); by default the best the model supports."""
    optimizer: Literal["auto", "adam", "adamw"] = "auto"
    """Which rule the saved Adam moments belong to; `auto` reads it from the state (AdamW where it does not say)."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    def __post_init__(self) -> None:
        """Refuse combinations that cannot be loaded."""
        _require(
            not (self.load_in_4bit and self.dtype == "float64"),
            "checkpoint.dtype",
            "float32, bfloat16 or float16 with load_in_4bit",
            self.dtype,
        )


@dataclass(frozen=True)
class BatchConfig:
    """Prompts, rewards and the sizes of the batches E (evaluation) and U (update)."""

    dataset_name: str = "gsm8k_r1_template"
    """`gsm8k_r1_template`, `gsm8k`, `arithmetic` (built in), a hub data set, or a local .jsonl, .parquet or .csv
    file."""
    dataset_config: str | None = None
    """Configuration of a hub data set."""
    dataset_path: str | None = None
    """Read the named data set from this local file or folder instead of the hub."""
    split: str = "test"
    """Split of the data set."""
    prompt_column: str | None = None
    """Column with the prompt or question; by default the named data set's own, else `prompt`, else `question`."""
    answer_column: str | None = None
    """Column with the reference answer; by default the named data set's own, else `answer` where there is one."""
    prompt_template: str | None = None
    """Text in which `{prompt}` is replaced by the prompt column; by default the named data set's own."""
    use_chat_template: bool = False
    """Wrap the prompt as a user message with the tokenizer's chat template."""
    system_prompt: str | None = None
    """System message used with `use_chat_template`."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further options of the chat template, as `chat_template_kwargs` of TRL (`enable_thinking: false`); a column of
    that name in the data comes before it."""
    tools: list[Any] | None = None
    """Tools that the chat template describes: JSON schemas, or functions as `module:function`; a column `tools` in the
    data comes before it."""
    continue_final_message: bool | None = None
    """Continue a conversation that ends with a message of the assistant inside of that message. By default it is; false
    begins a new turn after it, as TRL's GRPOTrainer does."""
    reward: str | list[str] | None = None
    """Registered reward (`exact_number`, `tag_format`, `gsm8k`), or `module:function`; of a list, the weighted sum.
    Default: the named data set's own. Given beside `U_rollouts`, it rewards the responses of a file without rewards."""
    reward_weights: list[float] | None = None
    """Weights of a list of rewards; by default 1 each."""
    reward_columns: list[str] | None = None
    """Columns of a rollout file that add up to the reward; by default `reward` (`score`), else what TRL logs beside
    `advantage`, else the only one there is."""
    E_rollouts: str | None = None
    """Take E from this rollout file (.jsonl or .parquet) instead of sampling."""
    U_rollouts: str | None = None
    """Take U from this rollout file instead of sampling, or from that of the checkpoint's next update in this folder
    (`output/completions` of TRL)."""
    B_E: int = 64
    """Prompts of E, drawn with replacement."""
    G_E: int = 1
    """Responses per prompt of E: `B_E * G_E` in all. More than one pays where prompts differ little or are few."""
    B_U: int = 16
    """Prompts in U."""
    G: int = 8
    """Responses per prompt of U."""
    disjoint: bool = True
    """Draw E and U from disjoint sets of prompts."""
    max_prompt_tokens: int | None = None
    """Refuse prompts with more tokens than this."""

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_numbers(self, "batch_config.")
        _require(self.B_E >= 2, "batch_config.B_E", "an integer of at least 2", self.B_E)
        _require(self.G_E >= 1, "batch_config.G_E", "an integer of at least 1", self.G_E)
        _require(self.B_U >= 1, "batch_config.B_U", "an integer of at least 1", self.B_U)
        _require(
            self.G >= 2 or self.U_rollouts is not None,
            "batch_config.G",
            "an integer of at least 2 (a group of one response has advantage 0)",
            self.G,
        )
        for prompts, group in (("B_E", "G_E"), ("B_U", "G")):
            made = getattr(self, prompts) * getattr(self, group)
            _require(
                made <= LARGEST_COUNT,
                f"batch_config.{prompts} * batch_config.{group}",
                f"at most {LARGEST_COUNT} responses",
                made,
            )
        _require(
            self.prompt_template is None or "{prompt}" in self.prompt_template,
            "batch_config.prompt_template",
            "a text that contains {prompt}",
            self.prompt_template,
        )


@dataclass(frozen=True)
class GenerationConfig:
    """How responses are sampled. The same temperature is used in scoring, so that sampling equals scoring."""

    max_new_tokens: int = 256
    """Responses are cut off after this many tokens; the estimand is the entropy of the capped process."""
    temperature: float = 1.0
    """The probed policy is softmax(logits / temperature), in sampling, log-probs, entropies and loss alike."""
    top_p: float = 1.0
    """Nucleus sampling; below 1 the support is truncated: refused unless `allow_truncated_support`."""
    top_k: int = 0
    """Top-k sampling; 0 is off. Refused unless `allow_truncated_support`."""
    min_p: float = 0.0
    """Min-p sampling; 0 is off. Refused unless `allow_truncated_support`."""
    stop_strings: list[str] = field(default_factory=list)
    """A response ends with the token that completes one of these strings, or with EOS."""
    allow_truncated_support: bool = False
    """Sample with top_p, top_k or min_p all the same; every result is then marked biased."""
    batch_size: int = 64
    """Sequences generated at a time."""

    def __post_init__(self) -> None:
        """Check ranges, and that the sampler draws from the policy that is scored."""
        check_numbers(self, "generation.")
        _require(
            all(self.stop_strings),
            "generation.stop_strings",
            "texts that are not empty (every response ends with an empty one at once)",
            self.stop_strings,
        )
        _require(self.max_new_tokens >= 1, "generation.max_new_tokens", "at least 1", self.max_new_tokens)
        _require(self.temperature > 0, "generation.temperature", "a number above 0", self.temperature)
        _require(0 < self.top_p <= 1, "generation.top_p", "a number in (0, 1]", self.top_p)
        _require(self.top_k >= 0, "generation.top_k", "0 (off) or a positive integer", self.top_k)
        _require(0 <= self.min_p < 1, "generation.min_p", "a number in [0, 1)", self.min_p)
        _require(self.batch_size >= 1, "generation.batch_size", "at least 1", self.batch_size)
        for key, on, off in (
            ("top_p", self.top_p < 1, 1.0),
            ("top_k", self.top_k > 0, 0),
            ("min_p", self.min_p > 0, 0.0),
        ):
            if on and not self.allow_truncated_support:
                raise ConfigError(
                    f"generation.{key}: expected {off} (importance weights and score terms are undefined for tokens "
                    f"outside a truncated support), found {getattr(self, key)}; set "
                    "generation.allow_truncated_support: true to go on with results marked biased"
                )

    @property
    def truncates_support(self) -> bool:
        """Whether the sampler's support is smaller than the scored policy's."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


@dataclass(frozen=True)
class MemoryConfig:
    """What bounds memory. None of it changes a result beyond the last digits."""

    microbatch_size: int = 2
    """Sequences per forward or backward pass."""
    head_chunk_tokens: int = 256
    """Response tokens whose logits over the whole vocabulary are held at a time."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_numbers(self, "memory_config.")
        _require(
            self.microbatch_size >= 1, "memory_config.microbatch_size", "at least 1", self.microbatch_size
        )
        _require(
            self.head_chunk_tokens >= 1,
            "memory_config.head_chunk_tokens",
            "at least 1",
            self.head_chunk_tokens,
        )


@dataclass(frozen=True)
class ProbeReworkConfig:
    """The prediction deltaH1 and the update it is for."""

    compute_delta_h1: bool = True
    """Run phases 1 to 3: the first-order prediction."""
    master_seed: int | None = None
    """Seed of the batches; by default `seed_everything`. The same seed gives the same batches."""
    weighting: Literal["causal", "matched"] = "causal"
    """Score weights of grad H: entropy still to come (`causal`), or the whole sequence's (`matched`)."""
    baseline: Literal["loo_position", "ridge", "none"] = "loo_position"
    """Baseline of the `causal` weights: leave-one-out mean per position, cross-fitted ridge regression, or none."""
    from_checkpoint: Literal["auto", "off"] = "auto"
    """`auto` takes settings of the update that are not given here from the `training_args.bin` of transformers or TRL
    beside the checkpoint, where there is one; `off` leaves that file unread."""
    loss: Literal["grpo", "dr_grpo", "dapo", "reinforce", "bnpo", "cispo", "sapo", "vespo", "luspo"] = "dapo"
    """The policy-gradient loss of the update, by TRL's names and with TRL's default; `reinforce` sums over tokens."""
    advantage: Literal["auto", "grpo", "dr_grpo", "batch"] = "auto"
    """Group advantages: normalised by the group's standard deviation (`grpo`), only centred (`dr_grpo`), or centred and
    normalised by the standard deviation of all rewards of U (`batch`); `auto` takes `dr_grpo` for that loss and `grpo`
    for the others."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Several rewards: add them up and normalise the sum, or normalise each by its group, add up, and normalise that by
    all of U (GDPO; `advantage` does not apply)."""
    clip_range: float = 0.2
    """Lower PPO clip range of the ratio, used where a rollout file gives old log-probs."""
    clip_range_high: float | None = None
    """Upper PPO clip range; by default `clip_range`. The largest weight of `cispo`."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Whose ratio is clipped: a token's, or a whole response's geometric mean (GSPO)."""
    delta: float | None = None
    """Upper bound of the ratio where the advantage is negative too (two-sided clipping); null is none."""
    mask_truncated_completions: bool = False
    """Leave the tokens of responses that the cap cut off out of the loss."""
    top_entropy_quantile: float = 1.0
    """Share of U's tokens, those of highest entropy, that the policy gradient and the entropy bonus act on."""
    sapo_temperature_pos: float = 1.0
    """Temperature of `sapo` where the advantage is positive."""
    sapo_temperature_neg: float = 1.05
    """Temperature of `sapo` elsewhere."""
    vespo_k_pos: float = 2.0
    """Power of the response's ratio in `vespo` where the advantage is not negative."""
    vespo_lambda_pos: float = 3.0
    """Rate of its exponential decay there."""
    vespo_k_neg: float = 3.0
    """Power of the response's ratio in `vespo` where the advantage is negative."""
    vespo_lambda_neg: float = 2.0
    """Rate of its exponential decay there."""
    off_policy_mask_threshold: float | None = None
    """Leave responses of negative advantage out of the policy gradient that the policy has since moved away from: where
    the mean of sampled minus present log-prob is larger than this many nats; null leaves none out."""
    vllm_importance_sampling_correction: bool = True
    """Correct for the engine that sampled, where a rollout file gives its log-probs (`sampling_logprobs`)."""
    vllm_importance_sampling_mode: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "sequence_mask"
    """How: the ratio of each token or of the whole response, clamped to a range or 0 outside of it."""
    vllm_importance_sampling_clip_min: float | None = None
    """Lower end of that range; null is none."""
    vllm_importance_sampling_clip_max: float | None = 3.0
    """Upper end of that range; null is none."""
    per_device_train_batch_size: int | None = None
    """Rows of U per microbatch of a training that accumulates gradients: the token mean of `bnpo`, the entropy bonus
    and the entropy quantile are worked out in each. null: all of U at once."""
    kl_coef: float = 0.0
    """Weight of the KL penalty to the reference policy (the base model without its adapter)."""
    use_bias_correction_kl: bool = True
    """Multiply the KL estimate by the ratio, as TRL does: its gradient is then that of the divergence."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus in the loss: a mean over tokens, whatever the loss."""
    router_aux_loss_coef: float | None = None
    """Weight of the load-balancing loss of a mixture of experts in the update; null takes the model's own, as TRL does
    (most other trainers leave it out: 0)."""
    step: Literal["optimizer", "closed_form", "preconditioned"] = "optimizer"
    """The step that deltaH1 is for: the optimizer's real one, its closed form, or g / (sqrt(v_hat) + eps)."""
    learning_rate: float | None = None
    """Learning rate of the update; by default the one saved in the optimizer's state, where that is 0 an earlier
    one."""
    max_grad_norm: float | None = 1.0
    """Gradient clipping before the step, as in transformers' Trainer; null switches it off."""
    derivative_mode: Literal["auto", "jvp", "reverse", "finite_difference"] = "auto"
    """How deltaH1 is differentiated: forward mode, backward, or differences of forwards (any attention kernel,
    quantised or sharded). `auto` takes the first of these that the model allows."""
    curvature: Literal["auto", "jvp", "finite_difference", "off"] = "auto"
    """The second-order term deltaH2: nested forward mode, or the even part of the measured change; `auto` takes the
    first where `derivative_mode` is `jvp`."""
    control_variates: Literal["auto", "on", "off"] = "auto"
    """Subtract exactly zero-mean terms fitted on other prompts; `auto`: from 256 prompts in E on."""
    control_variates_path: str | None = None
    """File with what earlier batches of the same policy taught the control variates; this run's is added to it."""
    update_spread: bool = True
    """Also report how much deltaH1 varies over update batches of this size (`deltaH1_sd_U`)."""
    derivative_check: bool = True
    """Compare one directional derivative by backward and by finite differences before trusting the gradients."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_numbers(self, "probe_rework.")
        _require(
            self.learning_rate is None or self.learning_rate > 0,
            "probe_rework.learning_rate",
            "a number above 0, or null for the saved one",
            self.learning_rate,
        )
        _require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            "probe_rework.max_grad_norm",
            "a number above 0, or null",
            self.max_grad_norm,
        )
        _require(0 < self.clip_range < 1, "probe_rework.clip_range", "a number in (0, 1)", self.clip_range)
        _require(
            self.clip_range_high is None or self.clip_range_high > 0,
            "probe_rework.clip_range_high",
            "a number above 0, or null",
            self.clip_range_high,
        )
        _require(
            self.delta is None or self.delta > 0,
            "probe_rework.delta",
            "a number above 0, or null",
            self.delta,
        )
        _require(
            0 < self.top_entropy_quantile <= 1,
            "probe_rework.top_entropy_quantile",
            "a number in (0, 1]",
            self.top_entropy_quantile,
        )
        _require(
            self.per_device_train_batch_size is None or self.per_device_train_batch_size >= 1,
            "probe_rework.per_device_train_batch_size",
            "an integer of at least 1, or null",
            self.per_device_train_batch_size,
        )
        for key in ("sapo_temperature_pos", "sapo_temperature_neg"):
            _require(getattr(self, key) > 0, f"probe_rework.{key}", "a number above 0", getattr(self, key))
        _require(
            self.router_aux_loss_coef is None or self.router_aux_loss_coef >= 0,
            "probe_rework.router_aux_loss_coef",
            "a number of at least 0, or null",
            self.router_aux_loss_coef,
        )
        _require(self.kl_coef >= 0, "probe_rework.kl_coef", "a number of at least 0", self.kl_coef)

    @property
    def advantage_kind(self) -> Literal["grpo", "dr_grpo", "batch"]:
        """The advantage that `auto` resolves to."""
        if self.advantage != "auto":
            return self.advantage
        return "dr_grpo" if self.loss == "dr_grpo" else "grpo"


@dataclass(frozen=True)
class ImportanceConfig:
    """The ground truth deltaH_true by importance sampling."""

    enabled: bool = True
    """Run phase 5: take the real step on a snapshot and measure."""
    is_mode: Literal["per_decision", "snis", "resample"] = "per_decision"
    """Estimator: importance weights of prefixes, one weight per sequence (`snis`), or a fresh sample of the new
    policy."""
    clip_log_weight: float | None = None
    """Also estimate with log-weights clamped to +- this many nats, as a sensitivity; biased, never the reported
    value."""
    noise_floor: bool = True
    """Measure what rounding makes of a change of 0 (two scorings of E); a smaller deltaH_true is not resolved."""
    report_per_token: bool = True
    """Report the ground truth in nats per token (`_tok` keys) as well as per response."""
    snapshot_device: str = "cpu"
    """Device that holds the snapshot of the trainable weights and of the optimizer's state."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_numbers(self, "importance.")
        _require(
            self.clip_log_weight is None or self.clip_log_weight > 0,
            "importance.clip_log_weight",
            "a number above 0, or null",
            self.clip_log_weight,
        )


@dataclass(frozen=True)
class DetailedLoggingConfig:
    """The log files of a run."""

    enabled: bool = True
    """Write the log files."""
    level: LogLevel = "standard"
    """`minimal` (~2 KB), `standard` (~15 KB), `detailed` (~500 KB) or `debug` (~MB)."""
    log_sequences: bool | None = None
    """Texts of prompts and responses, from level `detailed` on; by default on there."""
    log_tokens: bool | None = None
    """Token-by-token values, at level `debug`; by default on there."""
    log_raw_tensors: bool | None = None
    """Raw arrays, at level `debug`; by default on there."""
    output_directory: str = "lightning_logs"
    """Folder in which a folder per date is made."""
    compress: bool = True
    """Compress the main log (`.json.gz`)."""
    filename_template: str = "entropy_probe_{time}_{checkpoint}"
    """Name without ending; `{time}`, `{date}`, `{checkpoint}`, `{level}` and `{seed}` are filled in."""
    max_files: int | None = None
    """Keep at most this many runs in `output_directory`; the oldest are deleted. Default: keep all."""

    def __post_init__(self) -> None:
        """Check the template and the count."""
        check_numbers(self, "detailed_logging.")
        _require(
            self.max_files is None or self.max_files >= 1,
            "detailed_logging.max_files",
            "an integer of at least 1, or null",
            self.max_files,
        )
        fields = {"time": "", "date": "", "checkpoint": "", "level": "", "seed": ""}
        try:
            name = self.filename_template.format(**fields)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"detailed_logging.filename_template: expected only the fields {{{'}, {'.join(fields)}}}, "
                f"found {self.filename_template!r} ({error})"
            ) from error
        _require(
            "/" not in name and "\\" not in name and name not in ("", ".", ".."),
            "detailed_logging.filename_template",
            "a file name without folders",
            self.filename_template,
        )


@dataclass(frozen=True)
class OutputConfig:
    """What is written besides the logs."""

    results_path: str | None = None
    """Write the result mapping to this JSON file."""


@dataclass(frozen=True)
class ProbeConfig:
    """All sections that describe a probe (devices and precision belong to `trainer:`, see `ProbeRunner`)."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    batch_config: BatchConfig = field(default_factory=BatchConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    memory_config: MemoryConfig = field(default_factory=MemoryConfig)
    probe_rework: ProbeReworkConfig = field(default_factory=ProbeReworkConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    detailed_logging: DetailedLoggingConfig = field(default_factory=DetailedLoggingConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        """Check what spans sections."""
        if not (self.probe_rework.compute_delta_h1 or self.importance.enabled):
            raise ConfigError(
                "probe_rework.compute_delta_h1 and importance.enabled: expected at least one of them true, found both "
                "false; there is nothing to compute"
            )
