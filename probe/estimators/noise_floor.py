"""The noise floor: how large a change of exactly 0 can seem by the rounding of the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from probe.data.batch import RolloutBatch
from probe.estimand import PerEstimand
from probe.estimators.entropy_change import entropy_change
from probe.estimators.estimate import estimate
from probe.scoring.collector import Progress
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens
from probe.scoring.scores import TokenScores

SHAM_SIZE = 1 / 32
"""Size of the move that draws rounding anew, relative to the step, where no number has 16 bits: its curvature, a
thousandth of the step's, stays out of the noise floor. Coarser numbers do not move unless the weights really do."""


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
    progress: Callable[[str], Progress] | None = None,
) -> PerEstimand[float]:
    """What rounding makes of a change of 0: E scored again, in other batch shapes, at weights moved to and fro.

    The move is the step with random signs; a small part of it where nothing is in 16 bits. It costs two scorings.

    Args:
        policy: the policy, at `theta`.
        batch: E.
        scores: its scores at `theta`.
        step: by parameter name.
        seed: of the signs.
        progress: makes a progress callback from the name of a pass.

    Returns:
        See `noise_floor`.
    """
    order = torch.arange(len(batch)).flip(0)
    shuffled = batch.subset(order)
    size = policy.microbatch_size
    other = replace(policy, microbatch_size=size // 2 if size > 1 else 2)
    sides = []
    for values in _sham_step(policy, step, seed):
        report = None if progress is None else progress("score E for the noise floor")
        again = score_tokens(other.at(values), shuffled, report)
        sides.append(TokenScores(again.logprob[order], again.entropy[order], again.mask[order]))
    return noise_floor(scores, sides[0], sides[1], batch.group)


def _sham_step(
    policy: Policy, step: Mapping[str, Tensor], seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters moved to either side by the step with random signs; by a small part of it where that is enough."""
    size = 1.0 if policy.half_precision else SHAM_SIZE
    generator = torch.Generator().manual_seed(seed)
    plus, minus = {}, {}
    for name, here in policy.point(step).items():
        signs = torch.randint(0, 2, here.shape, generator=generator) * 2 - 1
        change = (size * step[name] * signs.to(step[name])).to(here)
        plus[name], minus[name] = here + change, here - change
    return plus, minus
