"""What a pilot recommends: sizes of E and of U, and what a run of these sizes would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from probe.config.numbers import is_finite
from probe.estimand import ESTIMANDS, Estimand, PerEstimand
from probe.estimators.power import Pilot, Size, needed_size, needed_updates, resolvable, size_for
from probe.plan.passes import Cost, Pass, cost_of
from probe.plan.settings import PlanConfig
from probe.results.result import ProbeResult
from probe.verdict.facts import Facts
from probe.verdict.resolution import PRECISE
from probe.verdict.sample import FEW_RESPONSES
from probe.verdict.sentences import round_up, share_text

SPREAD = 0.5
"""Largest spread over U, as a share of deltaH1, that still says which way such updates move the entropy."""
QUANTITIES = ("deltaH_true", "deltaH1")
"""What is planned for, the headline one first."""


@dataclass(frozen=True)
class Wanted:
    """A batch size, in prompts.

    Attributes:
        size: recommended; None where the pilot is too noisy to recommend one.
        low: what would do if the change were as large as the pilot leaves open.
        high: what it would take if it were as small; None where the pilot's interval contains 0.
    """

    size: int | None
    low: int
    high: int | None

    @classmethod
    def of(cls, found: Size, least: int) -> Wanted:
        """A size as it is recommended: `least` or more, and rounded up to two digits."""
        size, low, high = (
            None if one is None else round_up(max(one, least))
            for one in (found.recommended, found.low, found.high)
        )
        return cls(size, round_up(least) if low is None else low, high)


LEAST_PILOT = 8
"""Prompts below which a pilot says too little of the size of its own error to recommend more than a second pilot."""


@dataclass(frozen=True)
class ChangePlan:
    """What one change of entropy asks for.

    Attributes:
        value: that the pilot found, nats.
        se: its standard error.
        df: degrees of freedom of that.
        resolved: whether the pilot's own interval excludes 0.
        resolves: `B_E` for an interval that excludes 0.
        precise: `B_E` for `PRECISE` standard errors, as `trustworthy` asks.
        resolvable: the change, nats, that the pilot's own size resolves with the planned probability.
        of_one_se: `B_E` that resolves a change of one standard error of the pilot.
    """

    value: float
    se: float
    df: float
    resolved: bool
    resolves: Wanted
    precise: Wanted
    resolvable: float
    of_one_se: int


@dataclass(frozen=True)
class UpdatePlan:
    """What the spread of deltaH1 over update batches asks for.

    Attributes:
        sd_U: how much another U of the pilot's size would move deltaH1, nats.
        share: of the size of deltaH1 that this is, in words.
        B_U: prompts for which it is at most `SPREAD`.
    """

    sd_U: float
    share: str
    B_U: Wanted


@dataclass(frozen=True)
class RunCost:
    """What a run would cost, extrapolated from the pilot's times.

    Attributes:
        what: the run.
        B_E: its prompts in E.
        B_U: its prompts in U.
        responses: that go through the model, all passes counted.
        seconds: on this machine, loading included.
    """

    what: str
    B_E: int
    B_U: int
    responses: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a pilot recommends.

    Attributes:
        checkpoint: its name.
        B_E: prompts of the pilot's E.
        B_U: prompts of its U.
        learning_rate: of the update.
        power: probability that is planned for.
        changes: by quantity, for each estimand; None where it is not known: not computed, null, or without an error.
        updates: for each estimand; None where the spread over U is not known.
        cost: of the pilot.
        costs: of the runs that are recommended, the pilot first.
        second_pilot: `B_E` of another pilot, where this one is too noisy to recommend a size; else None.
        with_controls: whether the pilot's errors are those with control variates.
    """

    checkpoint: str
    B_E: int
    B_U: int
    learning_rate: float | None
    power: float
    changes: dict[str, PerEstimand[ChangePlan | None]]
    updates: PerEstimand[UpdatePlan | None]
    cost: Cost
    costs: tuple[RunCost, ...]
    second_pilot: int | None
    with_controls: bool

    @property
    def headline(self) -> ChangePlan | None:
        """The first change that there is a plan for: measured before predicted, per token before per response."""
        found = (both[one] for one in ESTIMANDS for both in self.changes.values())
        return next((one for one in found if one is not None), None)

    def as_mapping(self) -> dict[str, Any]:
        """Plain types; changes under their keys in a result (`deltaH_true_tok`), the spread as `deltaH1_tok_sd_U`."""
        named: dict[str, Any] = {}
        for estimand in ESTIMANDS:
            for name, both in self.changes.items():
                one = both[estimand]
                named[estimand.key(name)] = None if one is None else asdict(one)
        for estimand in ESTIMANDS:
            spread = self.updates[estimand]
            named[estimand.key("deltaH1", "_sd_U")] = None if spread is None else asdict(spread)
        return {
            "pilot_B_E": self.B_E,
            "pilot_B_U": self.B_U,
            "power": self.power,
            **named,
            "second_pilot_B_E": self.second_pilot,
            "control_variates": self.with_controls,
            "cost": asdict(self.cost),
            "runs": [asdict(one) for one in self.costs],
        }


