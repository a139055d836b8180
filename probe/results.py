"""The result of a run: one frozen object, and the mapping that scripts read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from probe.estimators.curvature import eta_10
from probe.estimators.estimate import Estimate, error_method
from probe.estimators.prediction import norm
from probe.from_checkpoint import ORDER_OF_ROWS
from probe.loading import training_dropout
from probe.verdict import verdict

if TYPE_CHECKING:
    from probe.data.batch import RolloutBatch
    from probe.estimators.ground_truth import GroundTruth
    from probe.estimators.prediction import Prediction
    from probe.estimators.update import Rounding
    from probe.module import EntropyProbe
    from probe.state import ProbeState

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


@dataclass(frozen=True)
class ProbeResult:
    """What one run found. `values` has only plain Python types, so that it is JSON as it is.

    Attributes:
        values: the result mapping, see `RESULT_KEYS`.
        config: the resolved configuration of the run, sections as mappings (`trainer` and `seed_everything` included).
        checkpoint_name: short name of the checkpoint (`step_60`), for file names and tables.
        started_at: local date and time of the start, ISO 8601.
    """

    values: Mapping[str, Any]
    config: Mapping[str, Any]
    checkpoint_name: str
    started_at: str


def build_values(state: ProbeState, module: EntropyProbe) -> dict[str, Any]:
    """The result mapping of what has run, verdict included."""
    prediction, truth = state.prediction, state.ground_truth
    suffixes = ("", "_tok") if module.config.importance.report_per_token else ("",)
    rounded = state.update is not None and state.update.rounding is not None
    # the preconditioned direction is not the step that is measured, and the prediction is not of the rounded one
    same_step = module.config.probe_rework.step != "preconditioned" and not rounded
    values = change_values(prediction, truth, suffixes, same_step, rounded)
    if state.update is not None:
        values["learning_rate"] = state.update.learning_rate
    values |= {
        **_batch_sizes(state),
        "checkpoint_path": module.config.checkpoint.checkpoint_path,
        "training_step": None if module.files is None else module.files.step,
        "settings": module.sources.as_mapping(),
        "diagnostics": _diagnostics(state, module),
        "batch_statistics": _batch_statistics(state),
        "timing": dict(state.timing),
    }
    found = verdict(values)
    return {"verdict": found.word, "verdict_reasons": list(found.reasons), **values}


def change_values(
    prediction: Prediction | None,
    truth: GroundTruth | None,
    suffixes: Sequence[str] = ("", "_tok"),
    same_step: bool = True,
    rounded: bool = False,
) -> dict[str, Any]:
    """What prediction and measurement say, and their same-E difference.

    Args:
        prediction: deltaH1, or None.
        truth: deltaH_true, or None.
        suffixes: of the estimands that the measurement is reported for.
        same_step: whether they are about one step, so that their difference means something.
        rounded: whether the measured step is one that the training rounds away.
    """
    values: dict[str, Any] = {}
    if prediction is not None:
        values |= _prediction_values(prediction)
    if truth is not None:
        for which, suffix in enumerate(suffixes):
            values |= _ground_truth_values(truth, which, suffix, rounded)
    if prediction is not None and truth is not None and prediction.estimates and same_step:
        for which, suffix in enumerate(suffixes):
            residual = prediction.estimates["matched"][which] - truth.estimates["snis"][which]
            values |= with_error(f"residual{suffix}", residual)
    values["estimates"] = estimate_rows(prediction, truth, estimands=len(suffixes))
    return values


def estimate_rows(
    prediction: Prediction | None, truth: GroundTruth | None, estimands: int = 2
) -> list[dict[str, Any]]:
    """Every estimate that was made, one row per quantity, estimator and estimand (`sequence`, then `token`)."""
    rows = []
    sources: list[tuple[str, Any, str]] = []
    if prediction is not None and prediction.estimates:
        sources.append(("deltaH1", prediction, "matched"))
    if truth is not None:
        sources.append(("deltaH_true", truth, "snis"))
    for quantity, source, plain in sources:
        for name, both in source.estimates.items():
            for which, estimand in enumerate(("sequence", "token")[:estimands]):
                found, reference = both[which], source.estimates[plain][which]
                rows.append(
                    {
                        "quantity": quantity,
                        "estimand": estimand,
                        "estimator": name,
                        "value": found.value,
                        "se": found.se,
                        "ci95": list(found.ci95),
                        "variance_ratio": (reference.se / found.se) ** 2 if found.se > 0 else None,
                        "reported": name == source.reported,
                    }
                )
    return rows


def _batches(state: ProbeState) -> tuple[RolloutBatch, RolloutBatch]:
    """E and U, which every run draws first."""
    if state.E is None or state.U is None:
        raise RuntimeError("expected E and U, found none; the phase `sample` comes first")
    return state.E, state.U


def with_error(name: str, found: Estimate) -> dict[str, Any]:
    """A value with its error keys."""
    return {name: found.value, f"{name}_se": found.se, f"{name}_ci95": list(found.ci95)}


def _prediction_values(found: Prediction) -> dict[str, Any]:
    """DeltaH1 and its parts, errors, curvature and spread over U, both estimands."""
    values: dict[str, Any] = {}
    for which, suffix in enumerate(("", "_tok")):
        for name in ("bars_dot", "deltaH1", "pathwise", "score"):
            values[name + suffix] = getattr(found, name + suffix)
        name, value = f"deltaH1{suffix}", values[f"deltaH1{suffix}"]
        if found.estimates:
            error = found.estimates[found.reported][which]
            values |= with_error(name, Estimate(value, error.influence))
        if found.sd_U is not None:
            values[f"{name}_sd_U"] = found.sd_U[which]
        if found.deltaH2 is not None:
            second = found.deltaH2[which]
            values |= {
                f"deltaH2{suffix}": second.value,
                f"deltaH2{suffix}_se": second.se,
                f"eta_10{suffix}": _eta_10(found, which, value),
            }
    return values


def _eta_10(found: Prediction, which: int, deltaH1: float) -> float | None:
    """See `eta_10`; null where deltaH1 cannot be told from 0 either."""
    error = Estimate(deltaH1, found.estimates[found.reported][which].influence)
    resolved = error.ci95[0] > 0 or error.ci95[1] < 0
    second = found.deltaH2
    if second is None or not resolved:
        return None
    return eta_10(found.learning_rate, deltaH1, second[which])


def _ground_truth_values(truth: GroundTruth, which: int, suffix: str, rounded: bool) -> dict[str, Any]:
    """One estimand of the measured change; null where it is below the noise floor.

    Of a step that the training rounds away it stays: how little is left of it is what there is to know.
    """
    found, before = (truth.sequence, truth.token)[which], truth.H_orig[which]
    values = with_error(f"deltaH_true{suffix}", found)
    values |= {f"H_orig{suffix}": before, f"H_upd{suffix}": before + found.value}
    if not rounded and truth.noise_floor is not None and abs(found.value) < truth.noise_floor[which]:
        values |= {f"deltaH_true{suffix}": None, f"H_upd{suffix}": None}
    return values


def _batch_sizes(state: ProbeState) -> dict[str, Any]:
    _, sizes = _batches(state)[1].group.unique(return_counts=True)
    uniform = bool((sizes == sizes[0]).all())
    return {"B_E": len(_batches(state)[0]), "B_U": len(sizes), "G": int(sizes[0]) if uniform else None}


def _diagnostics(state: ProbeState, module: EntropyProbe) -> dict[str, Any]:
    from probe.module import ON_POLICY_LIMIT  # the module imports this file

    E, U = _batches(state)
    found: dict[str, Any] = dict(state.diagnostics)
    found |= batch_diagnostics(E)
    if state.ground_truth is not None:
        found |= ground_truth_diagnostics(state.ground_truth)
    if state.update is not None:
        found |= {
            "gradient_norm": state.update.gradient_norm,
            "clip_factor": state.update.clip_factor,
            "step_norm": norm(state.update.step),
        }
        if state.update.rounding is not None:
            found |= rounding_diagnostics(state.update.rounding)
    flags = [*E.bias_flags, *U.bias_flags, *module.sources.flags]
    if U.loss_tokens is not None:  # recorded, in the order of the microbatches
        flags = [flag for flag in flags if flag != ORDER_OF_ROWS]
    if state.prediction is not None:
        found |= derivative_diagnostics(state.prediction)
        if module.config.probe_rework.step == "preconditioned":
            flags.append("preconditioned_step")
    if state.update is not None and not bool(state.update.loss_weights.any()):
        flags.append("no_reward_signal")
    if module.policy.half_precision:
        flags.append("half_precision")
    if state.update is not None and state.update.rounding is not None:
        flags.append("rounded_step")
    if module.optimizer is not None and module.optimizer.schedule_at_zero:
        flags.append("schedule_at_zero")
    dropout = training_dropout(module.policy.model)
    if state.update is not None and dropout > 0 and not module.sources.without_dropout:
        found["dropout"] = dropout
        flags.append("dropout")
    if module.other_base is not None:
        flags.append("another_base")
        found["base_recorded"], found["base_given"] = module.other_base
    if state.shared:
        flags.append("E_shares_U")
    if abs(float(found.get("on_policy_z", 0.0))) > ON_POLICY_LIMIT:
        flags.append("E_not_from_this_policy")
    found["bias_flags"] = list(dict.fromkeys(flags))
    found["rollout_doubts"] = {
        name: doubt_counts(batch)
        for name, batch in (("E", E), ("U", U))
        if batch.doubts or "retokenized" in batch.bias_flags
    }
    return found


def doubt_counts(batch: RolloutBatch) -> dict[str, int]:
    """Responses in all (`of`), and those with each of the doubts that there are."""
    found = Counter(doubt for own in batch.doubts for doubt in own)
    return {"of": len(batch), **dict(sorted(found.items()))}


def batch_diagnostics(E: RolloutBatch) -> dict[str, Any]:
    """What E is worth as a sample."""
    return {
        "truncated_fraction": float(E.truncated.double().mean()),
        "prompts_E": len(E.group.unique()),
        "distinct_responses": len(
            {tuple(row[m].tolist()) for row, m in zip(E.completion_ids, E.mask, strict=True)}
        ),
        "se_method": error_method(E.group),
    }


def rounding_diagnostics(rounding: Rounding) -> dict[str, Any]:
    """What is left of the step in the type that the training keeps its weights in."""
    return {
        "rounded_to": rounding.dtype,
        "rounded_moved": rounding.moved,
        "rounded_moved_exact": rounding.moved_exact,
        "rounded_step_norm": rounding.norm,
    }


def ground_truth_diagnostics(truth: GroundTruth) -> dict[str, Any]:
    """Weights, noise and the estimator in use."""
    weights = truth.weights
    found: dict[str, Any] = {
        "ESS": weights.ess,
        "w_max": weights.w_max,
        "w_min": weights.w_min,
        "pareto_k": weights.pareto_k,
        "pareto_k_good": weights.pareto_k_good,
        "pareto_k_limit": weights.pareto_k_limit,
        "is_mode": truth.reported.removesuffix("+cv"),
    }
    if truth.clipped_fraction is not None:
        found["clipped_fraction"] = truth.clipped_fraction
    if truth.noise_floor is not None:
        found["noise_floor"], found["noise_floor_tok"] = truth.noise_floor
    return found


def derivative_diagnostics(prediction: Prediction) -> dict[str, Any]:
    """How the prediction was differentiated; what does not apply is absent."""
    found = {
        "derivative_mode": prediction.mode,
        "derivative_reason": prediction.reason,
        "derivative_agreement": prediction.agreement,
        "step_difference": prediction.step_difference,
        "step_difference_error": prediction.step_difference_error,
        "difference_scale": prediction.difference_scale,
        "difference_error": prediction.difference_error,
        "second_order_mode": prediction.curvature_mode,
        "control_variates": prediction.control_variates,
    }
    return {name: value for name, value in found.items() if value is not None}


def _batch_statistics(state: ProbeState) -> dict[str, Any]:
    E, U = _batches(state)
    lengths = [E.lengths.double(), U.lengths.double()]
    statistics: dict[str, Any] = {
        "avg_generation_length": (sum(float(x.sum()) for x in lengths)) / sum(len(x) for x in lengths),
        "E": {"length": describe(lengths[0])},
        "U": {"length": describe(lengths[1]), "truncated_fraction": float(U.truncated.double().mean())},
    }
    if state.E_scores is not None:
        statistics["E"]["entropy"] = describe(state.E_scores.sequence_entropy)
    if U.rewards is not None:
        given = U.rewards[~U.rewards.isnan()]  # those to which a reward applies
        statistics["avg_reward"] = float(given.mean())
        statistics["U"]["reward"] = describe(given)
    if U.advantages is not None:
        statistics["U"]["advantage"] = describe(U.advantages)
    return statistics


def describe(values: Tensor) -> dict[str, float]:
    """Mean, standard deviation (0 for a single value), smallest and largest of a tensor's entries."""
    x = values.double()
    std = float(x.std()) if len(x) > 1 else 0.0
    return {"mean": float(x.mean()), "std": std, "min": float(x.min()), "max": float(x.max())}
