"""What momentum and weight decay contribute to the deltaH1 of a step that was taken, and its own gradient: the rest."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.estimand import Number, as_mapping
from probe.estimators.estimate import Estimate, Estimates
from probe.estimators.prediction import Prediction, token_first_order
from probe.estimators.step_parts import StepParts
from probe.phases.controls import controls_of_prediction, fitted_controls
from probe.phases.fit_memory import FitMemory
from probe.phases.passes import AlongStep, tangents_along
from probe.results.changes import reported
from probe.scoring.policy import Policy


def part_changes(
    parts: StepParts | str,
    policy: Policy,
    E: RolloutBatch,
    step: Mapping[str, Tensor],
    passes: AlongStep,
    prediction: Prediction,
    memory: FitMemory | None,
    draw: str,
) -> dict[str, Any]:
    """The values of the parts, nats per response and (`_tok`) per token, with errors, and as shares of deltaH1.

    Where the parts are not known, `shares_reason` says why.

    Args:
        parts: of the step, or why they are not known.
        policy: at the parameters before it.
        E: the evaluation batch.
        step: by parameter name.
        passes: over E along the step.
        prediction: of the whole step.
        memory: for control variates of each part; None where the prediction has none.
        draw: where E comes from.
    """
    if isinstance(parts, str):
        return {"shares_reason": parts}
    basis = None if memory is None else memory.basis
    total = prediction.estimates[prediction.reported]
    rest = total
    values: dict[str, Any] = {"shares_error": parts.error}
    for name, direction in _directions(parts).items():
        of_part = rest.map(lambda one: Estimate(0.0, torch.zeros_like(one.influence)))
        if any(bool(x.any()) for x in direction.values()):
            tangents = tangents_along(policy, E, direction, step, passes, basis)
            along = AlongStep(passes.scores, tangents, passes.way)
            of_part = token_first_order(passes.scores, tangents, E.group).total
            if memory is not None:
                Z = controls_of_prediction(fitted_controls(E, along, memory, draw), along, E.group)
                of_part = of_part.with_other(operator.sub, Z)
        rest = rest.with_other(operator.sub, of_part)
        values |= _part_values(name, of_part, total)
    return values | _part_values("gradient", rest, total)


def _directions(parts: StepParts) -> dict[str, Mapping[str, Tensor]]:
    """The parts of a step that have a direction of their own; decay's is 0 where there is none."""
    zero = {name: torch.zeros_like(x) for name, x in parts.momentum.items()}
    return {"momentum": parts.momentum, "decay": parts.decay or zero}


def _part_values(name: str, parts: Estimates, total: Estimates) -> dict[str, Any]:
    """A part of deltaH1 in nats with its error; and as a share of it, where that is told from 0."""

    def share(part: Estimate, whole: Estimate) -> Number:
        low, high = whole.ci95
        return Number(part.value / whole.value if low > 0 or high < 0 else None)

    shares = parts.with_other(share, total)
    return as_mapping({f"deltaH1_{name}": parts.map(reported), f"{name}_share": shares})
