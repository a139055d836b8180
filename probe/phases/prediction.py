"""Phase 3: deltaH1 of a step, with its errors, curvature and spread over update batches."""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass, replace
from typing import get_args

from torch import Tensor

from probe.config.estimation import ProbeReworkConfig
from probe.errors.exceptions import NumericalError
from probe.estimand import PerEstimand
from probe.estimators.entropy_gradient import EntropyGradient
from probe.estimators.entropy_gradient import entropy_gradient as gradient_of_entropy
from probe.estimators.prediction import (
    Prediction,
    change_along,
    first_order,
    from_tokens,
    token_first_order,
)
from probe.estimators.step_check import StepCheck, agreement_check, stopped_gradients
from probe.estimators.weighting import Baseline, Weighting
from probe.loading.optimizer import LoadedOptimizer
from probe.phases.controls import Controls, controls_of_prediction, fitted_controls
from probe.phases.curvature import with_curvature
from probe.phases.entropy_gradient import Derivative
from probe.phases.passes import AlongStep, StepOnBatch, Way, along_step
from probe.phases.sample import Sample
from probe.phases.update import Update, predicted_step
from probe.phases.update_spread import update_spread
from probe.scoring.collector import MakeProgress, no_progress
from probe.scoring.policy import Policy

logger = logging.getLogger(__name__)

AGREEMENT_LIMIT, HALF_AGREEMENT_LIMIT = 1e-2, 0.1
"""Largest relative difference of deltaH1 by forward mode and by backward, and the same in half precision."""


@dataclass(frozen=True)
class Predicted:
    """What phase 3 found.

    Attributes:
        prediction: deltaH1.
        X: the entropy's gradient, on all of E or on a part; None where there is none, or forwards contradict it.
        passes: over E along the step; None where the arithmetic allows none.
        controls: control variates of the step; None without.
    """

    prediction: Prediction
    X: EntropyGradient | None = None
    passes: AlongStep | None = None
    controls: Controls | None = None


def prediction(
    policy: Policy,
    sample: Sample,
    derivative: Derivative,
    update: Update,
    loaded: LoadedOptimizer,
    rework: ProbeReworkConfig,
    progress: MakeProgress = no_progress,
) -> Predicted:
    """DeltaH1 of the step that `probe_rework.step` asks for.

    Args:
        policy: at the checkpoint's weights.
        sample: E with its scores, and U.
        derivative: how to differentiate, and X.
        update: the optimizer's step.
        loaded: the optimizer.
        rework: the section `probe_rework`.
        progress: makes a progress callback from the name of a pass.

    Raises:
        NumericalError: two ways to the derivative disagree, or no difference step is usable.
    """
    E, memory = sample.E, sample.controls.memory
    taken = rework.step == "optimizer" and update.rounding is None
    on = StepOnBatch(
        policy,
        E,
        predicted_step(policy, loaded, update, rework.step),
        scores=sample.E_scores,
        after=update.new_parameters if taken else None,
        basis=None if memory is None else memory.basis,
        progress=progress,
    )
    try:
        passes = along_step(
            on,
            derivative.way,
            check=rework.derivative_check,
            binding=rework.derivative_mode != "auto",
        )
    except NumericalError as error:
        if derivative.way.mode != "reverse" or derivative.X is None:
            raise
        return _without_errors(on, sample, update, rework, f"{derivative.way.reason}; no error bars: {error}")
    predicted, X, passes = _checked(on, passes, derivative, update, rework)
    predicted = replace(
        predicted,
        sd_U=update_spread(policy, sample.U, X, update, loaded, rework, passes, progress),
    )
    controls = None
    if memory is None:
        predicted = replace(predicted, control_variates=f"off: {sample.controls.reason}")
    else:
        controls = fitted_controls(E, passes, memory, sample.controls.draw)
        Z = controls_of_prediction(controls, passes, E.group, rework.baseline)
        batches = f" and {controls.earlier} earlier batches" if controls.earlier else ""
        predicted = predicted.with_control_variates(Z, f"on: fitted on other prompts{batches}")
    predicted, passes = with_curvature(on, predicted, passes, rework.curvature)
    return Predicted(predicted, X, passes, controls)


