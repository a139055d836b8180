"""From what the phases of a run have produced to its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from probe.estimators.on_policy import ON_POLICY_LIMIT
from probe.files.strict_json import to_plain
from probe.from_checkpoint.sources import ORDER_OF_ROWS
from probe.results.attribution import attribution_values, what_if_values
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
from probe.results.provenance import Provenance
from probe.results.result import ProbeResult

if TYPE_CHECKING:
    from probe.phases.state import ProbeState


def build_result(
    state: ProbeState,
    provenance: Provenance,
    config: Mapping[str, Any],
    started_at: datetime,
    token_text: Callable[[int], str] | None = None,
) -> ProbeResult:
    """The result of what has run.

    Args:
        state: what the phases have produced.
        provenance: of what, and how.
        config: the resolved configuration.
        started_at: start of the run, local time.
        token_text: the text of a token id; without it tokens have only ids.

    Raises:
        RuntimeError: there are no batches: the phase `sample` did not run.
    """
    E, U, update = state.drawn.E, state.drawn.U, state.update
    rounded = update is not None and update.rounding is not None
    # the preconditioned direction is not the step that is measured, and the prediction is not of the rounded one
    same_step = not provenance.preconditioned and not rounded
    return ProbeResult(
        changes=changes(state.prediction, state.ground_truth, provenance.per_token, same_step, rounded),
        sizes=batch_sizes(E, U),
        diagnostics=_diagnostics(state, provenance) | {"rollout_doubts": rollout_doubts(E, U)},
        batch_statistics=batch_statistics(E, U, state.E_scores),
        settings=provenance.sources.as_mapping(),
        timing=dict(state.timing),
        throughput=state.throughput,
        learning_rate=None if update is None else update.learning_rate,
        training_step=provenance.training_step,
        checkpoint_path=provenance.checkpoint_path,
        checkpoint_name=provenance.checkpoint_name,
        config=config,
        started_at=started_at.isoformat(timespec="seconds"),
        attribution=_attribution(state, token_text),
        what_if=None if state.what_if is None else to_plain(what_if_values(state.what_if)),
    )


def _attribution(state: ProbeState, token_text: Callable[[int], str] | None) -> Mapping[str, Any] | None:
    """The key `attribution`; None where there is none."""
    if state.attribution is None:
        return None
    prediction, off = state.prediction, None
    if prediction is not None and prediction.reported.endswith("+cv"):
        plain = prediction.estimates[prediction.reported.removesuffix("+cv")]
        off = plain.with_other(
            lambda own, less: own.value - less.value, prediction.estimates[prediction.reported]
        )
    top = state.drawn.config.attribution.top
    found: dict[str, Any] = to_plain(
        attribution_values(state.attribution, state.drawn.U, off, top, token_text)
    )
    return found


def _diagnostics(state: ProbeState, provenance: Provenance) -> dict[str, Any]:
    """How good the estimates are, and why they are biased, see `DIAGNOSTIC_KEYS`."""
    diagnostics = {**state.diagnostics, **batch_diagnostics(state.drawn.E)}
    if state.ground_truth is not None:
        diagnostics |= ground_truth_diagnostics(state.ground_truth)
    if state.update is not None:
        diagnostics |= update_diagnostics(state.update)
        if provenance.dropout > 0:
            diagnostics["dropout"] = provenance.dropout
    if state.prediction is not None:
        diagnostics |= derivative_diagnostics(state.prediction)
    if provenance.other_base is not None:
        diagnostics["base_recorded"], diagnostics["base_given"] = provenance.other_base
    return diagnostics | {"bias_flags": list(dict.fromkeys(_bias_flags(state, provenance, diagnostics)))}


def _bias_flags(state: ProbeState, provenance: Provenance, diagnostics: dict[str, Any]) -> list[str]:
    """Reasons why the results are biased."""
    E, U, update = state.drawn.E, state.drawn.U, state.update
    flags = [*E.bias_flags, *U.bias_flags, *provenance.sources.flags]
    if U.loss_tokens is not None:  # recorded, in the order of the microbatches
        flags = [flag for flag in flags if flag != ORDER_OF_ROWS]
    raised = {
        "preconditioned_step": state.prediction is not None and provenance.preconditioned,
        "no_reward_signal": update is not None and not bool(update.loss_weights.any()),
        "half_precision": provenance.half_precision,
        "rounded_step": update is not None and update.rounding is not None,
        "schedule_at_zero": provenance.schedule_at_zero,
        "dropout": "dropout" in diagnostics,
        "another_base": provenance.other_base is not None,
        "E_shares_U": state.drawn.shared > 0,
        "E_not_from_this_policy": abs(float(diagnostics.get("on_policy_z", 0.0))) > ON_POLICY_LIMIT,
    }
    return [*flags, *(flag for flag, there in raised.items() if there)]
