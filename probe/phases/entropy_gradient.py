"""Phase 1: how to differentiate, and the entropy's gradient X on E where it is needed."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from probe.config.estimation import ProbeReworkConfig
from probe.data.batch import RolloutBatch
from probe.errors.memory import OutOfMemory, unless_out_of_memory
from probe.estimators.derivative_check import DerivativeMismatchError, derivative_check
from probe.estimators.entropy_gradient import EntropyGradient
from probe.estimators.entropy_gradient import entropy_gradient as gradient_of_entropy
from probe.estimators.forward_mode_check import forward_mode_check
from probe.phases.passes import Way, choose_way, few_responses, without_memory
from probe.phases.sample import Sample
from probe.scoring.collector import MakeProgress, no_progress
from probe.scoring.policy import Policy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Derivative:
    """How deltaH1 is differentiated in this run.

    Attributes:
        way: mode and reason.
        X: the entropy's gradient on E; None where nothing needs it.
        check_error: relative difference of backward and finite differences on a few responses; None where they were
            not compared.
    """

    way: Way
    X: EntropyGradient | None = None
    check_error: float | None = None


def entropy_gradient(
    policy: Policy, sample: Sample, rework: ProbeReworkConfig, progress: MakeProgress = no_progress
) -> Derivative:
    """Choose how to differentiate, and X on E where it is needed: backward, and for the spread over U.

    Args:
        policy: at the checkpoint's weights.
        sample: E with its scores.
        rework: the section `probe_rework`.
        progress: makes a progress callback from the name of a pass.

    Raises:
        NumericalError: the gradients cannot be trusted (see `derivative_check`), are not finite, or forward mode is
            asked for and cannot be had.
        MemoryExhaustedError: memory does not suffice for the way that is asked for.
    """
    scores = sample.E_scores
    if not bool(scores.undecided.any()):
        return Derivative(
            Way("finite_difference", "the policy has no choice left, so that derivatives are 0")
        )
    few = few_responses(sample.E, policy.microbatch_size, scores)
    way, error = _checked_way(policy, few, rework)
    logger.info("deltaH1 by %s: %s", way.mode, way.reason)
    if way.mode == "finite_difference" or (way.mode == "jvp" and not rework.update_spread):
        return Derivative(way, check_error=error)
    X = unless_out_of_memory(
        lambda: gradient_of_entropy(
            policy, sample.E, scores, rework.weighting, rework.baseline, progress=progress("gradient on E")
        )
    )
    if not isinstance(X, OutOfMemory):
        return Derivative(way, X, error)
    if way.mode == "jvp":  # X serves the spread over U alone
        logger.warning("deltaH1_sd_U is left out: a backward pass needs more memory than there is (%s)", X)
        return Derivative(way, check_error=error)
    way = without_memory("a backward pass", X, binding=rework.derivative_mode == "reverse")
    logger.warning("deltaH1 by %s: %s", way.mode, way.reason)
    return Derivative(way, check_error=error)


def _checked_way(policy: Policy, few: RolloutBatch, rework: ProbeReworkConfig) -> tuple[Way, float | None]:
    """The way to differentiate, and the `check_error` of backward."""
    error = None
    try:
        if rework.derivative_check and rework.derivative_mode != "finite_difference":
            found = unless_out_of_memory(lambda: derivative_check(policy, few).relative_error)
            if isinstance(found, OutOfMemory):
                binding = rework.derivative_mode != "auto"
                return without_memory("a backward pass", found, binding=binding), None
            error = found
    except DerivativeMismatchError as mismatch:
        # forward mode only agrees with a backward that is wrong where the model's own code stops gradients
        if rework.derivative_mode != "auto" or not forward_mode_check(policy, few).usable:
            raise
        reason = f"forward mode and backward agree, and both are wrong: {mismatch}"
        return Way("finite_difference", reason), None
    return choose_way(policy, few, rework.derivative_mode), error
