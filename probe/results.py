"""The result of a run: one frozen object, and the mapping that scripts read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from probe.data.batch import RolloutBatch
    from probe.estimators.snis import GroundTruth
    from probe.module import EntropyProbe
    from probe.state import ProbeState

RESULT_KEYS: dict[str, str] = {
    "deltaH1": "predicted first-order entropy change <grad H, step>, nats per response",
    "bars_dot": "deltaH1 / learning_rate = <X, Y>, nats per response and unit of learning rate",
    "pathwise": "part of deltaH1 from the entropy of the states visited, nats per response",
    "score": "part of deltaH1 from which states are visited, nats per response",
    "deltaH_true": "measured entropy change H_upd - H_orig on the same E, nats per response",
    "deltaH_true_se": "standard error of deltaH_true over E, nats per response",
    "deltaH_true_ci95": "[low, high], deltaH_true minus and plus 1.96 standard errors",
    "residual": "deltaH1 - deltaH_true, nats per response; absent with step: preconditioned",
    "H_orig": "entropy of a response before the update, nats",
    "H_upd": "entropy of a response after the update, nats",
    "learning_rate": "reference learning rate of the optimizer's groups, the one the step was taken with",
    "B_E": "sequences in E",
    "B_U": "prompts (groups) in U",
    "G": "responses per prompt of U (null where a rollout file has groups of several sizes)",
    "diagnostics": "quality of the estimates, see DIAGNOSTIC_KEYS",
    "batch_statistics": "lengths, rewards and advantages of E and U",
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
    "distinct_responses": "responses of E that differ from each other; error bars know nothing of those never drawn",
    "zero_advantage_groups": "groups of U with equal rewards throughout: no policy gradient from them",
    "gradient_norm": "norm of the loss's gradient before clipping",
    "clip_factor": "what gradient clipping multiplied it by",
    "step_norm": "norm of the optimizer's step",
    "derivative_mode": "how deltaH1 was differentiated",
    "derivative_check_error": "relative difference of backward and finite differences on the first microbatch",
    "sampling_scoring_gap": "root mean square difference of log-probs while sampling and scored, nats per token",
    "on_policy_z": "mean of sum_t (l + h) over E in standard errors; 0 in the mean if E comes from the policy",
    "bias_flags": "reasons why the results are biased",
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
    """The result mapping of what has run."""
    values: dict[str, Any] = {}
    if state.prediction is not None:
        values |= _prediction_values(state)
    if state.ground_truth is not None:
        values |= _ground_truth_values(
            state.ground_truth, per_token=module.config.importance.report_per_token
        )
    same_step = module.config.probe_rework.step != "preconditioned"  # which is not the step that is measured
    for suffix in ("", "_tok"):
        if same_step and f"deltaH1{suffix}" in values and f"deltaH_true{suffix}" in values:
            values[f"residual{suffix}"] = values[f"deltaH1{suffix}"] - values[f"deltaH_true{suffix}"]
    if state.update is not None:
        values["learning_rate"] = state.update.learning_rate
    return values | {
        **_batch_sizes(state),
        "checkpoint_path": module.config.checkpoint.checkpoint_path,
        "training_step": None if module.files is None else module.files.step,
        "diagnostics": _diagnostics(state, module),
        "batch_statistics": _batch_statistics(state),
        "timing": dict(state.timing),
    }


def _batches(state: ProbeState) -> tuple[RolloutBatch, RolloutBatch]:
    """E and U, which every run draws first."""
    if state.E is None or state.U is None:
        raise RuntimeError("expected E and U, found none; the phase `sample` comes first")
    return state.E, state.U


def _prediction_values(state: ProbeState) -> dict[str, Any]:
    names = ("bars_dot", "deltaH1", "pathwise", "score")
    return {
        f"{name}{suffix}": getattr(state.prediction, name + suffix)
        for suffix in ("", "_tok")
        for name in names
    }


def _ground_truth_values(truth: GroundTruth, per_token: bool) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for suffix, change in (("", truth.sequence), ("_tok", truth.token)):
        if suffix and not per_token:
            continue
        values |= {
            f"H_orig{suffix}": change.H_orig,
            f"H_upd{suffix}": change.H_upd,
            f"deltaH_true{suffix}": change.delta,
            f"deltaH_true{suffix}_se": change.se,
            f"deltaH_true{suffix}_ci95": list(change.ci95),
        }
    return values


def _batch_sizes(state: ProbeState) -> dict[str, Any]:
    _, sizes = _batches(state)[1].group.unique(return_counts=True)
    uniform = bool((sizes == sizes[0]).all())
    return {"B_E": len(_batches(state)[0]), "B_U": len(sizes), "G": int(sizes[0]) if uniform else None}


def _diagnostics(state: ProbeState, module: EntropyProbe) -> dict[str, Any]:
    from probe.module import ON_POLICY_LIMIT  # the module imports this file

    E, U = _batches(state)
    found: dict[str, Any] = dict(state.diagnostics)
    found["truncated_fraction"] = float(E.truncated.double().mean())
    found["distinct_responses"] = len(
        {tuple(row[m].tolist()) for row, m in zip(E.completion_ids, E.mask, strict=True)}
    )
    if state.ground_truth is not None:
        truth = state.ground_truth
        found |= {"ESS": truth.ess, "w_max": truth.w_max, "w_min": truth.w_min}
    if state.update is not None:
        squares = sum(float(change.double().square().sum()) for change in state.update.step.values())
        found |= {
            "gradient_norm": state.update.gradient_norm,
            "clip_factor": state.update.clip_factor,
            "step_norm": squares**0.5,
        }
    flags = [*E.bias_flags, *U.bias_flags]
    if state.prediction is not None:
        found["derivative_mode"] = "reverse"
        if module.config.probe_rework.step == "preconditioned":
            flags.append("preconditioned_step")
    if state.update is not None and not bool(state.update.loss_weights.any()):
        flags.append("no_reward_signal")
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in module.policy.model.parameters()):
        flags.append("half_precision")
    if abs(float(found.get("on_policy_z", 0.0))) > ON_POLICY_LIMIT:
        flags.append("E_not_from_this_policy")
    found["bias_flags"] = list(dict.fromkeys(flags))
    return found


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
        statistics["avg_reward"] = float(U.rewards.mean())
        statistics["U"]["reward"] = describe(U.rewards)
    if U.advantages is not None:
        statistics["U"]["advantage"] = describe(U.advantages)
    return statistics


def describe(values: Tensor) -> dict[str, float]:
    """Mean, standard deviation (0 for a single value), smallest and largest of a tensor's entries."""
    x = values.double()
    std = float(x.std()) if len(x) > 1 else 0.0
    return {"mean": float(x.mean()), "std": std, "min": float(x.min()), "max": float(x.max())}
