"""Every diagnostic of a result, in the order of reports and logs."""

from __future__ import annotations

from probe.estimand import ESTIMANDS
from probe.results.quantity import Quantity, Shown

DIAGNOSTICS: tuple[Quantity, ...] = (
    Quantity(
        "ESS",
        "effective sample size (sum w)^2 / sum w^2 of the importance weights, at most B_E",
        metric=5,
        core=True,
        row=Shown(
            "ESS of E", "number", "reweighted, E is worth this many responses; close to all is good", of="B_E"
        ),
        live="effective sample size of the importance weights, at most B_E",
    ),
    Quantity(
        "pareto_k",
        "shape of the tail of the weights (PSIS); null where it cannot be fitted",
        metric=6,
        core=True,
        row=Shown("Pareto k", "pareto", "tail of the weights; below the limit is good"),
        live="shape of the tail of the importance weights; absent where it cannot be fitted",
    ),
    Quantity("pareto_k_good", "whether k is below its limit; null without k"),
    Quantity("pareto_k_limit", "min(1 - 1 / log10(B_E), 0.7)"),
    Quantity(
        "w_min",
        "smallest importance weight, their mean being 1",
        row=Shown("weights", "weights", "smallest and largest importance weight; close to 1 is good"),
    ),
    Quantity("w_max", "largest importance weight, their mean being 1"),
    Quantity(
        "clipped_fraction",
        "share of log-weights that importance.clip_log_weight changed (snis_clipped only)",
        row=Shown("clipped", "share", "weights clipped in the row snis_clipped; in no other"),
    ),
    Quantity(
        "noise_floor",
        "size that a change of 0 can seem to have by rounding, nats per response",
        per_token=True,
        core=True,
        row=Shown("noise floor", "floor", "rounding: a smaller deltaH_true is not resolved"),
        live="size that a change of 0 can seem to have by rounding, nats per token",
    ),
    Quantity(
        "noise_floor_responses",
        "responses of E scored again for the noise floor; of fewer than all it is an upper bound",
        integer=True,
        row=Shown(
            "  from", "count", "responses scored again for it; of a part of E it is an upper bound", of="B_E"
        ),
    ),
    Quantity(
        "derivative_mode",
        "how deltaH1 was differentiated: jvp, reverse or finite_difference",
        row=Shown("derivative", "derivative", "how deltaH1 was differentiated"),
    ),
    Quantity("derivative_reason", "why that way"),
    Quantity(
        "X_responses",
        "responses of E that the entropy's gradient was taken from: all, or those that deltaH1_sd_U needs",
        integer=True,
    ),
    Quantity(
        "derivative_agreement",
        "relative difference of deltaH1 by backward and by derivatives per token",
        row=Shown(
            "  agreement", "difference", "relative difference of deltaH1 by two methods; close to 0 is good"
        ),
    ),
    Quantity(
        "step_difference",
        "relative difference (Euclidean, over tokens of a few responses) of derivatives along the step and differences "
        "of forwards along it",
        row=Shown(
            "  forwards", "difference", "relative difference from differences of forwards along the step"
        ),
    ),
    Quantity(
        "step_difference_error",
        "the same of these differences and smaller ones: what they may be wrong by",
    ),
    Quantity("difference_scale", "step of the central difference, in units of the optimizer's step"),
    Quantity(
        "difference_error",
        "estimated relative error (Euclidean, over tokens) of derivatives by differences",
        row=Shown("  differences", "difference", "estimated relative error of the finite differences"),
    ),
    Quantity(
        "second_order_mode",
        "how deltaH2 was computed: jvp (nested) or finite_difference",
        row=Shown("second order", "words", "how deltaH2 was differentiated"),
    ),
    Quantity(
        "passes_E",
        "passes over E, in forwards and backwards over all of it; sampling and checks on a few responses apart",
        row=Shown("passes", "passes", "one: a forward and backward of all responses; without sampling"),
    ),
    Quantity("passes_U", "the same over U"),
    Quantity("threads", "threads of torch's operators, as configured or chosen by a trial", integer=True),
    Quantity("processes", "processes that sampling and passes were shared out to", integer=True),
    Quantity(
        "continuous_batching",
        "responses drawn by continuous batching, as configured or chosen by a trial; the others are from generate",
        integer=True,
    ),
    Quantity(
        "tokens_per_microbatch",
        "tokens that went through the model at a time, padding included, as configured or chosen by a trial; absent "
        "where sequences were counted",
        integer=True,
    ),
    Quantity(
        "is_mode",
        "the estimator that deltaH_true is reported from",
        row=Shown("measured by", "estimator", ""),
    ),
    Quantity(
        "se_method",
        "jackknife (up to 200 prompts) or influence (function)",
        row=Shown("error bars", "name", "how standard errors were computed, prompt by prompt"),
    ),
    Quantity(
        "control_variates",
        "on or off, and why",
        row=Shown("controls", "switch", "control variates"),
    ),
    Quantity(
        "truncated_fraction",
        "share of E cut off by max_new_tokens",
        row=Shown("truncated", "share", "responses that the token limit cut off"),
        live="share of E cut off by max_new_tokens",
    ),
    Quantity("prompts_E", "draws of a prompt in E, the independent units of the error bars"),
    Quantity(
        "distinct_responses",
        "responses of E that differ from each other; error bars know nothing of those never drawn",
        integer=True,
        row=Shown("distinct", "count", "responses of E that differ from each other", of="B_E"),
        live="responses of E that differ from each other; error bars know nothing of those never drawn",
    ),
    Quantity(
        "zero_advantage_groups",
        "groups of U with equal rewards throughout: no policy gradient from them",
        integer=True,
        row=Shown("no signal", "count", "prompts of U with equal rewards throughout: no gradient", of="B_U"),
    ),
    Quantity("gradient_norm", "norm of the loss's gradient before clipping"),
    Quantity("clip_factor", "what gradient clipping multiplied it by"),
    Quantity("step_norm", "norm of the optimizer's step", live="Euclidean norm of the step"),
    Quantity(
        "derivative_check_error",
        "relative difference of backward and finite differences on a few responses",
    ),
    Quantity(
        "sampling_scoring_gap",
        "root mean square difference of log-probs while sampling and scored, nats per token",
    ),
    Quantity(
        "on_policy_z",
        "mean of sum_t (l + h) over E in standard errors; 0 in the mean if E comes from the policy",
    ),
    Quantity(
        "dropout", "largest dropout probability of the policy in training; the probe's update is without"
    ),
    Quantity("rounded_to", "type that the training keeps its weights in, where its step is rounded"),
    Quantity("rounded_moved", "share of the weights in that type that the training's step moves"),
    Quantity("rounded_moved_exact", "share that the exact step moves"),
    Quantity("rounded_step_norm", "norm of what is left of the step in that type"),
    Quantity(
        "base_recorded", "base model that the adapter says it was trained on, where it is put on another one"
    ),
    Quantity("base_given", "the one it is put on"),
    Quantity(
        "bias_flags",
        "reasons why the results are biased",
        core=True,
        row=Shown("bias flags", "flags", "known reasons why these numbers are biased"),
    ),
    Quantity(
        "rollout_doubts",
        "of E and U from texts in files: responses (`of`), and how many are uncertain in which way",
    ),
)
"""Of `diagnostics`."""
DIAGNOSTIC_KEYS: dict[str, str] = {
    estimand.key(one.key): one.words if not estimand.suffix else "the same in nats per token"
    for one in DIAGNOSTICS
    for estimand in reversed(ESTIMANDS)
    if one.per_token or not estimand.suffix
}
"""Keys of `diagnostics`; those of a phase that did not run are absent."""
