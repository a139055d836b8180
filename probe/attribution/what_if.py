"""What if: the first-order effect of an intervention on the update, without taking it.

An intervention that reweighs tokens (drops, clips, rescales them, changes their advantage) changes the weights in the
sum that deltaH1 is of (see `contributions`), so that its effect is another sum of what is already there: no pass more,
and the same E and U for all, so that differences are paired. What is held is Adam's denominator and the factor of
gradient clipping, as they are in the step from U itself; the step that an optimizer would really take lets both go with
the gradient (`--whatif.exact` takes it).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probe.attribution.contributions import Contributions
from probe.attribution.interventions.registry import Composed, Plan
from probe.attribution.objectives import Change, changes, combined, combined_over
from probe.attribution.tokens import UpdateTokens
from probe.estimand import SEQUENCE, TOKEN, Estimand
from probe.estimators.estimate import Estimate, estimate
from probe.estimators.loss_settings import LossSettings
from probe.estimators.losses import LossInputs

SOLVERS = ("learning_rate", "entropy_bonus")
"""What a target can be solved for: the learning rate's factor, or the coefficient of an entropy bonus."""


@dataclass(frozen=True)
class Effect:
    """What a planned update would do, to first order, with errors over E.

    Attributes:
        name: of the intervention, as it was asked for; empty for the update as it is.
        claim: what it does, in a sentence.
        plan: the update.
        change: what the step would do.
        difference: `change` less that of the update as it is, on the same E and U.
        per_reward: nats per token by which the entropy changes for one unit of expected reward; None without rewards,
            or where the interval of the reward's change contains 0.
        tokens: whose weight in the loss is another one.
    """

    name: str
    claim: str
    plan: Plan
    change: Change
    difference: Change
    per_reward: Estimate | None
    tokens: int


@dataclass(frozen=True)
class Solution:
    """At which setting the predicted change meets a target.

    Attributes:
        solver: one of `SOLVERS`.
        target: nats, of the estimand.
        estimand: `token` or `sequence`.
        setting: the factor of the learning rate, or the coefficient of the entropy bonus; None where there is none.
        reason: why there is none; empty where there is.
    """

    solver: str
    target: float
    estimand: Estimand
    setting: Estimate | None
    reason: str = ""

    @property
    def intervention(self) -> str:
        """The intervention that it comes to; empty where there is none."""
        if self.setting is None:
            return ""
        option = "factor" if self.solver == "learning_rate" else "coef"
        return f"{self.solver}({option}={self.setting.value:.6g})"


@dataclass(frozen=True)
class Shortcut:
    """The effects of interventions on one update, from its contributions.

    Attributes:
        found: the contributions.
        tokens: U as formulas see it.
        settings: of the loss.
        inputs: of the loss.
    """

    found: Contributions
    tokens: UpdateTokens
    settings: LossSettings
    inputs: LossInputs

    @property
    def plan(self) -> Plan:
        """The update as it is."""
        return Plan.of(self.settings, self.inputs)

    def effect(self, composed: Composed | None = None) -> Effect:
        """The effect of an intervention; of the update as it is without one.

        Raises:
            ConfigError: an option cannot be, or U lacks what it needs.
        """
        asis = self.plan
        plan = asis if composed is None else composed(asis, self.tokens)
        own, before = self._sums(plan), self._sums(asis)
        blocks = self.found.sensitivities.blocks
        (change,) = changes(*own, blocks)
        (difference,) = changes(own[0] - before[0], own[1] - before[1], blocks)
        new, old = plan.weights, asis.weights
        moved = (new.policy != old.policy) | (new.kl != old.kl) | (new.bonus != old.bonus)
        return Effect(
            name="" if composed is None else composed.text,
            claim="the update as it is"
            if composed is None
            else " + ".join(one.claim for one, _ in composed.steps),
            plan=plan,
            change=change,
            difference=difference,
            per_reward=self._per_reward(own, change),
            tokens=int(moved.sum()),
        )

    def solve(self, target: float, estimand: Estimand, solver: str) -> Solution:
        """The setting at which the predicted change is `target`: linear in both, so that it is one division.

        Args:
            target: nats per token or per response.
            estimand: which.
            solver: see `SOLVERS`.
        """
        which = 1 if estimand is TOKEN else 0
        asis = self._sums(self.plan)
        here = self.effect().change.deltaH1[estimand]
        if solver == "learning_rate":
            sums, base = asis, None
            slope, wanted = here, target
        else:
            more = self.plan.with_settings(entropy_coef=self.settings.entropy_coef + 1.0)
            there = self._sums(more)
            sums, base = (there[0] - asis[0], there[1] - asis[1]), asis
            slope = changes(*sums, self.found.sensitivities.blocks)[0].deltaH1[estimand]
            wanted = target - here.value
        low, high = slope.ci95
        if low <= 0 <= high:
            what = "deltaH1" if base is None else "the effect of an entropy bonus"
            return Solution(solver, target, estimand, None, f"{what} cannot be told from 0; draw a larger E")
        if base is None and target * slope.value <= 0:
            reason = (
                "the target is on the other side of 0: no learning rate above 0 changes the sign of deltaH1"
            )
            return Solution(solver, target, estimand, None, reason)
        blocks = self.found.sensitivities.blocks

        def setting(weight: Tensor) -> Tensor:
            by_unit = combined_over(sums[1], blocks, weight)[which]
            rest = 0.0 if base is None else combined_over(base[1], blocks, weight)[which]
            return (target - rest) / by_unit

        (found,) = estimate(setting, torch.arange(len(blocks)), "jackknife")
        return Solution(solver, target, estimand, replace(found, value=wanted / slope.value))

    def _sums(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """What the step of a plan adds to the objectives, `(K, 1)` and for each part of E `(K, 1, P)`."""
        held, weights = self.found.sensitivities, plan.weights
        parts = [held.of_tokens(weights.policy + weights.kl, entropy_weights=weights.bonus)]
        parts += [held.of_vector(name) for name in ("momentum", "decay", "router") if name in held.vectors]
        factor = plan.learning_rate_factor
        total = torch.stack([total for total, _ in parts]).sum(0)
        return factor * total, factor * torch.stack([of_blocks for _, of_blocks in parts]).sum(0)

    def _per_reward(self, sums: tuple[Tensor, Tensor], change: Change) -> Estimate | None:
        """`deltaH1_tok / deltaR1` with its error."""
        reward = change.deltaR1
        if reward is None or reward.ci95[0] <= 0 <= reward.ci95[1]:
            return None
        blocks = self.found.sensitivities.blocks

        def ratio(weight: Tensor) -> Tensor:
            numbers = combined_over(sums[1], blocks, weight)
            return numbers[1] / numbers[-1]

        (found,) = estimate(ratio, torch.arange(len(blocks)), "jackknife")
        values = combined(sums[0], blocks)
        return replace(found, value=float(values[1, 0] / values[-1, 0]))


def estimand_named(name: str) -> Estimand:
    """`token` or `sequence`."""
    return {one.name: one for one in (SEQUENCE, TOKEN)}[name]
