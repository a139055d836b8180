"""What every token of U adds to deltaH1, exactly.

With Adam's denominator and the clipping factor held at what the step used, the step is linear in the gradient of the
loss: `step = momentum + decay + P * g`, and `g` is a sum over the tokens of U. So along `u = P * grad H`

    deltaH1 = c_momentum + c_decay + c_router + sum_(i,t) c[i,t] + c_kl[i,t] + c_bonus[i,t]
    c[i,t] = weight[i,t] dl[i,t],  c_kl[i,t] = weight_kl[i,t] dl[i,t],  c_bonus[i,t] = bonus[i,t] dh[i,t]

with `dl`, `dh` the derivatives of the token's log-prob and entropy along `u`: one pass over U for all of them. It is an
identity, see `Contributions.completeness`. The same along `P` times the gradient of another objective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probe.attribution.objectives import Blocks, Change, changes, combined
from probe.estimators.losses import LossWeights
from probe.parameters import inner_product

PARTS = ("momentum", "decay", "tokens", "kl", "entropy_bonus", "router")
"""What deltaH1 is the sum of: earlier gradients, weight decay, the policy-gradient terms of U's tokens, and the other
terms of the loss."""


@dataclass(frozen=True)
class Sensitivities:
    """How the objectives would change with the weight of each token of U in the loss, and what else is in the step.

    Shapes: `K` objectives, `P` parts of E, `(B, T)` tokens of U, `D` named parameters.

    Attributes:
        logprob: `dl` along `P * gradient` of each objective, `(K, B, T)` float64.
        entropy: `dh`, likewise.
        block_logprob: `dl` along the sum over each part of E, `(K, P, B, T)` float32; they add up to `logprob`.
        block_entropy: `dh`, likewise.
        vectors: for each vector of the step (`momentum`, `decay`, `gradient`, `router`) its inner products with the
            gradients, by parameter, `(K, P, D)` float64; `gradient` is all that the loss has in it.
        names: of the parameters.
        blocks: the parts of E.
        gradients: of each objective on all of E, by parameter name; empty where nobody asked.
        block_gradients: the same of each part of E, in bfloat16, for errors; empty where nobody asked, or there are too
            many numbers to be held.
    """

    logprob: Tensor
    entropy: Tensor
    block_logprob: Tensor
    block_entropy: Tensor
    vectors: Mapping[str, Tensor]
    names: tuple[str, ...]
    blocks: Blocks
    gradients: Sequence[Mapping[str, Tensor]] = ()
    block_gradients: Sequence[Sequence[Mapping[str, Tensor]]] = ()

    def of_step(self, step: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What any step adds to the objectives, by inner products: `(K, 1)`, and for each part of E `(K, 1, P)`.

        Args:
            step: by parameter name.

        Returns:
            The second is None where the gradients of the parts are not held.
        """
        total = torch.tensor(
            [[inner_product(g.__getitem__, step)] for g in self.gradients], dtype=torch.float64
        )
        if not self.block_gradients:
            return total, None
        of_blocks = [[inner_product(g.__getitem__, step) for g in own] for own in self.block_gradients]
        return total, torch.tensor(of_blocks, dtype=torch.float64).T.unsqueeze(1).contiguous()

    def of_vector(self, name: str) -> tuple[Tensor, Tensor]:
        """What a vector of the step adds to the objectives: `(K, 1)`, and for each part of E `(K, 1, P)`."""
        by_block = self.vectors[name].sum(-1)
        return by_block.sum(-1, keepdim=True), by_block.unsqueeze(1)

    def of_tokens(
        self,
        weights: Tensor,
        labels: Tensor | None = None,
        groups: int = 1,
        entropy_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What tokens with some weights in the loss add to the objectives, summed by label.

        Args:
            weights: `d loss / d l`, `(B, T)`.
            labels: `(B, T)` int64 in `[0, groups)`; -1 leaves a token out. None takes all as one.
            groups: `G`, the number of labels.
            entropy_weights: `d loss / d h`, `(B, T)`; None for none.

        Returns:
            `(K, G)` and, for each part of E, `(K, G, P)`.
        """
        label = torch.zeros(weights.shape, dtype=torch.int64) if labels is None else labels
        chosen = (label >= 0).flatten()
        index = label.flatten()[chosen]
        total, by_block = self._terms(weights, entropy_weights)
        K, P = by_block.shape[:2]
        sums = torch.zeros(K, groups, dtype=torch.float64)
        sums.index_add_(1, index, total.flatten(1)[:, chosen])
        of_blocks = torch.zeros(K, P, groups, dtype=torch.float64)
        of_blocks.index_add_(2, index, by_block.flatten(2)[:, :, chosen])
        return sums, of_blocks.transpose(1, 2).contiguous()

    def _terms(self, weights: Tensor, entropy_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """`weight dl + bonus dh` of every token, `(K, B, T)`, and for each part of E `(K, P, B, T)`."""
        total, by_block = weights * self.logprob, weights * self.block_logprob
        if entropy_weights is not None:
            total = total + entropy_weights * self.entropy
            by_block = by_block + entropy_weights * self.block_entropy
        return total, by_block

    def changes(
        self,
        weights: Tensor,
        labels: Tensor | None = None,
        groups: int = 1,
        entropy_weights: Tensor | None = None,
    ) -> list[Change]:
        """`of_tokens` as changes with errors over E, one for each label."""
        return changes(*self.of_tokens(weights, labels, groups, entropy_weights), self.blocks)

    def change_of_vector(self, name: str) -> Change:
        """`of_vector` as a change with errors over E."""
        return changes(*self.of_vector(name), self.blocks)[0]


@dataclass(frozen=True)
class Contributions:
    """The step from U, taken apart.

    Attributes:
        sensitivities: of U's tokens.
        weights: those of the loss.
        parts: the change that each of `PARTS` makes; those that the loss does not have are left out.
        total: their sum: deltaH1 as X and the closed form of the step give it, without control variates.
        completeness: see there.
    """

    sensitivities: Sensitivities
    weights: LossWeights
    parts: Mapping[str, Change]
    total: Change
    completeness: float

    def by_token(self) -> Tensor:
        """The contribution of the policy-gradient term of every token, to each number of a `Change` in its order.

        Returns:
            `(4, B, T)` float64, or 5 with rewards: deltaH1 per response and per token (nats), state-fixed the same,
            expected reward.
        """
        terms = self.weights.policy * self.sensitivities.logprob
        return combined(terms, self.sensitivities.blocks)


def contributions(found: Sensitivities, weights: LossWeights) -> Contributions:
    """Take a step apart.

    `completeness` is the largest relative error, over objectives, of `gradient = tokens + kl + entropy bonus + router`,
    the left side being an inner product of vectors, relative to the largest summand (token by token): rounding where
    derivatives are exact, more where they are differences of forwards.

    Args:
        found: of U's tokens.
        weights: of the loss.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {name: found.of_vector(name) for name in ("momentum", "decay")}
    sums["tokens"] = found.of_tokens(weights.policy)
    if bool(weights.kl.any()):
        sums["kl"] = found.of_tokens(weights.kl)
    if bool(weights.bonus.any()):
        sums["entropy_bonus"] = found.of_tokens(
            torch.zeros_like(weights.bonus), entropy_weights=weights.bonus
        )
    if "router" in found.vectors:
        sums["router"] = found.of_vector("router")
    explained = torch.stack([total for name, (total, _) in sums.items() if name not in ("momentum", "decay")])
    expected, _ = found.of_vector("gradient")
    largest = torch.stack(
        [(weights.policy * found.logprob).abs().flatten(1).max(1).values, expected[:, 0].abs()]
    )
    off = (explained.sum(0) - expected)[:, 0].abs() / largest.max(0).values.clamp_min(1e-300)
    order = [name for name in PARTS if name in sums]
    parts = dict(
        zip(
            order,
            changes(
                torch.cat([sums[name][0] for name in order], 1),
                torch.cat([sums[name][1] for name in order], 1),
                found.blocks,
            ),
            strict=True,
        )
    )
    first, *rest = parts.values()
    return Contributions(found, weights, parts, sum(rest, first), float(off.max()))


def whole_change(by_parameter: Tensor, blocks: Blocks) -> list[Change]:
    """Changes of vectors that are known by parameter, `(K, P, D)`: one for each of the `D`."""
    return changes(by_parameter.sum(1), by_parameter.transpose(1, 2).contiguous(), blocks)
