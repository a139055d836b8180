"""From what the phases of a run have produced to its result."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from probe.estimators.on_policy import ON_POLICY_LIMIT
from probe.from_checkpoint.sources import ORDER_OF_ROWS
from probe.loading import training_dropout
from probe.results.changes import changes
from probe.results.diagnostics import (
    batch_diagnostics,
    batch_sizes,
    batch_statistics,
    derivative_diagnostics,
    ground_truth_diagnostics,
    rollout_doubts,
    update_diagnostics,
)
from probe.results.result import ProbeResult

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.phases.state import ProbeState


def build_result(
    state: ProbeState, module: EntropyProbe, config: Mapping[str, Any], started_at: datetime
) -> ProbeResult:
    """The result of what has run.

    Args:
        state: what the phases have produced.
        module: the policy that was probed.
        config: the resolved configuration.
        started_at: start of the run, local time.

    Raises:
        RuntimeError: there are no batches: the phase `sample` did not run.
    """
    E, U, update = state.drawn.E, state.drawn.U, state.update
    rounded = update is not None and update.rounding is not None
    # the preconditioned direction is not the step that is measured, and the prediction is not of the rounded one
    same_step = module.config.probe_rework.step != "preconditioned" and not rounded
    per_token = module.config.importance.report_per_token
    return ProbeResult(
        changes=changes(state.prediction, state.ground_truth, per_token, same_step, rounded),
        sizes=batch_sizes(E, U),
        diagnostics=_diagnostics(state, module) | {"rollout_doubts": rollout_doubts(E, U)},
        batch_statistics=batch_statistics(E, U, state.E_scores),
        settings=module.sources.as_mapping(),
        timing=dict(state.timing),
        learning_rate=None if update is None else update.learning_rate,
        training_step=None if module.files is None else module.files.step,
        checkpoint_path=module.config.checkpoint.checkpoint_path,
        checkpoint_name="policy" if module.files is None else module.files.name,
        config=config,
        started_at=started_at.isoformat(timespec="seconds"),
    )


def _diagnostics(state: ProbeState, module: EntropyProbe) -> dict[str, Any]:
    """How good the estimates are, and why they are biased, see `DIAGNOSTIC_KEYS`."""
    found = {**state.diagnostics, **batch_diagnostics(state.drawn.E)}
    if state.ground_truth is not None:
        found |= ground_truth_diagnostics(state.ground_truth)
    if state.update is not None:
        found |= update_diagnostics(state.update)
        dropout = training_dropout(module.policy.model)
        if dropout > 0 and not module.sources.without_dropout:
            found["dropout"] = dropout
    if state.prediction is not None:
        found |= derivative_diagnostics(state.prediction)
    if module.other_base is not None:
        found["base_recorded"], found["base_given"] = module.other_base
    return found | {"bias_flags": list(dict.fromkeys(_bias_flags(state, module, found)))}


def _bias_flags(state: ProbeState, module: EntropyProbe, found: dict[str, Any]) -> list[str]:
    """Reasons why the results are biased."""
    E, U, update = state.drawn.E, state.drawn.U, state.update
    flags = [*E.bias_flags, *U.bias_flags, *module.sources.flags]
    if U.loss_tokens is not None:  # recorded, in the order of the microbatches
        flags = [flag for flag in flags if flag != ORDER_OF_ROWS]
    raised = {
        "preconditioned_step": state.prediction is not None
        and module.config.probe_rework.step == "preconditioned",
        "no_reward_signal": update is not None and not bool(update.loss_weights.any()),
        "half_precision": module.policy.half_precision,
        "rounded_step": update is not None and update.rounding is not None,
        "schedule_at_zero": module.optimizer is not None and module.optimizer.schedule_at_zero,
        "dropout": "dropout" in found,
        "another_base": module.other_base is not None,
        "E_shares_U": state.drawn.shared > 0,
        "E_not_from_this_policy": abs(float(found.get("on_policy_z", 0.0))) > ON_POLICY_LIMIT,
    }
    return [*flags, *(flag for flag, there in raised.items() if there)]
