"""What says how good the estimates are."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from probe.estimand import Number, as_mapping
from probe.estimators.estimate import error_method
from probe.parameters import norm
from probe.results.result import BatchSizes

if TYPE_CHECKING:
    from probe.data.batch import RolloutBatch
    from probe.estimators.ground_truth import GroundTruth
    from probe.estimators.prediction import Prediction
    from probe.phases.update import Update
    from probe.scoring.scores import TokenScores


def batch_sizes(E: RolloutBatch, U: RolloutBatch) -> BatchSizes:
    """Sequences of E, and groups of U with their size."""
    _, sizes = U.group.unique(return_counts=True)
    uniform = bool((sizes == sizes[0]).all())
    return BatchSizes(B_E=len(E), B_U=len(sizes), G=int(sizes[0]) if uniform else None)


def rollout_doubts(E: RolloutBatch, U: RolloutBatch) -> dict[str, dict[str, int]]:
    """What texts in files leave uncertain of the batches that were read from some."""
    return {
        name: doubt_counts(batch)
        for name, batch in (("E", E), ("U", U))
        if batch.doubts or "retokenized" in batch.bias_flags
    }


def doubt_counts(batch: RolloutBatch) -> dict[str, int]:
    """Responses in all (`of`), and those with each of the doubts that there are."""
    values = Counter(doubt for own in batch.doubts for doubt in own)
    return {"of": len(batch), **dict(sorted(values.items()))}


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


def update_diagnostics(update: Update) -> dict[str, Any]:
    """Norms of the update, and what is left of the step in the type that the training keeps its weights in."""
    values = {
        "gradient_norm": update.gradient_norm,
        "clip_factor": update.clip_factor,
        "step_norm": norm(update.step),
    }
    if update.rounding is None:
        return values
    return values | {
        "rounded_to": update.rounding.dtype,
        "rounded_moved": update.rounding.moved,
        "rounded_moved_exact": update.rounding.moved_exact,
        "rounded_step_norm": update.rounding.norm,
    }


def ground_truth_diagnostics(truth: GroundTruth) -> dict[str, Any]:
    """Weights, noise and the estimator in use."""
    weights = truth.weights
    values: dict[str, Any] = {
        "ESS": weights.ess,
        "w_max": weights.w_max,
        "w_min": weights.w_min,
        "pareto_k": weights.pareto_k,
        "pareto_k_good": weights.pareto_k_good,
        "pareto_k_limit": weights.pareto_k_limit,
        "is_mode": truth.reported.removesuffix("+cv"),
    }
    if truth.clipped_fraction is not None:
        values["clipped_fraction"] = truth.clipped_fraction
    if truth.noise_floor is not None:
        values |= as_mapping({"noise_floor": truth.noise_floor.size.map(Number)})
        values["noise_floor_responses"] = truth.noise_floor.responses
    return values


def derivative_diagnostics(prediction: Prediction) -> dict[str, Any]:
    """How the prediction was differentiated; what does not apply is absent."""
    values = {
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
    return {name: value for name, value in values.items() if value is not None}


def batch_statistics(E: RolloutBatch, U: RolloutBatch, E_scores: TokenScores | None) -> dict[str, Any]:
    """Lengths, rewards and advantages of E and U."""
    lengths = [E.lengths.double(), U.lengths.double()]
    statistics: dict[str, Any] = {
        "avg_generation_length": (sum(float(x.sum()) for x in lengths)) / sum(len(x) for x in lengths),
        "E": {"length": mean_and_extremes(lengths[0])},
        "U": {
            "length": mean_and_extremes(lengths[1]),
            "truncated_fraction": float(U.truncated.double().mean()),
        },
    }
    if E_scores is not None:
        statistics["E"]["entropy"] = mean_and_extremes(E_scores.sequence_entropy)
    if U.rewards is not None:
        given = U.rewards[~U.rewards.isnan()]  # those to which a reward applies
        statistics["avg_reward"] = float(given.mean())
        statistics["U"]["reward"] = mean_and_extremes(given)
    if U.advantages is not None:
        statistics["U"]["advantage"] = mean_and_extremes(U.advantages)
    return statistics


def mean_and_extremes(values: Tensor) -> dict[str, float]:
    """Mean, standard deviation (0 for a single value), smallest and largest of a tensor's entries."""
    x = values.double()
    std = float(x.std()) if len(x) > 1 else 0.0
    return {"mean": float(x.mean()), "std": std, "min": float(x.min()), "max": float(x.max())}
