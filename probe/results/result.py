"""The result of a run: one frozen object, and the mapping that scripts read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probe.results.changes import change_values
from probe.results.diagnostics import batch_sizes, batch_statistics, diagnostics
from probe.verdict.verdict import verdict

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.phases.state import ProbeState


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
        **batch_sizes(state),
        "checkpoint_path": module.config.checkpoint.checkpoint_path,
        "training_step": None if module.files is None else module.files.step,
        "settings": module.sources.as_mapping(),
        "diagnostics": diagnostics(state, module),
        "batch_statistics": batch_statistics(state),
        "timing": dict(state.timing),
    }
    found = verdict(values)
    return {"verdict": found.word, "verdict_reasons": list(found.reasons), **values}