def plan_of(result: ProbeResult, passes: Sequence[Pass], settings: PlanConfig) -> Plan:
    """The plan that a pilot makes.

    Args:
        result: of the pilot.
        passes: of the pilot.
        settings: the section `plan`.
    """
    facts, power = Facts.of(result.values), settings.power
    B_E, B_U = int(facts.draws or result.sizes.B_E), result.sizes.B_U or 0
    pilots = {
        name: PerEstimand.of([_pilot(facts, name, e, B_E) for e in reversed(ESTIMANDS)])
        for name in QUANTITIES
    }
    changes: dict[str, PerEstimand[ChangePlan | None]] = {
        name: both.map(lambda one: None if one is None else _change_plan(one, power))
        for name, both in pilots.items()
    }
    updates: PerEstimand[UpdatePlan | None] = PerEstimand.of(
        [_update_plan(facts, pilots["deltaH1"][e], e, B_U, power) for e in reversed(ESTIMANDS)]
    )
    plan = Plan(
        checkpoint=result.checkpoint_name,
        B_E=B_E,
        B_U=B_U,
        learning_rate=result.learning_rate,
        power=power,
        changes=changes,
        updates=updates,
        cost=cost_of(passes, result.timing),
        costs=(),
        second_pilot=None,
        with_controls=str(facts.diagnostics.get("control_variates") or "").startswith("on"),
    )
    return _with_runs(plan, result)


def _pilot(facts: Facts, name: str, estimand: Estimand, draws: int) -> Pilot | None:
    """A change as the pilot found it; None where nothing can be planned from it."""
    given, change = facts.number(name, estimand), facts.change(name, estimand)
    if given is None or change.value is None or not change.se:
        return None
    df = given.df if given.df is not None and is_finite(given.df) else draws - 1.0
    return Pilot(change.value, change.se, max(df, 1.0), draws)


def _change_plan(pilot: Pilot, power: float) -> ChangePlan:
    """What a change asks for."""
    resolves, precise = needed_size(pilot, power), needed_size(pilot, power, PRECISE)
    if pilot.size < LEAST_PILOT:
        resolves, precise = replace(resolves, recommended=None), replace(precise, recommended=None)
    return ChangePlan(
        value=pilot.value,
        se=pilot.se,
        df=pilot.df,
        resolved=pilot.resolved,
        resolves=Wanted.of(resolves, FEW_RESPONSES),
        precise=Wanted.of(precise, FEW_RESPONSES),
        resolvable=resolvable(pilot, pilot.size, power),
        of_one_se=round_up(max(size_for(pilot, 1.0, power), FEW_RESPONSES)),
    )


def _update_plan(
    facts: Facts, pilot: Pilot | None, estimand: Estimand, B_U: int, power: float
) -> UpdatePlan | None:
    """What the spread over U asks for."""
    given = facts.number("deltaH1", estimand)
    if given is None or pilot is None or given.sd_U is None:
        return None
    found = needed_updates(pilot, given.sd_U, B_U, SPREAD, power)
    if found is None:
        return None
    return UpdatePlan(given.sd_U, share_text(given.sd_U, pilot.value), Wanted.of(found, 2))


def _with_runs(plan: Plan, result: ProbeResult) -> Plan:
    """The plan with what the recommended runs cost, and the size of a second pilot where there is none."""
    headline, spread = plan.headline, next((plan.updates[e] for e in ESTIMANDS if plan.updates[e]), None)
    B_U = None if spread is None else spread.B_U.size
    second = None
    sizes: list[tuple[str, int | None, int]] = [("pilot", plan.B_E, plan.B_U)]
    if headline is not None:
        resolves, precise = headline.resolves.size, headline.precise.size
        second = headline.of_one_se if resolves is None else None
        sizes += [
            ("second pilot", second, plan.B_U),
            ("resolves", resolves, plan.B_U),
            ("precise", precise, plan.B_U),
        ]
        if B_U is not None and B_U > plan.B_U:
            sizes.append(("steadier U", resolves, B_U))
    each_E, each_U = result.sizes.B_E / plan.B_E, result.sizes.G or 1
    costs = tuple(
        RunCost(
            what=what,
            B_E=B_E,
            B_U=B_U,
            responses=round(plan.cost.passes_E * each_E * B_E + plan.cost.passes_U * each_U * B_U),
            seconds=plan.cost.seconds(B_E / plan.B_E, B_U / plan.B_U if plan.B_U else 1.0),
        )
        for what, B_E, B_U in sizes
        if B_E is not None
    )
    return replace(plan, costs=costs, second_pilot=second)