def predict(
    passes: AlongStep,
    group: Tensor,
    learning_rate: float,
    weighting: Weighting = "causal",
    baseline: Baseline = "loo_position",
) -> Prediction:
    """DeltaH1 from derivatives per token, by every weighting, with errors over E.

    Args:
        passes: over E along the step.
        group: `(B,)` prompts of E.
        learning_rate: that the step was taken with; NaN where it is not known.
        weighting: whose value is reported.
        baseline: of the score part.
    """
    by_name = {
        name: token_first_order(passes.scores, passes.tangents, group, name, baseline)
        for name in get_args(Weighting)
    }
    check, pair = passes.check, passes.pair
    return replace(
        from_tokens(by_name[weighting], learning_rate),
        estimates={name: parts.total for name, parts in by_name.items()},
        reported=weighting,
        mode=passes.way.mode,
        reason=passes.way.reason,
        step_difference=None if check is None else check.difference,
        step_difference_error=None if check is None else check.error,
        difference_scale=None if pair is None else pair.scale,
        difference_error=None if pair is None else pair.error,
    )


def _checked(
    on: StepOnBatch,
    passes: AlongStep,
    derivative: Derivative,
    update: Update,
    rework: ProbeReworkConfig,
) -> tuple[Prediction, EntropyGradient | None, AlongStep]:
    """DeltaH1 by the way that holds: backward and derivatives per token agree, or forwards are believed."""
    group = on.batch.group
    predicted = predict(passes, group, update.learning_rate, rework.weighting, rework.baseline)
    if passes.way != derivative.way:  # X takes the same for a constant as what the forwards contradict
        logger.warning("deltaH1 by %s: %s", passes.way.mode, passes.way.reason)
        return predicted, None, passes
    X, rows = derivative.X, derivative.rows
    if X is None:
        return predicted, None, passes
    backward, tokens = change_along(X, on.step), predicted
    if rows is not None:  # by derivatives of the same responses
        part = passes.rows(rows)
        tokens = predict(part, group[rows], update.learning_rate, rework.weighting, rework.baseline)
    agreement = _agreement(backward, tokens, on.policy.half_precision)
    if passes.way.mode != "reverse":
        return replace(predicted, agreement=agreement), X, passes
    check = None
    if passes.pair is not None and rework.derivative_check:
        check = _agreement_check(backward, predicted, passes.pair.error)
    if check is not None and check.contradicted and rework.derivative_mode == "auto":
        forwards = Way("finite_difference", stopped_gradients(check))
        logger.warning("deltaH1 by %s: %s", forwards.mode, forwards.reason)
        return replace(predicted, mode=forwards.mode, reason=forwards.reason), None, passes
    predicted = replace(
        predicted,
        score=backward.with_other(operator.sub, predicted.pathwise),
        agreement=agreement,
        step_difference=None if check is None else check.difference,
        step_difference_error=None if check is None else check.error,
    )
    return predicted, X, passes


def _agreement_check(backward: PerEstimand[float], tokens: Prediction, known: float) -> StepCheck:
    """Backward beside differences of forwards, which are known to `known`."""
    sizes = tokens.pathwise.with_other(lambda path, score: max(abs(path), abs(score)), tokens.score)
    return agreement_check(backward, tokens.estimates[tokens.reported], sizes, known)


def _agreement(backward: PerEstimand[float], tokens: Prediction, half_precision: bool) -> float:
    """Relative difference of deltaH1 by backward and by derivatives per token.

    Relative to the larger of the parts that deltaH1 is the sum of, since these may nearly cancel.

    Raises:
        NumericalError: they disagree by more than the arithmetic allows.
    """
    by_backward, by_tokens = backward.sequence, tokens.deltaH1.sequence
    size = max(abs(tokens.pathwise.sequence), abs(tokens.score.sequence), abs(by_backward), 1e-300)
    off = abs(by_backward - by_tokens) / size
    limit = HALF_AGREEMENT_LIMIT if half_precision else AGREEMENT_LIMIT
    if tokens.mode == "jvp" and not off <= limit:
        raise NumericalError(
            f"expected forward mode and backward to give one deltaH1, found {by_tokens:.6g} and "
            f"{by_backward:.6g} nats per response (relative difference {off:.2g}, at most {limit} "
            "expected); some layer drops derivatives (try probe_rework.derivative_mode: finite_difference)"
        )
    return off


def _without_errors(
    on: StepOnBatch, sample: Sample, update: Update, rework: ProbeReworkConfig, reason: str
) -> Predicted:
    """DeltaH1 by backward alone, where the arithmetic gives no derivatives per token; X once more, with its parts."""
    logger.warning("deltaH1 by reverse: %s", reason)
    X = gradient_of_entropy(
        on.policy,
        on.batch,
        sample.E_scores,
        rework.weighting,
        rework.baseline,
        progress=on.progress("gradient on E"),
    )
    predicted = first_order(X, on.step, update.learning_rate)
    return Predicted(replace(predicted, reported=rework.weighting, reason=reason), X)
