"""What if: interventions compared on the update that was probed, and the steps of chosen ones really taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from probe.attribution.interventions import INTERVENTIONS, Plan, parse_intervention
from probe.attribution.token_classes import KINDS
from probe.attribution.what_if import Effect, Shortcut, Solution, estimand_named
from probe.config.what_if import WhatIfConfig
from probe.estimators.estimate import Estimates
from probe.estimators.ground_truth import change_by
from probe.loading.optimizer import LoadedOptimizer
from probe.phases.attribution import Attribution
from probe.phases.passes import StepOnBatch, along_step
from probe.phases.prediction import Predicted, predict
from probe.phases.sample import BatchSource, Sample
from probe.phases.update import Update, take_step
from probe.scoring.collector import MakeProgress, no_progress
from probe.scoring.gradients import token_gradients
from probe.scoring.policy import Policy
from probe.scoring.score import score_tokens

DROPPED = ("right", "wrong", "highest fifth", *KINDS)
"""The classes of tokens that are left out one after another where nobody names interventions."""


@dataclass(frozen=True)
class Taken:
    """What the optimizer's step with an intervention does, taken on a snapshot.

    Attributes:
        deltaH1: first-order change along that step, nats, with errors over E, without control variates.
        deltaH_true: the measured change, `per_decision`, nats; without control variates.
        difference_true: the measured change less that of the update as it is, on the same E.
        clip_factor: what clipping multiplied the gradient by.
    """

    deltaH1: Estimates
    deltaH_true: Estimates
    difference_true: Estimates
    clip_factor: float


@dataclass(frozen=True)
class WhatIf:
    """Interventions on one update.

    Attributes:
        asis: the update as it is.
        effects: of the interventions, in the order that they were asked for.
        taken: the steps that were really taken, by the name of the intervention; the update as it is under "".
        solutions: settings that meet the target.
        skipped: interventions that cannot be made of this U, with the reason.
    """

    asis: Effect
    effects: Sequence[Effect]
    taken: dict[str, Taken]
    solutions: Sequence[Solution]
    skipped: dict[str, str]


def what_if(
    source: BatchSource,
    sample: Sample,
    update: Update,
    loaded: LoadedOptimizer,
    predicted: Predicted,
    attributed: Attribution,
    progress: MakeProgress = no_progress,
) -> WhatIf:
    """Compare interventions, take the steps of those that are asked for, and solve for a target.

    Args:
        source: policy and configuration.
        sample: E with its scores, and U.
        update: the step from U as it is.
        loaded: the optimizer at its saved state.
        predicted: deltaH1 with the passes over E.
        attributed: the contributions of U's tokens.
        progress: makes a progress callback from the name of a pass.

    Raises:
        ConfigError: an unknown intervention or option, or one that was asked for cannot be made of this U.
        NumericalError: a gradient, step or score is not finite.
    """
    config = source.config.whatif
    shortcut = Shortcut(attributed.contributions, attributed.tokens, update.loss, update.inputs)
    effects, skipped = _effects(shortcut, config)
    solutions = [] if config.target_deltaH is None else _solutions(shortcut, config)
    for solution in solutions:
        if solution.setting is not None:
            effects.append(shortcut.effect(parse_intervention(solution.intervention)))
    by_name = {one.name: one for one in effects}
    chosen = list(by_name) if "all" in config.exact else [parse_intervention(n).text for n in config.exact]
    for name in chosen:
        if name not in by_name and name not in skipped:
            effects.append(shortcut.effect(parse_intervention(name)))
            by_name[name] = effects[-1]
    chosen += [s.intervention for s in solutions if s.setting is not None and s.intervention not in chosen]
    asis = shortcut.effect()
    taker = StepTaker(source, sample, update, loaded, predicted)
    taken: dict[str, Taken] = {}
    if chosen:
        before, told = taker.take(asis.plan, None, progress), progress("steps of interventions")
        taken[""] = before
        wanted = [name for name in dict.fromkeys(chosen) if name in by_name]
        for n, name in enumerate(wanted):
            taken[name] = taker.take(by_name[name].plan, before, progress)
            told(n + 1, len(wanted))
    return WhatIf(asis, effects, taken, solutions, skipped)


def check_interventions(config: WhatIfConfig) -> None:
    """Refuse names and options that do not exist, before anything is loaded.

    Raises:
        ConfigError: see `parse_intervention`.
    """
    for name in [*config.interventions, *(one for one in config.exact if one != "all")]:
        parse_intervention(name)


def _effects(shortcut: Shortcut, config: WhatIfConfig) -> tuple[list[Effect], dict[str, str]]:
    """The effects of those asked for; of all with their published defaults where none are named."""
    if config.interventions:
        return [shortcut.effect(parse_intervention(name)) for name in config.interventions], {}
    effects, skipped = [], {}
    for name, one in INTERVENTIONS.items():
        reason = one.lacks(shortcut.tokens)
        if reason:
            skipped[name] = reason
        elif name == "drop":
            classes = [one for one in DROPPED if one in shortcut.tokens.classes]
            effects += [shortcut.effect(parse_intervention(f"drop(tokens_of={one})")) for one in classes]
        else:
            effects.append(shortcut.effect(parse_intervention(name)))
    return effects, skipped


def _solutions(shortcut: Shortcut, config: WhatIfConfig) -> list[Solution]:
    """The settings that meet the target."""
    assert config.target_deltaH is not None
    estimand = estimand_named(config.target_estimand)
    return [shortcut.solve(config.target_deltaH, estimand, solver) for solver in config.solve_for]


@dataclass(frozen=True)
class StepTaker:
    """Takes the optimizer's step for a planned update, on a snapshot.

    Attributes:
        source: policy and configuration.
        sample: E with its scores, and U.
        update: the step from U as it is.
        loaded: the optimizer at its saved state.
        predicted: deltaH1 with the passes over E.
    """

    source: BatchSource
    sample: Sample
    update: Update
    loaded: LoadedOptimizer
    predicted: Predicted

    def take(self, plan: Plan, asis: Taken | None, progress: MakeProgress = no_progress) -> Taken:
        """Take the step and measure what it does.

        Args:
            plan: the update.
            asis: the update as it is; None where this is it.
            progress: makes a progress callback from the name of a pass.
        """
        policy, sample, rework = self.source.policy, self.sample, self.source.config.probe_rework
        assert self.predicted.passes is not None
        gradient = self.gradient(policy, plan, progress)
        taken = take_step(policy, self.loaded, gradient, self.source.config, plan.learning_rate_factor)
        way = self.predicted.passes.way
        on = StepOnBatch(policy, sample.E, taken.step, scores=sample.E_scores, progress=progress)
        along = along_step(on, way, check=False, binding=True)
        found = predict(along, sample.E.group, self.update.learning_rate, rework.weighting, rework.baseline)
        new = score_tokens(policy.at(taken.new_parameters), sample.E, progress("score E after the step"))
        true = change_by("per_decision", sample.E_scores, new, sample.E.group)
        return Taken(
            deltaH1=found.estimates[rework.weighting],
            deltaH_true=true,
            difference_true=true.map(lambda one: one.scaled(0.0))
            if asis is None
            else true.with_other(lambda a, b: a - b, asis.deltaH_true),
            clip_factor=taken.clip_factor,
        )

    def gradient(self, policy: Policy, plan: Plan, progress: MakeProgress = no_progress) -> dict[str, Tensor]:
        """The gradient of a planned update's loss, the load-balancing loss's as it is."""
        weights = plan.weights
        of_l = weights.policy + weights.kl

        def constants(i: Tensor, t: Tensor, l: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return of_l[i, t].unsqueeze(0), weights.bonus[i, t].unsqueeze(0)

        (gradient,), _ = token_gradients(policy, self.sample.U, constants, 1, progress("gradient on U"))
        for name, of_router in (self.update.router or {}).items():
            gradient[name] = gradient[name] + of_router
        return gradient
