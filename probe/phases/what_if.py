"""What if: interventions on the update that was probed, their steps taken on a snapshot, chosen ones measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from probe.attribution.interventions import INTERVENTIONS, Plan, parse_intervention
from probe.attribution.objectives import Change, change_without_errors, changes
from probe.attribution.token_classes import KINDS
from probe.attribution.what_if import Effect, Shortcut, Solution, estimand_named
from probe.config.what_if import WhatIfConfig
from probe.errors.exceptions import NumericalError
from probe.estimators.estimate import Estimates
from probe.estimators.ground_truth import change_by
from probe.estimators.importance_weights import WeightDiagnostics, weight_diagnostics
from probe.loading.optimizer import LoadedOptimizer
from probe.phases.attribution import Attribution
from probe.phases.sample import BatchSource, Sample
from probe.phases.update import TakenStep, Update, take_step
from probe.scoring.collector import MakeProgress, no_progress
from probe.scoring.gradients import token_gradients
from probe.scoring.score import score_tokens

DROPPED = ("right", "wrong", "highest fifth", *KINDS)
"""The classes of tokens that are left out one after another where nobody names interventions."""
FOLLOWED, CLOSE = 12, 0.01
"""Steps taken at most on the way to a target, and the share of the way at which it counts as met."""


@dataclass(frozen=True)
class Measured:
    """What the optimizer's step with an intervention was measured to do.

    Attributes:
        deltaH_true: the measured change, `per_decision`, nats; without control variates.
        difference: the measured change less that of the update as it is, on the same E.
        weights: diagnostics of the importance weights.
        clip_factor: what clipping multiplied the gradient by.
    """

    deltaH_true: Estimates
    difference: Estimates
    weights: WeightDiagnostics
    clip_factor: float


@dataclass(frozen=True)
class WhatIf:
    """Interventions on one update.

    Attributes:
        asis: the update as it is.
        effects: of the interventions, in the order that they were asked for.
        measured: those steps that were measured, by the name of the intervention; the update as it is under "".
        solutions: settings that meet the target.
        skipped: interventions that cannot be made of this U, with the reason.
    """

    asis: Effect
    effects: Sequence[Effect]
    measured: Mapping[str, Measured]
    solutions: Sequence[Solution]
    skipped: Mapping[str, str]


def what_if(
    source: BatchSource,
    sample: Sample,
    update: Update,
    loaded: LoadedOptimizer,
    attributed: Attribution,
    progress: MakeProgress = no_progress,
) -> WhatIf:
    """Compare interventions, measure those that are asked for, and solve for a target.

    Args:
        source: policy and configuration.
        sample: E with its scores, and U.
        update: the step from U as it is.
        loaded: the optimizer at its saved state.
        attributed: the contributions of U's tokens.
        progress: makes a progress callback from the name of a pass.

    Raises:
        ConfigError: an unknown intervention or option, or one that was asked for cannot be made of this U.
        NumericalError: a gradient, step or score is not finite.
    """
    config = source.config.whatif
    shortcut = Shortcut(attributed.contributions, attributed.tokens, update.loss, update.inputs)
    taker = StepTaker(source, sample, update, loaded, shortcut)
    asis = taker.asis if config.steps else shortcut.effect()
    names, skipped = wanted_interventions(shortcut, config)
    chosen = list(names) if "all" in config.exact else [parse_intervention(n).text for n in config.exact]
    names = list(dict.fromkeys([*names, *chosen]))
    solutions = [] if config.target_deltaH is None else _solutions(shortcut, taker, config)
    solved = [one.intervention for one in solutions if one.setting is not None]
    names, chosen = list(dict.fromkeys([*names, *solved])), list(dict.fromkeys([*chosen, *solved]))
    effects, told = [], progress("gradient on U with interventions")
    measured = {"": taker.measured(taker.own)} if chosen else {}
    for n, name in enumerate(names):
        effect = shortcut.effect(parse_intervention(name))
        taken = taker.take(effect.plan) if name in chosen or (config.steps and effect.tokens) else None
        effects.append(taker.with_step(effect, taken) if config.steps else effect)
        if taken is not None and name in chosen:  # now, as steps are too large to be kept
            measured[name] = taker.measured(taken, measured[""])
        told((n + 1) * len(sample.U), len(names) * len(sample.U))
    if measured:  # one bar at a time
        forwards = len(measured) * len(sample.E)
        progress("score E after steps of interventions")(forwards, forwards)
    return WhatIf(asis, effects, measured, solutions, skipped)


def check_interventions(config: WhatIfConfig) -> None:
    """Refuse names and options that do not exist, before anything is loaded.

    Raises:
        ConfigError: see `parse_intervention`.
    """
    for name in [*config.interventions, *(one for one in config.exact if one != "all")]:
        parse_intervention(name).check()


def wanted_interventions(shortcut: Shortcut, config: WhatIfConfig) -> tuple[list[str], dict[str, str]]:
    """Those asked for, or all with their published defaults; and why some of all are left out."""
    if config.interventions:
        return [parse_intervention(name).text for name in config.interventions], {}
    names: list[str] = []
    skipped = {}
    for name, one in INTERVENTIONS.items():
        if reason := one.lacks(shortcut.tokens, shortcut.settings):
            skipped[name] = reason
        elif name == "drop":
            names += [f"drop(tokens_of={of})" for of in DROPPED if of in shortcut.tokens.classes]
        else:
            names.append(parse_intervention(name).text)
    return names, skipped


def _solutions(shortcut: Shortcut, taker: StepTaker, config: WhatIfConfig) -> list[Solution]:
    """The settings that meet the target."""
    assert config.target_deltaH is not None
    estimand, found = estimand_named(config.target_estimand), []
    for solver in config.solve_for:
        solution = shortcut.solve(config.target_deltaH, estimand, solver)
        if solver == "entropy_bonus" and config.steps and solution.setting is not None:
            solution = taker.followed(solution)
        found.append(solution)
    return found


@dataclass(frozen=True)
class StepTaker:
    """Takes the optimizer's step for planned updates, on a snapshot.

    Attributes:
        source: policy and configuration.
        sample: E with its scores, and U.
        update: the step from U as it is.
        loaded: the optimizer at its saved state.
        shortcut: the contributions, with the gradients of the objectives.
    """

    source: BatchSource
    sample: Sample
    update: Update
    loaded: LoadedOptimizer
    shortcut: Shortcut

    @property
    def own(self) -> TakenStep:
        """The step from U as it is."""
        made = self.update
        return TakenStep(made.step, made.new_parameters, made.gradient_norm, made.clip_factor)

    @cached_property
    def here(self) -> Change:
        """What the step from U as it is does, to first order."""
        return self._change(self.update.step)

    @property
    def asis(self) -> Effect:
        """The update as it is, whose step has been taken."""
        return self.shortcut.effect().with_step(self.here, self.here.scaled(0.0))

    def with_step(self, effect: Effect, taken: TakenStep | None) -> Effect:
        """An effect with what the optimizer's own step does, which is needed where a token's weight is another one."""
        if taken is None or effect.tokens == 0:
            factor = effect.plan.learning_rate_factor
            return effect.with_step(self.here.scaled(factor), self.here.scaled(factor - 1.0))
        step = self.update.step
        difference = {name: new - step[name] for name, new in taken.step.items()}
        return effect.with_step(self._change(taken.step), self._change(difference))

    def followed(self, solution: Solution) -> Solution:
        """A solution whose step meets the target; the interval stays the shortcut's, relative to it.

        The coefficient grows from the shortcut's until a step is beyond the target, at most tenfold at a time and never
        to the other sign; from there on the two nearest are interpolated between.
        """
        assert solution.setting is not None
        target, at = solution.target, solution.setting.value
        near: tuple[float, float] = (0.0, self.here.deltaH1[solution.estimand].value)
        beyond: tuple[float, float] | None = None
        way, best = target - near[1], near
        for _ in range(FOLLOWED):
            try:
                value = self._with_bonus(solution, at)
            except NumericalError:
                break
            if abs(value - target) < abs(best[1] - target):
                best = at, value
            if abs(value - target) <= CLOSE * abs(way):
                scale = at / solution.setting.value
                return replace(solution, setting=replace(solution.setting.scaled(scale), value=at))
            if (value - target) * way > 0:
                beyond = at, value
            elif abs(value - target) >= abs(near[1] - target):
                break  # no nearer than with a smaller one
            else:
                slope = (value - near[1]) / (at - near[0])
                near = at, value
            if beyond is not None:
                share = (target - near[1]) / (beyond[1] - near[1])
                at = near[0] + min(max(share, 0.1), 0.9) * (beyond[0] - near[0])
            else:
                at *= min(max(1 + (target - value) / slope / at, 1.5), 10.0)
        reached = f"{best[1]:.3g} nats at a coefficient of {best[0]:.3g}"
        reason = f"the optimizer's steps do not come nearer than {reached} (clipping and Adam's denominator)"
        return replace(solution, setting=None, reason=reason)

    def _with_bonus(self, solution: Solution, coefficient: float) -> float:
        """The first-order change that the step with an entropy bonus makes, nats of the solution's estimand."""
        assert solution.setting is not None
        asked = replace(solution, setting=replace(solution.setting, value=coefficient)).intervention
        plan = parse_intervention(asked)(self.shortcut.plan, self.shortcut.tokens)
        return self._change(self.take(plan).step).deltaH1[solution.estimand].value

    def take(self, plan: Plan) -> TakenStep:
        """The optimizer's step for a planned update."""
        gradient = self.gradient(plan)
        return take_step(
            self.source.policy, self.loaded, gradient, self.source.config, plan.learning_rate_factor
        )

    def gradient(self, plan: Plan) -> dict[str, Tensor]:
        """The gradient of a planned update's loss, the load-balancing loss's as it is."""
        weights = plan.weights
        of_l = weights.policy + weights.kl

        def constants(i: Tensor, t: Tensor, l: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return of_l[i, t].unsqueeze(0), weights.bonus[i, t].unsqueeze(0)

        policy = self.source.policy
        (gradient,), _ = token_gradients(policy, self.sample.U, constants, 1)
        for name, of_router in (self.update.router or {}).items():
            gradient[name] = gradient[name] + of_router
        return gradient

    def _change(self, step: Mapping[str, Tensor]) -> Change:
        """The first-order change along a step; without errors where the gradients of E's parts are not held."""
        held = self.shortcut.found.sensitivities
        total, of_blocks = held.of_step(step)
        if of_blocks is None:
            return change_without_errors(total, held.blocks)
        return changes(total, of_blocks, held.blocks)[0]

    def measured(self, taken: TakenStep, asis: Measured | None = None) -> Measured:
        """What a step is measured to do: E is scored after it. Without `asis` it is the update as it is."""
        E, old = self.sample.E, self.sample.E_scores
        new = score_tokens(self.source.policy.at(taken.new_parameters), E)
        true = change_by("per_decision", old, new, E.group)
        difference = (
            true.map(lambda one: one.scaled(0.0))
            if asis is None
            else true.with_other(lambda a, b: a - b, asis.deltaH_true)
        )
        weights = weight_diagnostics((new.logprob - old.logprob).sum(dim=1))
        return Measured(true, difference, weights, taken.clip_factor)
