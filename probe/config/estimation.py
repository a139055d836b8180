"""The update, its prediction and its measurement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from probe.config.losses import Loss, RatioLevel, SamplerMode
from probe.config.numbers import check_numbers
from probe.errors.exceptions import require


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
    loss: Loss = "dapo"
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
    importance_sampling_level: RatioLevel = "token"
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
    vllm_importance_sampling_mode: SamplerMode = "sequence_mask"
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
    """The second-order term deltaH2: nested forward mode, or the even part of the change over both sides of the step;
    `auto` takes the second, and the first where differences do not give the step's derivatives to 5 %."""
    control_variates: Literal["auto", "on", "off"] = "auto"
    """Subtract exactly zero-mean terms fitted on other prompts; `auto`: from 64 prompts in E on."""
    control_variates_path: str | None = None
    """File with what earlier batches of the same policy taught the control variates; this run's is added to it."""
    update_spread: bool = True
    """Also report how much deltaH1 varies over update batches of this size (`deltaH1_sd_U`), with X from some of E."""
    derivative_check: bool = True
    """Compare one directional derivative by backward and by finite differences before trusting the gradients."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_numbers(self, "probe_rework.")
        require(
            self.learning_rate is None or self.learning_rate > 0,
            "probe_rework.learning_rate",
            "a number above 0, or null for the saved one",
            self.learning_rate,
        )
        require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            "probe_rework.max_grad_norm",
            "a number above 0, or null",
            self.max_grad_norm,
        )
        require(0 < self.clip_range < 1, "probe_rework.clip_range", "a number in (0, 1)", self.clip_range)
        require(
            self.clip_range_high is None or self.clip_range_high > 0,
            "probe_rework.clip_range_high",
            "a number above 0, or null",
            self.clip_range_high,
        )
        require(
            self.delta is None or self.delta > 0,
            "probe_rework.delta",
            "a number above 0, or null",
            self.delta,
        )
        require(
            0 < self.top_entropy_quantile <= 1,
            "probe_rework.top_entropy_quantile",
            "a number in (0, 1]",
            self.top_entropy_quantile,
        )
        require(
            self.per_device_train_batch_size is None or self.per_device_train_batch_size >= 1,
            "probe_rework.per_device_train_batch_size",
            "an integer of at least 1, or null",
            self.per_device_train_batch_size,
        )
        for key in ("sapo_temperature_pos", "sapo_temperature_neg"):
            require(getattr(self, key) > 0, f"probe_rework.{key}", "a number above 0", getattr(self, key))
        require(
            self.router_aux_loss_coef is None or self.router_aux_loss_coef >= 0,
            "probe_rework.router_aux_loss_coef",
            "a number of at least 0, or null",
            self.router_aux_loss_coef,
        )
        require(self.kl_coef >= 0, "probe_rework.kl_coef", "a number of at least 0", self.kl_coef)

    @property
    def advantage_kind(self) -> Literal["grpo", "dr_grpo", "batch"]:
        """The advantage that `auto` resolves to."""
        if self.advantage != "auto":
            return self.advantage
        return "dr_grpo" if self.loss == "dr_grpo" else "grpo"

    @property
    def predicts_a_step(self) -> bool:
        """Whether deltaH1 is that of a step that an optimizer takes, and not of the preconditioned gradient."""
        return self.step != "preconditioned"


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
        require(
            self.clip_log_weight is None or self.clip_log_weight > 0,
            "importance.clip_log_weight",
            "a number above 0, or null",
            self.clip_log_weight,
        )
