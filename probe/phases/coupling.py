"""Whose doing the entropy change of states of U is, and what U does to responses of E: a pass over U for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from probe.attribution.coupling import Coupling, Row, coupling, split_row
from probe.data.batch import RolloutBatch
from probe.estimators.losses import LossWeights
from probe.parameters import inner_product
from probe.phases.step_in_parts import StepInParts
from probe.scoring.collector import Progress
from probe.scoring.differentiable import whole_gradients
from probe.scoring.gradients import token_gradients
from probe.scoring.policy import Policy


def drawn_states(U: RolloutBatch, count: int, seed: int) -> list[tuple[int, int | None]]:
    """States of U drawn at random without replacement, as `(sequence, position)`."""
    places = U.mask.nonzero()
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:count]
    return [(int(i), int(t)) for i, t in places[order]]


def drawn_responses(U: RolloutBatch, count: int, seed: int) -> list[tuple[int, int | None]]:
    """Responses of U drawn at random without replacement, as `(sequence, None)`."""
    return [(i, None) for i in _drawn(U, count, seed)]


def coupled(
    step: StepInParts, places: Sequence[tuple[int, int | None]], weights: LossWeights, progress: Progress
) -> Coupling | None:
    """Split the entropy change at some places of U; None where there are none.

    Args:
        step: from U.
        places: states, or whole responses.
        weights: of the loss.
        progress: called after each, with the responses of U that were gone over.
    """
    rows: list[Row] = []
    for n, (sequence, position) in enumerate(places):
        X = entropy_gradient_at(step.policy, step.U, sequence, position)
        of = {name: inner_product(X.__getitem__, vector) for name, vector in step.vectors.items()}
        total = of.pop("gradient") + of["momentum"] + of["decay"]
        rows.append(split_row(sequence, position, step.along(X), weights, step.U.group, of, total))
        progress((n + 1) * len(step.U), len(places) * len(step.U))
    return coupling(rows, step.U.group) if rows else None


def influence(
    step: StepInParts, count: int, seed: int, weights: LossWeights, progress: Progress
) -> tuple[Tensor | None, Tensor | None]:
    """What each response of U does to the entropy at the states of sampled responses of E.

    Args:
        step: from U.
        count: responses of E.
        seed: of the draw.
        weights: of the loss.
        progress: called after each, with the responses of U that were gone over.

    Returns:
        `(n, B_U)` nats, and the responses `(n,)`; None where there are none.
    """
    rows = _drawn(step.E, count, seed)
    if not rows:
        return None, None
    found = []
    for n, row in enumerate(rows):
        tangents = step.along(entropy_gradient_at(step.policy, step.E, row, None))
        found.append((weights.policy * tangents.logprob).sum(1))
        progress((n + 1) * len(step.U), len(rows) * len(step.U))
    return torch.stack(found), torch.tensor(rows)


def entropy_gradient_at(
    policy: Policy, batch: RolloutBatch, sequence: int, position: int | None
) -> dict[str, Tensor]:
    """`grad h` at one state of a batch, or its sum over the states of a response."""

    def weights(i: Tensor, t: Tensor, l: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        here = torch.ones_like(h) if position is None else (t == position).to(h)
        return torch.zeros_like(h).unsqueeze(0), here.unsqueeze(0)

    alone = replace(policy, tokens_per_microbatch=None, microbatch_size=1)
    with whole_gradients(policy.model):
        (gradient,), _ = token_gradients(alone, batch.subset(torch.tensor([sequence])), weights, 1)
    return gradient


def _drawn(batch: RolloutBatch, count: int, seed: int) -> list[int]:
    """Responses that are not empty, at random without replacement."""
    some = (batch.lengths > 0).nonzero().flatten()
    order = torch.randperm(len(some), generator=torch.Generator().manual_seed(seed))[:count]
    return [int(i) for i in some[order]]
