"""What if: the first-order effect of an intervention on the update, without training on.

An intervention that reweighs tokens (drops, clips, rescales them, changes their advantage) changes the weights in the
sum that deltaH1 is of (see `contributions`), so that its effect is another sum of what is already there: no pass more,
and the same E and U for all, so that differences are paired. This shortcut holds Adam's denominator and the factor of
gradient clipping as they are in the step from U itself. An optimizer lets both go with the gradient, and where
clipping is at work, or its second moment is young, it takes back most of what only rescales a gradient. So the step
that it would take is taken on a snapshot, for a backward of U, and its inner product with the objectives' gradients is
the effect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from probe.attribution.contributions import Contributions
from probe.attribution.interventions.registry import Composed, Plan, parse_intervention
from probe.attribution.objectives import Change, changes, combined_over
from probe.attribution.tokens import UpdateTokens
from probe.estimand import SEQUENCE, TOKEN, Estimand
from probe.estimators.estimate import Estimate, estimate
from probe.estimators.loss_settings import LossSettings
from probe.estimators.losses import LossInputs
from probe.estimators.student import student_quantile

SOLVERS = ("learning_rate", "entropy_bonus")
"""What a target can be solved for: the learning rate's factor, or the coefficient of an entropy bonus."""


LEAST_SIGNAL = 5.0
"""Standard errors that the reward's change must be away from 0 for the entropy per reward to be told: nearer to it the
ratio is of another size than the true one wherever it looks as if it could be told."""


@dataclass(frozen=True)
class Ratio:
    """Nats per token by which the entropy changes for one unit of expected reward.

    Attributes:
        value: `deltaH1_tok / deltaR1`.
        ci95: its 95 % interval, Fieller's.
    """

    value: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Effect:
    """What a planned update would do, to first order, with errors over E.

    Attributes:
        name: of the intervention, as it was asked for; empty for the update as it is.
        claim: what it does, in a sentence.
        plan: the update.
        change: what the step would do, by the shortcut.
        difference: `change` less that of the update as it is, on the same E and U.
        tokens: whose weight in the loss is another one.
        of_step: what the optimizer's step would do; None where it was not taken.
        step_difference: `of_step` less that of the update as it is.
        per_reward: see `Ratio`, of the step where it was taken; None where the reward's change is hardly known.
    """

    name: str
    claim: str
    plan: Plan
    change: Change
    difference: Change
    tokens: int
    of_step: Change | None = None
    step_difference: Change | None = None
    per_reward: Ratio | None = None

    @property
    def told(self) -> tuple[Change, Change]:
        """Change and difference as they are reported: those of the step where it was taken."""
        if self.of_step is None or self.step_difference is None:
            return self.change, self.difference
        return self.of_step, self.step_difference

    def with_step(self, change: Change, difference: Change) -> Effect:
        """The same with what the optimizer's step does."""
        return replace(
            self, of_step=change, step_difference=difference, per_reward=entropy_per_reward(change)
        )


@dataclass(frozen=True)
class Solution:
    """At which setting the predicted change meets a target.

    By the shortcut it is one division, which is exact for the learning rate. For an entropy bonus the optimizer's own
    steps are followed to the target from there, where they are taken; the interval is the shortcut's, relative to it.

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
        return parse_intervention(f"{self.solver}({option}={self.setting.value:.6g})").text


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
            per_reward=entropy_per_reward(change),
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
        blocks = self.found.sensitivities.blocks
        level = blocks.entropy.sum() / (blocks.tokens if estimand is TOKEN else blocks.responses).sum()
        if target + float(level) <= 0:
            reason = f"the entropy is {float(level):.3g} {estimand.unit}: it cannot fall by {-target:.3g}"
            return Solution(solver, target, estimand, None, reason)
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


def entropy_per_reward(change: Change) -> Ratio | None:
    """The ratio of a change's two numbers with Fieller's interval, on the same E.

    Fieller, Some problems in interval estimation (1954): the values `x` that `H - x R = 0` is compatible with.

    Returns:
        None without rewards, or where the reward's change is less than `LEAST_SIGNAL` standard errors from 0.
    """
    H, R = change.deltaH1.token, change.deltaR1
    if R is None or not abs(R.value) >= LEAST_SIGNAL * R.se or R.value == 0.0:
        return None
    t = student_quantile(min(H.df, R.df))
    P = len(R.influence)
    shared = P / (P - 1) * float((H.influence * R.influence).sum())
    a, b = R.value**2 - t**2 * R.se**2, H.value * R.value - t**2 * shared
    c = H.value**2 - t**2 * H.se**2
    if a <= 0:
        return None
    root = math.sqrt(max(b**2 - a * c, 0.0))
    return Ratio(H.value / R.value, ((b - root) / a, (b + root) / a))


def estimand_named(name: str) -> Estimand:
    """`token` or `sequence`."""
    return {one.name: one for one in (SEQUENCE, TOKEN)}[name]
