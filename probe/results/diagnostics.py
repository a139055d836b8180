"""What says how good the estimates are."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from probe.estimators.estimate import error_method
from probe.estimators.on_policy import ON_POLICY_LIMIT
from probe.from_checkpoint.sources import ORDER_OF_ROWS
from probe.loading import training_dropout
from probe.parameters import norm

if TYPE_CHECKING:
    from probe.data.batch import RolloutBatch
    from probe.estimators.ground_truth import GroundTruth
    from probe.estimators.prediction import Prediction
    from probe.estimators.rounding import Rounding
    from probe.module import EntropyProbe
    from probe.phases.state import ProbeState


def _batches(state: ProbeState) -> tuple[RolloutBatch, RolloutBatch]:
    """E and U, which every run draws first."""
    if state.E is None or state.U is None:
        raise RuntimeError("expected E and U, found none; the phase `sample` comes first")
    return state.E, state.U


def batch_sizes(state: ProbeState) -> dict[str, Any]:
    """Sequences of E, and groups of U with their size."""
    _, sizes = _batches(state)[1].group.unique(return_counts=True)
    uniform = bool((sizes == sizes[0]).all())
    return {"B_E": len(_batches(state)[0]), "B_U": len(sizes), "G": int(sizes[0]) if uniform else None}


def diagnostics(state: ProbeState, module: EntropyProbe) -> dict[str, Any]:
    """The diagnostics of a run, see `DIAGNOSTIC_KEYS`."""
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
    if state.drawn.shared:
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


def batch_statistics(state: ProbeState) -> dict[str, Any]:
    """Lengths, rewards and advantages of E and U."""
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
