"""Every quantity of a result."""

from __future__ import annotations

RESULT_KEYS: dict[str, str] = {
    "verdict": "trustworthy, caution, unresolved or invalid; see probe.verdict",
    "verdict_reasons": "sentences that say why",
    "deltaH1": "predicted first-order entropy change <grad H, step>, nats per response",
    "deltaH1_se": "standard error of deltaH1 over E, for this very step, nats per response",
    "deltaH1_ci95": "[low, high], deltaH1 minus and plus 1.96 standard errors",
    "deltaH1_sd_U": "standard deviation of deltaH1 over update batches of this size, nats per response",
    "bars_dot": "deltaH1 / learning_rate = <X, Y>, nats per response and unit of learning rate",
    "pathwise": "part of deltaH1 from the entropy of the states visited, nats per response",
    "score": "part of deltaH1 from which states are visited, nats per response",
    "deltaH2": "second-order term 1/2 step' (hess H) step, nats per response",
    "deltaH2_se": "standard error of deltaH2 over E, nats per response",
    "eta_10": "learning rate at which |deltaH2| = 0.1 |deltaH1|; null where either cannot be told from 0",
    "deltaH_true": "measured entropy change H_upd - H_orig, nats per response; null below the noise floor",
    "deltaH_true_se": "standard error of deltaH_true over E, nats per response",
    "deltaH_true_ci95": "[low, high], deltaH_true minus and plus 1.96 standard errors",
    "residual": "same-E difference deltaH1 (matched) - deltaH_true (snis), nats per response: curvature and code "
    "error only; absent with step: preconditioned",
    "residual_se": "standard error of the residual over E, nats per response",
    "residual_ci95": "[low, high], residual minus and plus 1.96 standard errors",
    "estimates": "every estimator of deltaH1 and deltaH_true with value, se, ci95 and variance_ratio (variance of "
    "plain matched or snis over its own)",
    "H_orig": "entropy of a response before the update, nats",
    "H_upd": "entropy of a response after the update, nats: H_orig + deltaH_true",
    "learning_rate": "reference learning rate of the optimizer's groups, the one the step was taken with",
    "B_E": "sequences in E (prompts times G_E)",
    "B_U": "prompts (groups) in U",
    "G": "responses per prompt of U (null where a rollout file has groups of several sizes)",
    "diagnostics": "quality of the estimates, see DIAGNOSTIC_KEYS",
    "batch_statistics": "lengths, rewards and advantages of E and U",
    "settings": "where the settings of the update come from: checkpoint (its training arguments), configuration or "
    "default, each with its values by key; overruled: what the file says where the configuration counts",
    "timing": "seconds per phase that ran, and their total",
    "checkpoint_path": "the checkpoint that was probed",
    "training_step": "its training step, from trainer_state.json or its name; null where neither says",
}
"""Keys of the result mapping. Those in nats per response exist with the suffix `_tok` in nats per token too; the
keys of a phase that did not run are absent."""
DIAGNOSTIC_KEYS: dict[str, str] = {
    "ESS": "effective sample size (sum w)^2 / sum w^2 of the importance weights, at most B_E",
    "w_max": "largest importance weight, their mean being 1",
    "w_min": "smallest importance weight, their mean being 1",
    "truncated_fraction": "share of E cut off by max_new_tokens",
    "prompts_E": "draws of a prompt in E, the independent units of the error bars",
    "distinct_responses": "responses of E that differ from each other; error bars know nothing of those never drawn",
    "zero_advantage_groups": "groups of U with equal rewards throughout: no policy gradient from them",
    "gradient_norm": "norm of the loss's gradient before clipping",
    "clip_factor": "what gradient clipping multiplied it by",
    "step_norm": "norm of the optimizer's step",
    "pareto_k": "shape of the tail of the weights (PSIS); null where it cannot be fitted",
    "pareto_k_good": "whether k is below its limit; null without k",
    "pareto_k_limit": "min(1 - 1 / log10(B_E), 0.7)",
    "clipped_fraction": "share of log-weights that importance.clip_log_weight changed (snis_clipped only)",
    "is_mode": "the estimator that deltaH_true is reported from",
    "noise_floor": "size that a change of 0 can seem to have by rounding, nats per response",
    "noise_floor_tok": "the same in nats per token",
    "se_method": "jackknife (up to 200 prompts) or influence (function)",
    "derivative_mode": "how deltaH1 was differentiated: jvp, reverse or finite_difference",
    "derivative_reason": "why that way",
    "derivative_agreement": "relative difference of deltaH1 by backward and by derivatives per token",
    "step_difference": "relative difference (Euclidean, over tokens of a few responses) of derivatives along the step "
    "and differences of forwards along it",
    "step_difference_error": "the same of these differences and smaller ones: what they may be wrong by",
    "difference_scale": "step of the central difference, in units of the optimizer's step",
    "difference_error": "estimated relative error (Euclidean, over tokens) of derivatives by differences",
    "second_order_mode": "how deltaH2 was computed: jvp (nested) or finite_difference",
    "control_variates": "on or off, and why",
    "derivative_check_error": "relative difference of backward and finite differences on the first microbatch",
    "sampling_scoring_gap": "root mean square difference of log-probs while sampling and scored, nats per token",
    "on_policy_z": "mean of sum_t (l + h) over E in standard errors; 0 in the mean if E comes from the policy",
    "dropout": "largest dropout probability of the policy in training; the probe's update is without",
    "bias_flags": "reasons why the results are biased",
    "rollout_doubts": "of E and U from texts in files: responses (`of`), and how many are uncertain in which way",
}
"""Keys of `diagnostics`; those of a phase that did not run are absent."""
