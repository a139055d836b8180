"""The passes over E along one step: scores, their derivatives, and what the two are checked by."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.errors.exceptions import MemoryExhaustedError, NumericalError
from probe.errors.memory import OutOfMemory, unless_out_of_memory
from probe.errors.remedies import Remedy
from probe.estimators.derivative_check import TOLERANCE, OwnGradient
from probe.estimators.forward_mode_check import forward_mode_check
from probe.estimators.step_check import StepCheck, step_check, stopped_gradients
from probe.parameters import norm
from probe.scoring.collector import MakeProgress, no_progress
from probe.scoring.differences import DifferencePair, choose_scale, difference_pair
from probe.scoring.differentiable import forward_mode_kernels
from probe.scoring.features import FeatureBasis
from probe.scoring.forward_mode import forward_tangents, scores_and_tangents
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens
from probe.scoring.scores import TokenScores, TokenTangents

logger = logging.getLogger(__name__)

CHECK_RESPONSES = 4
"""Responses that a way to differentiate is tried on, and the scale of differences."""
ONE_SIDE, BOTH_SIDES = (1 / 8, 1 / 2, 1 / 32, 2), (1, 1 / 4, 4)
"""Scales that differences are tried at for another direction than the step, relative to the one that held along it, in
this order: of one side, which bends more, and of both."""
CLOSE = 0.02
"""A relative error of differences at which no other scale is tried."""
Mode = Literal["jvp", "reverse", "finite_difference"]


@dataclass(frozen=True)
class Way:
    """How deltaH1 is differentiated.

    Attributes:
        mode: `jvp` (forward mode), `reverse` (backward, with differences of forwards for what is needed per token) or
            `finite_difference`.
        reason: why that way.
    """

    mode: Mode
    reason: str

    def kernels(self, policy: Policy) -> AbstractContextManager[None]:
        """Kernels that forward mode has rules for: those of scores that are compared with its own."""
        return forward_mode_kernels(policy.model) if self.mode == "jvp" else nullcontext()


@dataclass(frozen=True)
class AlongStep:
    """What the passes over E along one step gave.

    Attributes:
        scores: of E at `theta`.
        tangents: derivatives of E's scores along the step.
        way: by which they were taken; another one than was asked for where forwards contradicted that.
        pair: scores on both sides, where the derivatives are differences.
        check: the derivatives beside differences of forwards; None where these are the only way, or it is switched off.
        new: scores of E after the step, where a difference needed them anyway.
    """

    scores: TokenScores
    tangents: TokenTangents
    way: Way
    pair: DifferencePair | None = None
    check: StepCheck | None = None
    new: TokenScores | None = None

    @property
    def difference_scale(self) -> float | None:
        """The scale, in units of the step, at which differences of forwards are known to give these derivatives.

        None where there was no comparison, or differences and derivatives did not come within 5 % of each other.
        """
        if self.pair is not None:
            return self.pair.scale
        known = self.check is not None and self.check.difference <= TOLERANCE
        return 4.0**self.check.scale if known and self.check is not None else None

    def rows(self, rows: Tensor) -> AlongStep:
        """Scores and derivatives of some responses, without what they were checked by."""
        return AlongStep(self.scores.rows(rows), self.tangents.rows(rows), self.way)


@dataclass(frozen=True)
class StepOnBatch:
    """One step and the E that it is differentiated on, with what is known of the two already.

    Attributes:
        policy: at `theta`.
        batch: E.
        step: by parameter name.
        scores: of E at `theta`, where they are there already.
        after: the exact parameters after the step, where the step is one that was taken.
        basis: of the features that control variates are made of.
        progress: makes a progress callback from the name of a pass.
    """

    policy: Policy
    batch: RolloutBatch
    step: Mapping[str, Tensor]
    scores: TokenScores | None = None
    after: Mapping[str, Tensor] | None = None
    basis: FeatureBasis | None = None
    progress: MakeProgress = no_progress

    def end_at(self, scale: float) -> Mapping[str, Tensor] | None:
        """The exact parameters at a scale of the step; None but at 1 for a step that was taken."""
        return self.after if scale == 1.0 else None


def choose_way(
    policy: Policy,
    few: RolloutBatch,
    wanted: str,
    otherwise: Mode = "reverse",
    own: OwnGradient | None = None,
) -> Way:
    """The way to differentiate a model.

    Args:
        policy: the policy.
        few: a few responses to try forward mode on.
        wanted: `auto` or a mode.
        otherwise: the mode where forward mode cannot be had.
        own: `own_gradient` of those responses, where it is there already.

    Raises:
        NumericalError: forward mode is asked for and cannot be had.
        MemoryExhaustedError: forward mode is asked for and there is no memory for it.
    """
    if wanted in ("reverse", "finite_difference"):
        return Way(wanted, "as configured")  # type: ignore[arg-type]
    check = unless_out_of_memory(lambda: forward_mode_check(policy, few, own))
    if isinstance(check, OutOfMemory):
        return without_memory("forward mode", check, binding=wanted == "jvp")
    if check.usable:
        return Way("jvp", check.reason)
    if wanted == "jvp":
        raise NumericalError(
            Remedy.DERIVATIVE,
            f": expected a model that allows jvp, found that {check.reason}; ",
            Remedy.OTHER_DERIVATIVE,
        )
    return Way(otherwise, check.reason)


def without_memory(what: str, found: OutOfMemory, *, binding: bool) -> Way:
    """The way that needs least memory, after another one has run out of it.

    Args:
        what: the way that was tried.
        found: what it said.
        binding: that way was asked for.

    Raises:
        MemoryExhaustedError: it was.
    """
    if binding:
        raise MemoryExhaustedError(
            Remedy.DERIVATIVE,
            f": expected memory for {what}, found {found}; ",
            Remedy.MEMORY,
            ", or take ",
            Remedy.DIFFERENCES,
            ", which needs less",
        )
    return Way("finite_difference", f"{what} needs more memory than there is ({found})")


def along_step(
    on: StepOnBatch, way: Way, *, check: bool = True, binding: bool = False, check_scale: int = 0
) -> AlongStep:
    """Score and differentiate E along a step.

    Args:
        on: E, the step and what is known already.
        way: to differentiate.
        check: compare what forward mode gives with differences of forwards.
        binding: keep to forward mode where these contradict it or memory does not suffice; otherwise they take its
            place.
        check_scale: the `StepCheck.scale` of an earlier check.

    Raises:
        NumericalError: a score is not finite, or no difference step is usable.
        ForwardModeError: an operation of the model has no forward-mode derivative.
        MemoryExhaustedError: memory does not suffice.
    """
    if way.mode != "jvp":
        return _by_differences(on, way)
    found = unless_out_of_memory(
        lambda: scores_and_tangents(on.policy, on.batch, on.step, on.basis, on.progress("forward mode on E"))
    )
    if isinstance(found, OutOfMemory):
        return _by_differences(on, without_memory("forward mode", found, binding=binding))
    here, tangents = found
    passes = AlongStep(here if on.scores is None else on.scores, tangents, way)
    if not check:
        return passes
    # with the kernels of the scores that it is compared with
    with way.kernels(on.policy) if on.scores is None else nullcontext():
        checked = step_check(on.policy, on.batch, passes.scores, on.step, tangents, check_scale)
    if binding or not checked.contradicted:
        return replace(passes, check=checked)
    return _by_differences(on, Way("finite_difference", stopped_gradients(checked)))


def _by_differences(on: StepOnBatch, way: Way) -> AlongStep:
    """See `along_step`; by central differences of forwards."""

    def passes() -> AlongStep:
        scores = score_tokens(on.policy, on.batch, basis=on.basis) if on.scores is None else on.scores
        pair, new = pair_along(on, scores)
        return AlongStep(scores, pair.tangents, way, pair, new=new)

    found = unless_out_of_memory(passes)
    if isinstance(found, OutOfMemory):
        raise MemoryExhaustedError(
            f"expected memory for forwards of {len(on.batch)} responses, found {found}; ", Remedy.MEMORY
        )
    return found


def longest_pass(policy: Policy, longest: RolloutBatch, way: Way, *, binding: bool) -> Way:
    """The way that there is memory for, tried on the longest responses that can occur.

    Args:
        policy: at any weights.
        longest: a microbatch of them.
        way: to differentiate.
        binding: keep to that way.

    Raises:
        MemoryExhaustedError: there is none for that way, or not for a forward.
    """
    # what a probe holds beside a pass: the parameters before the step, and the step
    step = {name: torch.zeros_like(p) for name, p in policy.parameters.items()}
    here = policy.at({name: p.detach().clone() for name, p in policy.parameters.items()})
    if way.mode == "jvp":
        found = unless_out_of_memory(lambda: forward_tangents(here, longest, step))
        if not isinstance(found, OutOfMemory):
            return way
        way = without_memory("forward mode", found, binding=binding)
    scored = unless_out_of_memory(lambda: score_tokens(here, longest))
    if isinstance(scored, OutOfMemory):
        tokens = len(longest.prompt_ids[0]) + int(longest.lengths.max())
        raise MemoryExhaustedError(
            f"expected memory for a forward of {len(longest)} responses of the longest length that can occur, "
            f"{tokens} tokens with the prompt, found {scored}; ",
            Remedy.MEMORY,
        )
    return way


def pair_along(on: StepOnBatch, scores: TokenScores) -> tuple[DifferencePair, TokenScores | None]:
    """E scored on both sides; and after the step, where the upper side is the step's own end (at scale 1).

    Args:
        on: E and the step.
        scores: of E at `theta`.

    Raises:
        NumericalError: no difference step is usable.
    """
    few = few_responses(on.batch, CHECK_RESPONSES, scores)
    scale, error = choose_scale(on.policy, few, on.step)
    upper = on.end_at(scale)
    pair = difference_pair(on.policy, on.batch, on.step, scale, error, upper, on.basis, on.progress)
    return pair, None if upper is None else pair.plus


def upper_side(on: StepOnBatch, scale: float) -> tuple[TokenScores, TokenScores | None]:
    """E scored at `theta + scale * step`; and after the step, where that is the step's own end (at scale 1).

    Args:
        on: E and the step.
        scale: in units of the step.

    Raises:
        NumericalError: a score is not finite.
    """
    upper = on.end_at(scale)
    there = on.policy.moved(on.step, scale) if upper is None else on.policy.at(upper)
    found = score_tokens(there, on.batch, on.progress("score E after the step"))
    return found, None if upper is None else found


def tangents_along(on: StepOnBatch, direction: Mapping[str, Tensor], along: AlongStep) -> TokenTangents:
    """Derivatives of E's scores along another direction, by the way of the step's; differences move as far.

    Args:
        on: E and the step.
        direction: by parameter name, not 0.
        along: the passes along the step.
    """
    if along.pair is None:
        return forward_tangents(on.policy, on.batch, direction, on.basis)
    scale = along.pair.scale * norm(on.step) / norm(direction)
    return difference_pair(on.policy, on.batch, direction, scale, basis=on.basis).tangents


def tangents_of(
    policy: Policy,
    batch: RolloutBatch,
    direction: Mapping[str, Tensor],
    along: AlongStep,
    move: float,
    progress: MakeProgress = no_progress,
    *,
    here: TokenScores | None = None,
    binding: bool = False,
) -> TokenTangents:
    """Derivatives of another batch's scores along a direction of any length, by the cheapest way that is known to hold.

    Forwards cost less than a pass in forward mode. They are differenced over a Euclidean length near the one at which
    differences along the step agreed with its derivatives: one side, where the scores at `theta` are there already,
    or both. Which of these give the derivatives, and over which length, a few responses say, by forward mode (by both
    sides where there is none). Where no difference holds along this direction, or none did along the step, forward mode
    takes their place; where there is none, the scale is searched for.

    Args:
        policy: at `theta`.
        batch: any.
        direction: by parameter name.
        along: the passes over E along the step.
        move: Euclidean length of the step.
        progress: makes a progress callback from the name of a pass.
        here: scores of the batch at `theta`, where they are there already.
        binding: keep to forward mode where memory does not suffice; otherwise differences take its place.

    Raises:
        NumericalError: no difference step is usable.
        MemoryExhaustedError: memory does not suffice for forward mode, which is asked for.
    """
    scale = along.difference_scale if move > 0 else None
    factor = (move if move > 0 else 1.0) / max(norm(direction), 1e-300)
    moved = {name: factor * change for name, change in direction.items()}
    differences, forward_mode = _Differences(policy, batch, moved, here), along.way.mode == "jvp"
    sides = None if scale is None else differences.sides(scale, forward_mode=forward_mode)
    if sides is None and forward_mode:
        found = unless_out_of_memory(
            lambda: forward_tangents(policy, batch, direction, progress=progress("forward mode on U"))
        )
        if not isinstance(found, OutOfMemory):
            return found
        instead = without_memory("forward mode on U", found, binding=binding)
        logger.warning("derivatives of U by %s: %s", instead.mode, instead.reason)
    if sides is None:
        scale, _ = choose_scale(policy, few_responses(batch, CHECK_RESPONSES, here), moved)
        sides = _Sides(one=False, scale=scale)
    return differences.tangents(sides, progress).scaled(1 / factor)


@dataclass(frozen=True)
class _Sides:
    """Where forwards are differenced: on one side of `theta` and at it, or on both sides; and how far away."""

    one: bool
    scale: float


@dataclass(frozen=True)
class _Differences:
    """Differences of forwards of a batch along a direction.

    Attributes:
        policy: at `theta`.
        batch: any.
        direction: by parameter name.
        here: scores at `theta`, where they are there.
    """

    policy: Policy
    batch: RolloutBatch
    direction: Mapping[str, Tensor]
    here: TokenScores | None

    def sides(self, scale: float, *, forward_mode: bool) -> _Sides | None:
        """The cheapest that give the derivatives; None where none are known to.

        Differences of a few responses that the policy has a choice in are compared with forward mode, and where there
        is none with both sides at `scale`, which are taken to hold. That sees what a move bends, what rounding adds,
        and forwards of other kernels in `here` (a backward's, of 4-bit layers) alike.

        Args:
            scale: at which differences along the step held, for a direction as long.
            forward_mode: whether the model has it.
        """
        known = None if forward_mode else _Sides(one=False, scale=scale)
        tried = [] if self.here is None else [_Sides(one=True, scale=part * scale) for part in ONE_SIDE]
        if forward_mode:
            tried += [_Sides(one=False, scale=part * scale) for part in BOTH_SIDES]
        if not tried:
            return known
        rows = few_rows(self.batch, CHECK_RESPONSES, self.here)
        here = None if self.here is None else self.here.rows(rows)
        few = replace(self, batch=self.batch.subset(rows), here=here)
        expected = unless_out_of_memory(
            lambda: (
                forward_tangents(few.policy, few.batch, few.direction)
                if known is None
                else few.tangents(known)
            ).vector()
        )
        if isinstance(expected, OutOfMemory):
            return known
        errors: dict[_Sides, float] = {}
        for sides in tried:
            off = float((few.tangents(sides).vector() - expected).norm())
            errors[sides] = off / max(float(expected.norm()), 1e-300)
            if errors[sides] <= CLOSE:
                break
        best = min(errors, key=errors.__getitem__)
        return best if errors[best] <= TOLERANCE else known

    def tangents(self, sides: _Sides, progress: MakeProgress = no_progress) -> TokenTangents:
        """The differences, per unit of the direction."""
        if not sides.one or self.here is None:
            names = ("score U along X", "score U against X")
            pair = difference_pair(
                self.policy, self.batch, self.direction, sides.scale, progress=progress, names=names
            )
            return pair.tangents
        there = self.policy.moved(self.direction, sides.scale)
        scores = score_tokens(there, self.batch, progress("score U along X"))
        change = TokenTangents(scores.logprob - self.here.logprob, scores.entropy - self.here.entropy)
        return change.scaled(1 / sides.scale)


def few_responses(batch: RolloutBatch, count: int, scores: TokenScores | None = None) -> RolloutBatch:
    """Those of `few_rows`."""
    return batch.subset(few_rows(batch, count, scores))


def few_rows(batch: RolloutBatch, count: int, scores: TokenScores | None = None) -> Tensor:
    """The first few responses that are not empty; of those with a choice in them, as far as there are.

    Args:
        batch: any.
        count: how many.
        scores: of the batch; without them a choice is not looked for.
    """
    some = batch.lengths > 0
    if scores is not None and bool(scores.undecided.any()):
        some = scores.undecided
    return some.nonzero().flatten()[:count]
