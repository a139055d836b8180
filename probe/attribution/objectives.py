"""What the tokens of an update are attributed to: first-order changes along the gradients of four objectives, from E.

Each objective is a mean over E whose gradient is a weighted sum of `grad l` and `grad h` over the tokens of E:

- `entropy`: `E[N]`, nats per response, with the score weights of the run;
- `length`: `E[T]`, tokens per response, which makes `E[N]` the entropy of a token;
- `states`: `mean of sum_t h` at the states of E as they are: the pathwise part, the *state-fixed change*;
- `reward`: the expected reward, where the responses of E have rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probe.estimand import PerEstimand
from probe.estimators.estimate import Estimate, Estimates, estimate
from probe.estimators.groups import random_groups
from probe.estimators.reward_gradient import reward_weights
from probe.estimators.weighting import Baseline, Weighting, score_weights
from probe.scoring.scores import TokenScores

OBJECTIVES = ("entropy", "length", "states", "reward")
"""In the order of all arrays; without the last where E has no rewards."""


@dataclass(frozen=True)
class Objectives:
    """The weights that the tokens of E have in the gradient of each objective, which is `1 / B` times their sum.

    Attributes:
        of_logprob: of `grad l`, `(K, B, T)` float64 for `K` objectives.
        of_entropy: of `grad h`, `(K, B, T)`.
        entropy: `N_i`, `(B,)` nats.
        length: `T_i`, `(B,)` tokens.
        rewarded: which responses have a reward, `(B,)` bool.
    """

    of_logprob: Tensor
    of_entropy: Tensor
    entropy: Tensor
    length: Tensor
    rewarded: Tensor

    def __len__(self) -> int:
        """How many objectives there are."""
        return len(self.of_logprob)


def objectives(
    scores: TokenScores, rewards: Tensor | None, weighting: Weighting, baseline: Baseline
) -> Objectives:
    """The objectives on E.

    Args:
        scores: of E.
        rewards: `(B,)`, NaN where none applies; None leaves the objective `reward` out.
        weighting: see `score_weights`.
        baseline: see `score_weights`.

    Raises:
        DataError: see `reward_weights`.
    """
    weights, mask = score_weights(scores, weighting, baseline), scores.mask.double()
    zero = torch.zeros_like(mask)
    of_logprob, of_entropy = [weights.entropy, weights.length, zero], [mask, zero, mask]
    rewarded = torch.zeros(len(mask), dtype=torch.bool)
    if rewards is not None:
        of_logprob.append(reward_weights(rewards, scores.mask))
        of_entropy.append(zero)
        rewarded = ~rewards.isnan()
    return Objectives(
        torch.stack(of_logprob), torch.stack(of_entropy), scores.sequence_entropy, scores.lengths, rewarded
    )


@dataclass(frozen=True)
class Blocks:
    """E in parts of whole prompts, drawn at random: what the errors of attributed changes come from.

    Attributes:
        rows: of each of `P` parts.
        responses: of each, `(P,)` float64.
        entropy: `sum N_i` of each, nats.
        tokens: `sum T_i` of each.
        rewarded: responses with a reward of each.
    """

    rows: tuple[Tensor, ...]
    responses: Tensor
    entropy: Tensor
    tokens: Tensor
    rewarded: Tensor

    def __len__(self) -> int:
        """How many parts there are."""
        return len(self.rows)


def blocks_of(of: Objectives, group: Tensor, count: int) -> Blocks:
    """Cut E into parts of about as many responses each.

    Args:
        of: objectives on E.
        group: `(B,)` prompts of E, which stay whole.
        count: parts wanted; as many as there are prompts where these are fewer.

    >>> one = torch.ones(4, dtype=torch.float64)
    >>> on = Objectives(torch.zeros(3, 4, 1), torch.zeros(3, 4, 1), one, one, one.bool())
    >>> blocks_of(on, torch.tensor([0, 0, 1, 2]), 8).responses.sort().values.tolist()
    [1.0, 1.0, 2.0]
    """
    order = random_groups(group)
    _, member, sizes = torch.unique_consecutive(group[order], return_inverse=True, return_counts=True)
    count = min(count, len(sizes))
    # a prompt goes where its middle falls, when all responses are laid out on `count` parts of equal length
    middle = sizes.cumsum(0).double() - sizes.double() / 2
    part = (middle * count / len(group)).long().clamp_max(count - 1)
    found = [order[part[member] == k] for k in range(count)]
    rows = tuple(one for one in found if len(one))
    return Blocks(
        rows=rows,
        responses=torch.tensor([len(one) for one in rows], dtype=torch.float64),
        entropy=torch.stack([of.entropy[one].sum() for one in rows]),
        tokens=torch.stack([of.length[one].sum() for one in rows]),
        rewarded=torch.stack([of.rewarded[one].double().sum() for one in rows]),
    )


@dataclass(frozen=True)
class Change:
    """The first-order change that something makes, with errors over E.

    Attributes:
        deltaH1: of the entropy, nats per response and per token.
        state_fixed: of the entropy at the states of E, nats per response and per token.
        deltaR1: of the expected reward, in units of the reward; None where E has no rewards.
    """

    deltaH1: Estimates
    state_fixed: Estimates
    deltaR1: Estimate | None = None

    def __add__(self, other: Change) -> Change:
        """Of two things together."""
        return Change(
            self.deltaH1.with_other(lambda a, b: a + b, other.deltaH1),
            self.state_fixed.with_other(lambda a, b: a + b, other.state_fixed),
            None if self.deltaR1 is None or other.deltaR1 is None else self.deltaR1 + other.deltaR1,
        )

    def scaled(self, factor: float) -> Change:
        """The same with a step that is `factor` times as long."""
        return Change(
            self.deltaH1.map(lambda one: one.scaled(factor)),
            self.state_fixed.map(lambda one: one.scaled(factor)),
            None if self.deltaR1 is None else self.deltaR1.scaled(factor),
        )

    @property
    def parts(self) -> list[Estimate]:
        """Its numbers in a row: entropy per response and token, state-fixed likewise, reward."""
        reward = [] if self.deltaR1 is None else [self.deltaR1]
        return [*self.deltaH1, *self.state_fixed, *reward]


def combined(totals: Tensor, blocks: Blocks) -> Tensor:
    """The numbers of a `Change` from derivatives of the objectives, on all of E: `(5, ...)`, or 4 without rewards.

    `deltaH_tok = (dN - H_tok dT) / E[T]`, and the reward's mean is over the rewarded responses.

    Args:
        totals: `1 / B` times the sum over E of each objective's derivative, `(K, ...)`.
        blocks: of E.
    """
    weight = torch.ones(len(blocks), dtype=torch.float64)
    return combined_over(totals.unsqueeze(-1) * (blocks.responses / blocks.responses.sum()), blocks, weight)


def combined_over(of_blocks: Tensor, blocks: Blocks, weight: Tensor) -> Tensor:
    """`combined` of sums over the parts of E, `(K, ..., P)`, each with a weight, `(P,)`; see `estimate`."""
    B, n = blocks.responses.sum(), (weight * blocks.responses).sum()
    N, T = (weight * blocks.entropy).sum() / n, (weight * blocks.tokens).sum() / n
    entropy, length, states = (B * (weight * one).sum(-1) / n for one in of_blocks[:3])
    found = [entropy, (entropy - N / T * length) / T, states, states / T]
    if len(of_blocks) > 3:
        found.append(B * (weight * of_blocks[3]).sum(-1) / (weight * blocks.rewarded).sum())
    return torch.stack(found)


def changes(totals: Tensor, of_blocks: Tensor, blocks: Blocks) -> list[Change]:
    """Changes with errors: the values from `totals`, the influence of E's parts from `of_blocks`.

    The variance is the jackknife's over the parts, which are alike and independent; with `P` of them it has at most
    `P - 1` degrees of freedom. What the baseline of the score weights owes to E is not in it, as it is of the second
    order.

    Args:
        totals: derivatives of the objectives, `(K, G)`.
        of_blocks: the same for each part of E, `(K, G, P)`; they add up to the totals as far as differences of forwards
            are exact.
        blocks: the parts.
    """
    G = totals.shape[1]
    values = combined(totals, blocks)
    found = estimate(
        lambda weight: combined_over(of_blocks, blocks, weight).flatten(),
        torch.arange(len(blocks)),
        "jackknife",
    )
    columns = [found[k * G : (k + 1) * G] for k in range(len(values))]
    return [
        change_of(
            [replace(own[g], value=float(value[g])) for own, value in zip(columns, values, strict=True)]
        )
        for g in range(G)
    ]


def change_without_errors(totals: Tensor, blocks: Blocks) -> Change:
    """A change of which only the values are known, from derivatives of the objectives `(K, 1)`."""
    nothing = torch.zeros(1, dtype=torch.float64)  # of a single part: an infinite error
    return change_of([Estimate(float(value), nothing) for value in combined(totals, blocks)[:, 0]])


def change_of(parts: Sequence[Estimate]) -> Change:
    """The `Change` of which these are the `parts`."""
    return Change(
        PerEstimand(parts[0], parts[1]), PerEstimand(parts[2], parts[3]), parts[4] if len(parts) > 4 else None
    )
