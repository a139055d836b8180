"""A step from U in its parts, and the passes that take what they do to the objectives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from probe.attribution.contributions import Sensitivities
from probe.attribution.objectives import Objectives, blocks_of
from probe.attribution.update_spread import preconditioned
from probe.data.batch import RolloutBatch
from probe.estimators.adam import ClosedFormStep
from probe.parameters import inner_products, norm
from probe.phases.passes import AlongStep, tangents_of
from probe.phases.update import Update
from probe.scoring.collector import MakeProgress, Progress, no_progress
from probe.scoring.differentiable import as_trained, whole_gradients
from probe.scoring.forward_mode import forward_tangents
from probe.scoring.gradients import token_gradients
from probe.scoring.policy import Policy
from probe.scoring.scores import TokenTangents

MOST_HELD = 2**29
"""Numbers of gradients of the parts of E that are held for the errors of interventions: a gigabyte."""


@dataclass(frozen=True)
class StepInParts:
    """A step from U, and the passes that take the effects of its parts.

    Attributes:
        policy: at `theta`.
        E: the evaluation batch.
        U: the update batch.
        update: the step from it.
        closed: the same in its parts.
        passes: over E along the step: by what way derivatives are taken.
    """

    policy: Policy
    E: RolloutBatch
    U: RolloutBatch
    update: Update
    closed: ClosedFormStep
    passes: AlongStep

    @cached_property
    def vectors(self) -> dict[str, Mapping[str, Tensor]]:
        """The vectors that the step is the sum of, and of these the load-balancing loss's part of the gradient."""
        found = {
            "momentum": self.closed.momentum,
            "decay": self.closed.decay,
            "gradient": self.closed.gradient,
        }
        if self.update.router is not None:
            found["router"] = preconditioned(self.closed.gradient_map, self.update.router)
        return found

    def sensitivities(
        self, on: Objectives, count: int, progress: MakeProgress = no_progress, *, keep: bool = False
    ) -> Sensitivities:
        """How the objectives change with the weight of each token of U.

        Part of E by part, so that no more than two gradients of each objective are held at a time. The errors of
        differences in the parts do not matter; what is exact is taken once more, along the sum.

        Args:
            on: objectives on E.
            count: parts of E.
            progress: makes a progress callback from the name of a pass.
            keep: hold the gradients too, those of the parts where they are not too many.
        """
        E, U, names = self.E, self.U, tuple(self.policy.parameters)
        blocks = blocks_of(on, E.group, count)
        K, P, shape = len(on), len(blocks), U.mask.shape
        of_blocks = torch.zeros(2, K, P, *shape)
        products = {name: torch.zeros(K, P, len(names), dtype=torch.float64) for name in self.vectors}
        sums: list[dict[str, Tensor]] = [{} for _ in range(K)]
        held: list[list[dict[str, Tensor]]] = []
        told, done = progress("gradient on E for all objectives"), 0
        for p, rows in enumerate(blocks.rows):
            gradients = self._gradients(on, rows, _from(told, done, len(E)))
            done += len(rows)
            for k, gradient in enumerate(gradients):
                for name, vector in self.vectors.items():
                    by_name = inner_products(gradient, vector)
                    products[name][k, p] = torch.tensor([by_name[n] for n in names], dtype=torch.float64)
                sums[k] = {n: sums[k][n] + g if sums[k] else g for n, g in gradient.items()}
                found = self.along(gradient, exact=False)
                of_blocks[0, k, p], of_blocks[1, k, p] = found.logprob, found.entropy
            if keep and K * P * sum(p.numel() for p in self.policy.parameters.values()) <= MOST_HELD:
                held.append([{n: g.to(torch.bfloat16) for n, g in one.items()} for one in gradients])
        progress("score U along parts of X")(K * P * len(U), K * P * len(U))  # as many forwards, at least
        whole = [self.along(total, progress) for total in sums]
        return Sensitivities(
            logprob=torch.stack([one.logprob for one in whole]),
            entropy=torch.stack([one.entropy for one in whole]),
            block_logprob=of_blocks[0],
            block_entropy=of_blocks[1],
            vectors=products,
            names=names,
            blocks=blocks,
            gradients=sums if keep else (),
            block_gradients=held,
        )

    def _gradients(self, on: Objectives, rows: Tensor, progress: Progress) -> list[dict[str, Tensor]]:
        """The gradients of the objectives from a part of E: `1 / B` times the sum over its tokens."""

        def weights(i: Tensor, t: Tensor, l: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return on.of_logprob[:, rows[i], t] / B, on.of_entropy[:, rows[i], t] / B

        B = len(self.E)
        part = self.E.subset(rows)
        if not bool(part.mask.any()):
            return [
                {n: torch.zeros_like(p) for n, p in self.policy.parameters.items()} for _ in range(len(on))
            ]
        with whole_gradients(self.policy.model):
            return token_gradients(self.policy, part, weights, len(on), progress)[0]

    def along(
        self, gradient: Mapping[str, Tensor], progress: MakeProgress = no_progress, *, exact: bool = True
    ) -> TokenTangents:
        """Derivatives of U's scores along `P` times a gradient.

        Args:
            gradient: by parameter name.
            progress: makes a progress callback from the name of a pass.
            exact: by forward mode, where the model has it; otherwise by what is cheapest and holds.
        """
        U, u = self.U, preconditioned(self.closed.gradient_map, gradient)
        if norm(u) == 0.0:
            zero = torch.zeros(U.mask.shape, dtype=torch.float64)
            return TokenTangents(zero, zero)
        with as_trained(self.policy.model, self.policy.values):
            if exact and self.passes.way.mode == "jvp":
                return forward_tangents(self.policy, U, u, progress=progress("forward mode on U"))
            move = norm(self.update.step)
            return tangents_of(self.policy, U, u, self.passes, move, progress, here=self.update.scores)


def _from(progress: Progress, before: int, whole: int) -> Progress:
    """Progress of a part of a pass, `before` responses of the `whole` being done."""
    return lambda done, total: progress(before + done, whole)
