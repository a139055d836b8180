"""What momentum and weight decay contribute to the deltaH1 of a step that was taken, and its own gradient: the rest."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from probe.estimand import Number, Numbers, as_mapping
from probe.estimators.estimate import Estimate, Estimates
from probe.estimators.prediction import Prediction, token_first_order
from probe.estimators.step_parts import StepParts
from probe.phases.controls import controls_of_prediction, fitted_controls
from probe.phases.fit_memory import FitMemory
from probe.phases.passes import AlongStep, StepOnBatch, tangents_along
from probe.results.changes import reported
from probe.shards import nonzero


@dataclass(frozen=True)
class PartChanges:
    """The parts of deltaH1, or why they are not known.

    Attributes:
        numbers: `deltaH1_momentum` and the like with errors, and `momentum_share`, a part over the whole; by name.
        reason: why there are none; empty where there are.
        error: see `StepParts.error`; None where there are none.
    """

    numbers: Mapping[str, Numbers]
    reason: str = ""
    error: float | None = None

    def as_mapping(self) -> dict[str, Any]:
        """The names and values of a history entry."""
        if self.reason:
            return {"shares_reason": self.reason}
        return {"shares_error": self.error, **as_mapping(self.numbers)}


def part_changes(
    parts: StepParts | str,
    on: StepOnBatch,
    passes: AlongStep,
    prediction: Prediction,
    memory: FitMemory | None,
    draw: str,
) -> PartChanges:
    """The parts of deltaH1 with errors, and as shares of it.

    Args:
        parts: of the step, or why they are not known.
        on: E and the step.
        passes: over E along the step.
        prediction: of the whole step.
        memory: for control variates of each part; None where the prediction has none.
        draw: where E comes from.
    """
    if isinstance(parts, str):
        return PartChanges({}, reason=parts)
    # features are needed for control variates alone
    on, E = replace(on, basis=None if memory is None else memory.basis), on.batch
    total = prediction.estimates[prediction.reported]
    rest = total
    numbers: dict[str, Numbers] = {}
    for name, direction in _directions(parts).items():
        of_part = rest.map(lambda one: Estimate(0.0, torch.zeros_like(one.influence)))
        if nonzero(*direction.values()):
            tangents = tangents_along(on, direction, passes)
            along = AlongStep(passes.scores, tangents, passes.way)
            of_part = token_first_order(passes.scores, tangents, E.group).total
            if memory is not None:
                Z = controls_of_prediction(fitted_controls(E, along, memory, draw), along, E.group)
                of_part = of_part.with_other(operator.sub, Z)
        rest = rest.with_other(operator.sub, of_part)
        numbers |= _part_numbers(name, of_part, total)
    return PartChanges(numbers | _part_numbers("gradient", rest, total), error=parts.error)


def _directions(parts: StepParts) -> dict[str, Mapping[str, Tensor]]:
    """The parts of a step that have a direction of their own; decay's is 0 where there is none."""
    zero = {name: torch.zeros_like(x) for name, x in parts.momentum.items()}
    return {"momentum": parts.momentum, "decay": parts.decay or zero}


def _part_numbers(name: str, parts: Estimates, total: Estimates) -> dict[str, Numbers]:
    """A part of deltaH1 in nats with its error; and as a share of it, where that is told from 0."""

    def share(part: Estimate, whole: Estimate) -> Number:
        low, high = whole.ci95
        return Number(part.value / whole.value if low > 0 or high < 0 else None)

    shares = parts.with_other(share, total)
    return {f"deltaH1_{name}": parts.map(reported), f"{name}_share": shares}
