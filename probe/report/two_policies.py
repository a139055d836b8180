"""Two policies on one E, from the logs of their runs: one has drawn it, the other's numbers have importance weights.

With `l_o` the log-probs of the responses under the owner of E before its update, a policy with log-probs `l` has the
entropy that weights `exp(l - l_o)` give (`level_elsewhere`). Those of both runs before and after their updates are
estimators of one sample, so that all differences of them have paired errors, those of changes too.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace

from probe.errors.exceptions import LogError
from probe.estimand import ESTIMANDS, Estimand, Number
from probe.estimators.estimate import Estimate, Estimates
from probe.estimators.importance_weights import WeightDiagnostics, weight_diagnostics
from probe.estimators.paired import level_elsewhere, paired_difference
from probe.report.comparison import ComparedRow
from probe.report.logged_run import LoggedRun
from probe.report.matching import PAIRED
from probe.results.changes import reported
from probe.verdict.sample import ESS_LOW, EVEN_ESS

OTHER_POLICY = "E_not_from_this_policy"
"""The flag of a run whose E was visibly not drawn from its policy."""


@dataclass(frozen=True)
class Level:
    """The entropy of one of the policies on the owner's E.

    Attributes:
        name: of the run, and when: `B before`.
        level: with its error over the prompts of E.
        weights: that it was made with.
    """

    name: str
    level: Estimates
    weights: WeightDiagnostics

    @classmethod
    def of(cls, run: LoggedRun, when: str, owner: LoggedRun) -> Level:
        """Read one, `before` or `after` the update of a run."""
        log_w = run.column(f"logprob_{when}") - owner.column("logprob_before")
        level = level_elsewhere(log_w, run.column(f"entropy_{when}"), owner.column("length"), owner.group)
        return cls(f"{run.name} {when}", level, weight_diagnostics(log_w))

    @property
    def even(self) -> bool:
        """Whether means with these weights can be relied on, by the limits of the verdict on a run's own weights."""
        share = self.weights.ess / len(self.weights.weights)
        return share >= EVEN_ESS or (share >= ESS_LOW and self.weights.pareto_k_good is not False)

    @property
    def words(self) -> str:
        """Whose, and how good the weights are."""
        k = "not fitted" if self.weights.pareto_k is None else f"{self.weights.pareto_k:.2f}"
        return f"{self.name} ESS {self.weights.ess:.0f} of {len(self.weights.weights)}, Pareto k {k}"


def of_two_policies(a: LoggedRun, b: LoggedRun) -> tuple[list[ComparedRow], list[str]]:
    """The rows of two policies on one E, and what to know about them.

    Raises:
        LogError: which of them has drawn E cannot be told, or nothing can be compared.
    """
    owner = _owner(a, b)
    both = " (as the other one has: A's are taken)" if a.sampled and b.sampled else ""
    start = f"Two policies; E was drawn from {owner.name}'s{both}."
    before = [Level.of(run, "before", owner) for run in (a, b)]
    if uneven := _uneven(before):
        raise LogError(
            f"expected two policies that one E can measure, found importance weights that are too uneven ({uneven}); "
            "compare runs with an E of each one's own: on the same prompts, or with --unpaired (from Python "
            "unpaired=True)"
        )
    rows = _rows(a, b, "H_orig", before)
    weighted = [one for one, run in zip(before, (a, b), strict=True) if run is not owner]
    notes = []
    if all("logprob_after" in run.records[0] for run in (a, b)):
        after = [Level.of(run, "after", owner) for run in (a, b)]
        if uneven := _uneven(after):
            notes.append(
                f"H after and deltaH_true are not compared: weights after the updates are too uneven ({uneven})."
            )
        else:
            weighted += after
            change = [
                Level(new.name, new.level.with_other(operator.sub, old.level), new.weights)
                for new, old in zip(after, before, strict=True)
            ]
            rows += [*_rows(a, b, "H_upd", after), *_rows(a, b, "deltaH_true", change)]
    words = "; ".join(one.words for one in weighted)
    limit = weighted[0].weights.pareto_k_limit
    return rows, [
        f"{start} All numbers are of these responses, by one importance weight per response ({words}; its limit "
        f"{limit:.2f}), and so not those of the runs' own reports.",
        *notes,
        "deltaH1 is not compared: its derivatives are in no log with weights. Compare it on an E of each policy's own, "
        "to the same prompts.",
    ]


def _owner(a: LoggedRun, b: LoggedRun) -> LoggedRun:
    """The run whose policy has drawn E; A where both have.

    Raises:
        LogError: that cannot be told.
    """
    drawn = [run for run in (a, b) if run.sampled]
    plausible = drawn or [run for run in (a, b) if OTHER_POLICY not in run.flags]
    if not drawn and len(plausible) != 1:
        raise LogError(
            "expected an E that one of the two policies has drawn, found one that both have read from a file "
            f"({a.log['sequences'].get('E_rollouts')}), so that nothing says whose entropies it measures; run A "
            f"without batch_config.E_rollouts, and {PAIRED.format(a='the log of that').removeprefix('re')}"
        )
    return plausible[0]


def _uneven(levels: list[Level]) -> str:
    """Those whose weights are too uneven; empty for none."""
    return "; ".join(f"{one.words}, limit {one.weights.pareto_k_limit:.2f}" for one in levels if not one.even)


def _rows(a: LoggedRun, b: LoggedRun, quantity: str, levels: list[Level]) -> list[ComparedRow]:
    """A quantity of both runs."""
    first, second = (one.level for one in levels)
    return [_row(a, b, quantity, estimand, first[estimand], second[estimand]) for estimand in ESTIMANDS]


def _row(
    a: LoggedRun, b: LoggedRun, quantity: str, estimand: Estimand, first: Estimate, second: Estimate
) -> ComparedRow:
    """A quantity with the paired difference. What two E would have left is not known: each would need no weights."""
    floors = [run.floor("deltaH_true", estimand) for run in (a, b)]
    found, floor = paired_difference(first, second), math.hypot(*floors)
    row = ComparedRow(quantity, estimand, reported(first), reported(second), found.number)
    if quantity == "deltaH_true":
        seen = [abs(one.value) >= least for one, least in zip((first, second), floors, strict=True)]
        if not all(seen):
            names = " and ".join(run.name for run, is_seen in zip((a, b), seen, strict=True) if not is_seen)
            return replace(
                row,
                a=row.a if seen[0] else Number(None),
                b=row.b if seen[1] else Number(None),
                difference=None,
                note=f"{names}: not resolved (below the noise floor)",
            )
    if abs(found.value) < floor:
        return replace(row, difference=None, note=f"B - A is below the noise floor ({floor:.2g})")
    return row
