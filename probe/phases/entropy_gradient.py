"""Phase 1: how to differentiate, and the entropy's gradient X on as much of E as it is needed of."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from torch import Tensor

from probe.config.estimation import ProbeReworkConfig
from probe.data.batch import RolloutBatch
from probe.errors.exceptions import NumericalError
from probe.errors.memory import OutOfMemory, unless_out_of_memory
from probe.estimators.derivative_check import (
    DerivativeMismatchError,
    OwnGradient,
    derivative_check,
    own_gradient,
)
from probe.estimators.entropy_gradient import EntropyGradient
from probe.estimators.entropy_gradient import entropy_gradient as gradient_of_entropy
from probe.estimators.forward_mode_check import forward_mode_check
from probe.estimators.groups import random_groups
from probe.phases.passes import CHECK_RESPONSES, Way, choose_way, few_responses, without_memory
from probe.phases.sample import Sample
from probe.scoring.collector import MakeProgress, no_progress
from probe.scoring.policy import Policy
from probe.text import error_text

logger = logging.getLogger(__name__)

SPREAD_RESPONSES, LEAST_SPREAD_RESPONSES = 8, 32
"""Responses of E, per prompt of U and at least, that X is taken from where only the spread over U needs it."""


@dataclass(frozen=True)
class Derivative:
    """How deltaH1 is differentiated in this run.

    Attributes:
        way: mode and reason.
        X: the entropy's gradient; None where nothing needs it or backward cannot be believed.
        rows: responses of E that X was taken from, `(n,)`; None for all.
        check_error: relative difference of backward and finite differences on a few responses; None where they were
            not compared.
    """

    way: Way
    X: EntropyGradient | None = None
    rows: Tensor | None = None
    check_error: float | None = None


def entropy_gradient(
    policy: Policy,
    sample: Sample,
    rework: ProbeReworkConfig,
    progress: MakeProgress = no_progress,
    spread: bool = True,
    whole: bool = False,
) -> Derivative:
    """Choose how to differentiate, and take X: on all of E where deltaH1 or a log is made of it.

    The spread of deltaH1 over update batches is a standard deviation over the prompts of U, which these know to about
    `1 / sqrt(2 prompts)`. A part of E that makes X's own noise smaller than that is enough for it
    (`spread_responses`), and for the comparison of backward with derivatives per token.

    Args:
        policy: at the checkpoint's weights.
        sample: E with its scores.
        rework: the section `probe_rework`.
        progress: makes a progress callback from the name of a pass.
        spread: X is needed for the spread over U.
        whole: X is wanted on all of E whatever needs it.

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
    few = few_responses(sample.E, CHECK_RESPONSES, scores)
    asked = rework.derivative_mode == "finite_difference"
    found = _by_forwards(policy, few, rework, spread or whole) if asked else _checked(policy, few, rework)
    way = found.derivative.way
    logger.info("deltaH1 by %s: %s", way.mode, way.reason)
    if not found.backward or not (spread or whole or way.mode == "reverse"):
        return found.derivative
    rows = None
    if not whole and way.mode != "reverse":
        rows = spread_responses(sample.E, len(sample.U.group.unique()))
    on, of = (sample.E, scores) if rows is None else (sample.E.subset(rows), scores.rows(rows))
    X = unless_out_of_memory(
        lambda: gradient_of_entropy(
            policy, on, of, rework.weighting, rework.baseline, progress=progress("gradient on E"), parts=False
        )
    )
    if not isinstance(X, OutOfMemory):
        return replace(found.derivative, X=X, rows=rows)
    if way.mode != "reverse":  # X serves the spread over U alone
        logger.warning("deltaH1_sd_U is left out: a backward pass needs more memory than there is (%s)", X)
        return found.derivative
    way = without_memory("a backward pass", X, binding=rework.derivative_mode == "reverse")
    logger.warning("deltaH1 by %s: %s", way.mode, way.reason)
    return replace(found.derivative, way=way)


def spread_responses(E: RolloutBatch, prompts: int) -> Tensor | None:
    """The responses of E that X is taken from for the spread over U; None for all.

    Prompts are taken whole, in a random order that is always the same, until there are 8 responses per prompt of U, and
    at least 32. What noise is left in X adds to the spread: on two batches of the demo policy (32 prompts, so 256
    responses) it is 4 % and 24 % larger than with four times as many responses, and is itself known to 13 %.

    Args:
        E: the evaluation batch.
        prompts: of U.
    """
    wanted = max(SPREAD_RESPONSES * prompts, LEAST_SPREAD_RESPONSES)
    if wanted >= len(E):
        return None
    rows = random_groups(E.group, wanted).sort().values
    return rows if bool(E.mask[rows].any()) and len(rows) < len(E) else None


@dataclass(frozen=True)
class _Found:
    """A choice, and whether backward can be believed."""

    derivative: Derivative
    backward: bool


def _checked(policy: Policy, few: RolloutBatch, rework: ProbeReworkConfig) -> _Found:
    """The way to differentiate, after a comparison of backward with forwards."""
    error, own = None, None
    try:
        if rework.derivative_check:
            found = unless_out_of_memory(lambda: _compared(policy, few))
            if isinstance(found, OutOfMemory):
                way = without_memory("a backward pass", found, binding=rework.derivative_mode != "auto")
                return _Found(Derivative(way), backward=False)
            own, error = found
    except DerivativeMismatchError as mismatch:
        # forward mode only agrees with a backward that is wrong where the model's own code stops gradients
        if rework.derivative_mode != "auto" or not forward_mode_check(policy, few).usable:
            raise
        reason = f"forward mode and backward agree, and both are wrong: {mismatch}"
        return _Found(Derivative(Way("finite_difference", reason)), backward=False)
    way = choose_way(policy, few, rework.derivative_mode, own=own)
    return _Found(Derivative(way, check_error=error), backward=True)


def _compared(policy: Policy, few: RolloutBatch) -> tuple[OwnGradient, float]:
    """A gradient, and the relative difference of it and forwards."""
    own = own_gradient(policy, few)
    return own, derivative_check(policy, few, own).relative_error


def _by_forwards(policy: Policy, few: RolloutBatch, rework: ProbeReworkConfig, wanted: bool) -> _Found:
    """Differences of forwards, as configured; backward beside them, where something wants it and it can be believed."""
    way = choose_way(policy, few, rework.derivative_mode)
    if not wanted:
        return _Found(Derivative(way), backward=False)
    if not rework.derivative_check:
        return _Found(Derivative(way), backward=True)
    try:
        _, error = _compared(policy, few)
    # kernels without a backward raise what they like
    except (NumericalError, RuntimeError, MemoryError) as refusal:
        logger.warning("no X, and no deltaH1_sd_U: backward cannot be used: %s", error_text(refusal))
        return _Found(Derivative(way), backward=False)
    return _Found(Derivative(way, check_error=error), backward=True)
