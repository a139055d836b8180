"""The noise floor: how large a change of exactly 0 can seem by the rounding of the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.estimand import PerEstimand
from probe.estimators.entropy_change import entropy_change
from probe.estimators.estimate import estimate
from probe.estimators.groups import random_groups
from probe.scoring.collector import Progress
from probe.scoring.policy import Policy
from probe.scoring.score import score_rows
from probe.scoring.scores import TokenScores
from probe.shards import part_like

SHAM_SIZE = 1 / 32
"""Size of the move that draws rounding anew, relative to the step, where no number has 16 bits: its curvature, a
thousandth of the step's, stays out of the noise floor. Coarser numbers do not move unless the weights really do."""


FEWEST_RESPONSES = 16
"""Responses that a noise floor begins with."""
FINE_ENOUGH = 0.01
"""A noise floor below this share of the measured change, or of its standard error, is known well enough."""


@dataclass(frozen=True)
class NoiseFloor:
    """The noise floor of one measurement.

    Attributes:
        size: nats per response and per token.
        responses: how many of E were scored again for it. Of a part of E it is an upper bound for all: the error of the
            mean is larger there.
    """

    size: PerEstimand[float]
    responses: int


def noise_floor(old: TokenScores, plus: TokenScores, minus: TokenScores, group: Tensor) -> PerEstimand[float]:
    """How large a change of 0 can seem by rounding.

    E is scored again in other batch shapes, at `theta + v` and at `theta - v`. `v` is the step with random signs, so
    that rounding is drawn anew but the move leads nowhere. The first order cancels in `(deltaH(v) + deltaH(-v)) / 2`;
    what is left is rounding, and curvature where `v` is large, which only makes the floor higher. Its variance is 3/4
    of that of a single change, hence the factor: `sqrt(4/3) (|mean| + t se)`, with the `per_decision` estimator.

    Args:
        old: scores of E at `theta`.
        plus: scores of E at `theta + v`, other batch shapes.
        minus: scores of E at `theta - v`, other batch shapes.
        group: `(B,)` prompts.
    """

    def even(q: Tensor) -> Tensor:
        sides = [entropy_change(q, old, side, "per_decision") for side in (plus, minus)]
        return (sides[0] + sides[1]) / 2

    return PerEstimand.of([math.sqrt(4 / 3) * max(abs(end) for end in e.ci95) for e in estimate(even, group)])


def rescored_noise_floor(
    policy: Policy,
    batch: RolloutBatch,
    scores: TokenScores,
    step: Mapping[str, Tensor],
    seed: int,
    enough: PerEstimand[float],
    progress: Callable[[str], Progress] | None = None,
) -> NoiseFloor:
    """What rounding makes of a change of 0: E scored again, in other batch shapes, at weights moved to and fro.

    The move is the step with random signs; a small part of it where nothing is in 16 bits. It begins with 16 responses
    of prompts at random, those that the policy has a choice in counted, and doubles them until the floor, which falls
    like one over the root of their number, is below what is `enough`, or all of E is scored again. In float32 that is a
    small part of two scorings.

    Args:
        policy: the policy, at `theta`.
        batch: E.
        scores: its scores at `theta`.
        step: by parameter name.
        seed: of the signs, and of the order of the prompts.
        enough: a floor below this needs to be known no better, nats per response and per token.
        progress: makes a progress callback from the name of a pass.

    Returns:
        See `noise_floor`; of the responses that were needed.
    """
    other = policy.in_other_shapes(batch)
    moved = [other.at(values) for values in _sham_step(policy, step, seed)]
    sides, counted = [scores.blank() for _ in moved], scores.undecided
    if not bool(counted.any()):
        counted = batch.mask.any(dim=1)
    done, wanted = 0, FEWEST_RESPONSES
    while True:
        seen = random_groups(batch.group, wanted, seed, counted)
        for side, there in zip(sides, moved, strict=True):
            report = None if progress is None else progress("score E for the noise floor")
            score_rows(there, batch, seen[done:], side, report)
        done = len(seen)
        if bool(batch.mask[seen].any()):
            found = noise_floor(
                scores.rows(seen), sides[0].rows(seen), sides[1].rows(seen), batch.group[seen]
            )
            if done == len(batch) or all(x <= limit for x, limit in zip(found, enough, strict=True)):
                return NoiseFloor(found, done)
        wanted *= 2


def _sham_step(
    policy: Policy, step: Mapping[str, Tensor], seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters moved to either side by the step with random signs; by a small part of it where that is enough."""
    size = 1.0 if policy.half_precision else SHAM_SIZE
    generator = torch.Generator().manual_seed(seed)
    plus, minus = {}, {}
    for name, here in policy.point(step).items():
        signs = torch.randint(0, 2, here.shape, generator=generator) * 2 - 1
        own = part_like(signs.to(step[name].device, step[name].dtype), step[name])
        change = (size * step[name] * own).to(here)
        plus[name], minus[name] = here + change, here - change
    return plus, minus
