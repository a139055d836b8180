"""deltaH2 of the step, by the cheapest way that holds; a part of phase 3."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from probe.errors.exceptions import MemoryExhaustedError
from probe.errors.memory import OutOfMemory, unless_out_of_memory
from probe.errors.remedies import Remedy
from probe.estimators.curvature import corrected_curvature, nested_curvature, symmetric_curvature
from probe.estimators.estimate import Estimates
from probe.estimators.groups import random_groups
from probe.estimators.noise_floor import FEWEST_RESPONSES, FINE_ENOUGH
from probe.estimators.prediction import Prediction
from probe.phases.passes import AlongStep, StepOnBatch, pair_along, upper_side
from probe.scoring.differences import DifferencePair
from probe.scoring.forward_mode import ForwardModeError, second_order_tangents
from probe.scoring.score import score_rows

logger = logging.getLogger(__name__)

FEWEST_PROMPTS = 16
"""Prompts whose spread is believed."""
CORRECTION_SHARE = 0.5
"""What both sides of a few responses correct is known well enough where its standard error is at most this share of
deltaH2's, which then is at most a sixth larger than with both sides of all of E."""


def with_curvature(
    on: StepOnBatch, predicted: Prediction, passes: AlongStep, wanted: str
) -> tuple[Prediction, AlongStep]:
    """Add deltaH2 by the way that is asked for; its passes may have scored E after the step.

    Beside the ground truth's own pass and derivatives by forward mode, differences cost a forward over a few responses.
    Where they are not known to give the step's derivatives (16-bit forwards, routers of experts), nested forward mode
    takes their place if it can be had.

    Args:
        on: E and the step.
        predicted: deltaH1.
        passes: over E along the step.
        wanted: `probe_rework.curvature`.

    Raises:
        MemoryExhaustedError: nested forward mode is asked for, and there is no memory for it.
        ForwardModeError: it is asked for, and the model does not allow it.
        NumericalError: a score is not finite, or no difference step is usable.
    """
    if wanted == "off":
        return predicted, passes
    scale = passes.difference_scale
    if wanted == "jvp" or (wanted == "auto" and predicted.mode == "jvp" and scale is None):
        nested = _nested(on, passes, binding=wanted == "jvp")
        if nested is not None:
            return replace(predicted, deltaH2=nested, curvature_mode="jvp"), passes
    if passes.pair is None and scale is not None:
        deltaH2, passes = _from_one_side(on, predicted, passes, scale)
    else:
        if passes.pair is None:
            pair, new = pair_along(replace(on, basis=None), passes.scores)
            passes = replace(passes, pair=pair, new=new)
        assert passes.pair is not None
        deltaH2 = symmetric_curvature(passes.scores, passes.pair, on.batch.group)
    return replace(predicted, deltaH2=deltaH2, curvature_mode="finite_difference"), passes


def _nested(on: StepOnBatch, passes: AlongStep, *, binding: bool) -> Estimates | None:
    """By nested forward mode; None where it cannot be had and nobody insists."""
    try:
        found = unless_out_of_memory(
            lambda: second_order_tangents(on.policy, on.batch, on.step, on.progress("curvature on E"))
        )
    except ForwardModeError as error:
        if binding:
            raise
        logger.info("deltaH2 by differences: %s", error)
        return None
    if not isinstance(found, OutOfMemory):
        return nested_curvature(passes.scores, *found, on.batch.group)
    if binding:
        raise MemoryExhaustedError(
            f"probe_rework.curvature: expected memory for nested forward mode, found {found}; ",
            Remedy.MEMORY,
            ", or take finite_difference, which needs less",
        )
    logger.warning("deltaH2 by differences: nested forward mode needs more memory than there is (%s)", found)
    return None


def _from_one_side(
    on: StepOnBatch, predicted: Prediction, passes: AlongStep, scale: float
) -> tuple[Estimates, AlongStep]:
    """From one side of all of E, and both sides of as many prompts as its precision asks for.

    The one side is the step's end, which the ground truth needs as well; further out where the step is too short for
    the arithmetic. Both sides are at the scale at which differences are known to hold. These begin with a few responses
    that the policy has a choice in (in others there is nothing to correct), of 16 prompts at least. They are doubled
    until the correction they make is known (`CORRECTION_SHARE`), or deltaH2 is, to a hundredth of deltaH1 or of its
    standard error.
    """
    scores, group, far = passes.scores, on.batch.group, max(scale, 1.0)
    end, new = upper_side(on, far)
    passes = replace(passes, new=new)
    pair = DifferencePair(end if scale == far else scores.blank(), scores.blank(), scale, math.nan)
    sides = [(on.policy.moved(on.step, -scale), pair.minus)]
    if scale != far:
        sides.append((on.policy.moved(on.step, scale), pair.plus))
    done, wanted, counted = 0, FEWEST_RESPONSES, scores.undecided
    most = int(counted.sum()) // 2  # of these is hardly less than all
    while True:
        rows = random_groups(group, wanted if wanted <= most else None, counted=counted)
        for policy, side in sides:
            score_rows(policy, on.batch, rows[done:], side, on.progress("score E on both sides"))
        done = len(rows)
        if done == len(on.batch):
            return symmetric_curvature(scores, pair, group), passes
        if len(group[rows][counted[rows]].unique()) >= FEWEST_PROMPTS:
            deltaH2, correction = corrected_curvature(scores, passes.tangents, end, pair, rows, group, far)
            limits = predicted.estimates[predicted.reported].map(lambda one: max(abs(one.value), one.se))
            if all(
                part.se <= max(CORRECTION_SHARE * one.se, FINE_ENOUGH * limit)
                for one, part, limit in zip(deltaH2, correction, limits, strict=True)
            ):
                return deltaH2, passes
        wanted *= 2
