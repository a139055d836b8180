"""Phase 5: deltaH_true, E scored again at the weights that the optimizer's step leads to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.errors.exceptions import ConfigError
from probe.estimators.entropy_change import Reweighting
from probe.estimators.estimate import Estimates
from probe.estimators.ground_truth import GroundTruth, resampled_change, reweighted_change
from probe.estimators.noise_floor import FINE_ENOUGH, NoiseFloor, rescored_noise_floor
from probe.phases.controls import Controls, controls_of_measurement
from probe.phases.prediction import Predicted
from probe.phases.sample import BatchSource, Sample, sample_evaluation
from probe.phases.update import Update
from probe.rollouts.draw import stream_seed
from probe.scoring.collector import MakeProgress, no_progress
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens
from probe.scoring.scores import TokenScores
from probe.snapshot import operator_threads, parameters_at


def ground_truth(
    source: BatchSource,
    sample: Sample,
    update: Update,
    predicted: Predicted | None = None,
    noise_floor: NoiseFloor | None = None,
    progress: MakeProgress = no_progress,
) -> GroundTruth:
    """DeltaH_true of the optimizer's step. The parameters are not touched, but by `resample`, which puts them back.

    Args:
        source: the policy, and what a fresh E would be drawn from.
        sample: E with its scores.
        update: the step.
        predicted: what phase 3 found: scores after the step, and control variates.
        noise_floor: where it is known already.
        progress: makes a progress callback from the name of a pass.

    Raises:
        NumericalError: a weight or a score is not finite.
        ConfigError: a fresh E is asked for, and E comes from a file.
    """
    policy, importance = source.policy, source.config.importance
    E, scores = sample.E, sample.E_scores
    new = None if predicted is None or predicted.passes is None else predicted.passes.new
    if new is None:
        new = score_tokens(policy.at(update.new_parameters), E, progress("score E after the step"))
    # those of a rounded step are of the exact one: their mean is 0 all the same
    of_a_step = source.config.probe_rework.predicts_a_step
    controls = predicted.controls if predicted is not None and of_a_step else None
    reported: Reweighting = "snis" if importance.is_mode == "snis" else "per_decision"
    truth = measured_change(
        scores,
        new,
        E.group,
        reported,
        importance.clip_log_weight,
        controls,
        report_controls=importance.is_mode == "per_decision",
    )
    if importance.is_mode == "resample":
        truth = truth.with_estimate("resample", _resampled(source, sample, update, progress), reported=True)
    if not importance.noise_floor:
        return truth
    if noise_floor is None:
        seed = stream_seed(source.seed, "sham step")
        return with_noise_floor(truth, policy, E, scores, update.step, seed, progress)
    return replace(truth, noise_floor=noise_floor)


def measured_change(
    scores: TokenScores,
    new: TokenScores,
    group: Tensor,
    reported: Reweighting = "per_decision",
    clip: float | None = None,
    controls: Controls | None = None,
    report_controls: bool = True,
) -> GroundTruth:
    """The change of entropy between two scorings of E, by every estimator.

    Args:
        scores: of E at `theta`.
        new: of E after the step.
        group: `(B,)` prompts of E.
        reported: which estimator is reported.
        clip: also with log-weights clamped to `[-clip, clip]`.
        controls: control variates of the step.
        report_controls: whether the estimate with them is the reported one.
    """
    truth = reweighted_change(scores, new, group, reported, clip)
    if controls is None:
        return truth
    return truth.with_control_variates(controls_of_measurement(controls, scores, new, group), report_controls)


def with_noise_floor(
    truth: GroundTruth,
    policy: Policy,
    E: RolloutBatch,
    scores: TokenScores,
    step: Mapping[str, Tensor],
    seed: int,
    progress: MakeProgress = no_progress,
) -> GroundTruth:
    """The measurement with the size that a change of 0 can seem to have by rounding, see `rescored_noise_floor`.

    It is known well enough below a hundredth of the change, or of its standard error where that is larger.
    """
    enough = truth.change.map(
        lambda one: FINE_ENOUGH * max(abs(one.value), one.se if math.isfinite(one.se) else 0.0)
    )
    return replace(truth, noise_floor=rescored_noise_floor(policy, E, scores, step, seed, enough, progress))


def _resampled(source: BatchSource, sample: Sample, update: Update, progress: MakeProgress) -> Estimates:
    """The change from fresh responses of the updated policy to the same prompts."""
    if source.config.batch_config.E_rollouts is not None:
        raise ConfigError(
            "importance.is_mode: resample expects an E that is sampled here, found batch_config.E_rollouts; use "
            "per_decision or snis"
        )
    policy = source.policy
    with parameters_at(policy.parameters, update.new_parameters):
        with operator_threads(sample.sampling_threads):
            fresh, _ = sample_evaluation(source, "E after the step", progress("sample E after the step"))
        new = score_tokens(policy, fresh, progress("score E after the step"))
    return resampled_change(sample.E_scores, sample.E.group, new, fresh.group)
