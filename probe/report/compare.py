"""Two runs compared by their logs: paired differences on one E, see `docs/compare.md`."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from probe.errors.exceptions import LogError
from probe.estimand import ESTIMANDS, Estimand, Number
from probe.estimators.estimate import Estimate
from probe.estimators.importance_weights import WeightDiagnostics, weight_diagnostics
from probe.estimators.paired import (
    Difference,
    independent_difference,
    level_elsewhere,
    paired_difference,
)
from probe.report.comparison import LABELS, ComparedRow, Comparison
from probe.report.logged_run import Log, LoggedRun
from probe.results.changes import reported
from probe.verdict.sample import ESS_LOW, EVEN_ESS

ROUNDING, HALF_ROUNDING = 1e-3, 0.05
"""Nats: log-prob and entropy of a response that are nearer than this times the root of its length are taken for those
of one policy, in 32 and in 16 bits. Weights so near to 1 change nothing that is shown."""
OTHER_POLICY = "E_not_from_this_policy"
"""The flag of a run whose E was visibly not drawn from its policy."""
NO_ERROR = "error not known: a run without derivatives per token, or with a fresh E after the step"
PAIRED = "rerun B with --batch_config.E_rollouts {a}, or with A's seed_everything and sizes of E"


def compare(
    a: str | os.PathLike[str] | Log, b: str | os.PathLike[str] | Log, unpaired: bool = False
) -> Comparison:
    """What run B has more than run A, with errors that know what both have in common.

    Args:
        a: the log of a run, from level `detailed` on: a path, or what `load_log` gave.
        b: that of another run on the same E.
        unpaired: where the two E differ, take the errors as independent instead of refusing.

    Raises:
        LogError: a file is no log with what it takes, or E differs and `unpaired` was not asked for.
    """
    first, second = LoggedRun.of(a, "A"), LoggedRun.of(b, "B")
    order = None
    if not unpaired or (first.has_responses and second.has_responses):
        order = _order(first, second)
    if order is not None:
        return _paired(first, second.in_order(order, first.group))
    if not unpaired and (group := _same_prompts(first, second)) is not None:
        return _by_prompt(first, replace(second, group=group))
    if not unpaired:
        raise LogError(_different(first, second))
    return _unpaired(first, second)


# ---------------------------------------------------------------- one E


def _order(a: LoggedRun, b: LoggedRun) -> list[int] | None:
    """Which response of B is each one of A; None where they are not the same responses in the same groups.

    Groups are matched by what is in them. Equal ones are exchangeable: they have equal influences.
    """
    if a.responses == b.responses and torch.equal(a.rank, b.rank):
        return list(range(len(a.records)))
    there: dict[tuple[Any, ...], list[list[int]]] = defaultdict(list)
    for content, rows in _groups(b):
        there[content].append(rows)
    order = [-1] * len(a.records)
    for content, rows in _groups(a):
        if not there[content]:
            return None
        for own, other in zip(rows, there[content].pop(0), strict=True):
            order[own] = other
    return None if any(there.values()) else order


def _groups(run: LoggedRun) -> Iterator[tuple[tuple[Any, ...], list[int]]]:
    """The content of every group, and its rows in the order of that."""
    rows: dict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(run.rank.tolist()):
        rows[group].append(i)
    for members in rows.values():
        members.sort(key=lambda i: run.responses[i])
        yield tuple(run.responses[i] for i in members), members


def _different(a: LoggedRun, b: LoggedRun) -> str:
    """Why two runs are not on one E, and what to do."""
    common = (Counter(a.responses) & Counter(b.responses)).total()
    found = f"{len(a.responses)} and {len(b.responses)} responses, {common} of them in common"
    if common == len(a.responses) == len(b.responses):
        found = "the same responses in other groups"
    steps = [run.results.get("training_step") for run in (a, b)]
    if None not in steps and steps[0] != steps[1]:
        remedy = (
            f"checkpoints of different steps ({steps[0]} and {steps[1]}) draw responses of their own: give both runs "
            "the same prompts (seed_everything, B_E and data), or"
        )
    else:
        remedy = f"{PAIRED.format(a=a.path or 'A.json.gz')}, or"
    return (
        f"expected two runs on the same E, found {found}; {remedy} pass --unpaired (from Python unpaired=True) for "
        "independent errors"
    )


def _paired(a: LoggedRun, b: LoggedRun) -> Comparison:
    """Two runs on one E."""
    same = _same_policy(a, b)
    notes = _flag_notes(a, b)
    rows: list[ComparedRow] = []
    if same:
        rows = _rows(a, b, ("H_upd", "deltaH1", "deltaH_true"))
        levels = [_level(a, b, e, "one policy: the updates start from the same entropy") for e in ESTIMANDS]
        rows = [*(one for one in levels if one is not None), *rows]
    else:
        rows, more = _of_two_policies(a, b)
        notes += more
    if not rows:
        raise LogError(f"expected something that both runs have, found nothing: {' '.join(notes)}")
    place = list(LABELS)
    return Comparison(
        a=a.described(),
        b=b.described(),
        how="paired",
        same_policy=same,
        responses=len(a.records),
        prompts=len(a.group.unique()),
        rows=tuple(sorted(rows, key=lambda row: (ESTIMANDS.index(row.estimand), place.index(row.quantity)))),
        notes=tuple(notes),
    )


def _same_policy(a: LoggedRun, b: LoggedRun) -> bool:
    """Whether one policy scored E in both runs: log-probs and entropies of every response agree within rounding."""
    half = "half_precision" in (*a.flags, *b.flags)
    room = (HALF_ROUNDING if half else ROUNDING) * a.column("length").sqrt()
    gaps = [(b.column(name) - a.column(name)).abs() for name in ("logprob_before", "entropy_before")]
    return all(bool((gap <= room).all()) for gap in gaps)


def _rows(a: LoggedRun, b: LoggedRun, quantities: Sequence[str]) -> list[ComparedRow]:
    """The rows of quantities that both runs have."""
    found = [_row(a, b, name, estimand) for estimand in ESTIMANDS for name in quantities]
    return [row for row in found if row is not None]


def _row(
    a: LoggedRun, b: LoggedRun, quantity: str, estimand: Estimand, same_fit: bool | None = None
) -> ComparedRow | None:
    """A quantity with the paired difference; None where one of the runs does not have it.

    `same_fit` as in `paired_difference`; None where the order of the prompts says it.
    """
    first, second = (run.number(quantity, estimand) for run in (a, b))
    if first is None or second is None:
        return None
    unresolved = [run.name for run, n in ((a, first), (b, second)) if n.value is None]
    if unresolved:
        note = f"{' and '.join(unresolved)}: not resolved (below the noise floor)"
        return ComparedRow(quantity, estimand, first, second, None, note=note)
    mine, other = (run.estimate(quantity, estimand) for run in (a, b))
    if mine is None or other is None:
        difference = Number(_value(second) - _value(first))
        return ComparedRow(quantity, estimand, first, second, difference, note=NO_ERROR)
    found = paired_difference(mine, other, torch.equal(a.rank, b.rank) if same_fit is None else same_fit)
    unpaired_se = math.hypot(mine.se, other.se)
    first, second = _with_error(first, mine), _with_error(second, other)
    floor = math.hypot(*(run.floor(quantity, estimand) for run in (a, b)))
    if abs(found.value) < floor:
        note = f"B - A is below the noise floor ({floor:.2g})"
        return ComparedRow(quantity, estimand, first, second, None, unpaired_se, note)
    return ComparedRow(quantity, estimand, first, second, _number(found), unpaired_se)


def _level(a: LoggedRun, b: LoggedRun, estimand: Estimand, note: str) -> ComparedRow | None:
    """The entropy before, of one policy."""
    first, second = (run.number("H_orig", estimand) for run in (a, b))
    if first is None or second is None:
        return None
    return ComparedRow("H_orig", estimand, first, second, None, note=note)


# ---------------------------------------------------------------- the same prompts


def _same_prompts(a: LoggedRun, b: LoggedRun) -> Tensor | None:
    """For B's responses the groups of A that have the same prompts; None where the two E are of other prompts.

    Several draws of one prompt are exchangeable.
    """
    there: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for group, prompt in reversed(_prompts(a).items()):
        there[prompt].append(group)
    renamed: dict[int, int] = {}
    for group, prompt in _prompts(b).items():
        if not there[prompt]:
            return None
        renamed[group] = there[prompt].pop()
    if any(there.values()):
        return None
    return torch.tensor([renamed[group] for group in b.group.tolist()], dtype=torch.int64)


def _prompts(run: LoggedRun) -> dict[int, tuple[int, ...]]:
    """The prompt of every group, by token ids, in the order of the log."""
    return {group: prompt for group, (prompt, _) in zip(run.group.tolist(), run.responses, strict=True)}


def _by_prompt(a: LoggedRun, b: LoggedRun) -> Comparison:
    """Two runs with responses of their own to the same prompts: of two checkpoints, say.

    Prompts are the independent units of all errors, and every quantity is that of the run's own policy on its own E.
    """
    found = [_row(a, b, name, estimand, same_fit=False) for estimand in ESTIMANDS for name in LABELS]
    rows = tuple(row for row in found if row is not None)
    if not rows:
        raise LogError("expected something that both runs have, found nothing: neither level nor change")
    note = (
        "Each run has responses of its own to the same prompts: what the prompts share cancels in the differences, "
        "what the responses draw does not. Two updates of one policy are known better on one E "
        f"({PAIRED.format(a=a.path or 'A.json.gz')})."
    )
    return Comparison(
        a=a.described(),
        b=b.described(),
        how="by prompt",
        same_policy=None,
        responses=None,
        prompts=len(a.group.unique()),
        rows=rows,
        notes=(note, *_flag_notes(a, b)),
    )


# ---------------------------------------------------------------- two policies


def _of_two_policies(a: LoggedRun, b: LoggedRun) -> tuple[list[ComparedRow], list[str]]:
    """The rows of two policies on one E, and what to know about them."""
    if a.sampled and b.sampled:
        note = "Two policies, each of which has drawn this E (the same seed, and nearly the same policy)."
        return _rows(a, b, tuple(LABELS)), [note]
    owner = _owner(a, b)
    other = b if owner is a else a
    rows, notes = _weighted_levels(a, b, owner, other)
    if OTHER_POLICY in other.flags:
        notes.append(
            f"The changes are not compared: {other.name}'s are averages over {owner.name}'s responses, which its own "
            f"policy would not draw ({OTHER_POLICY}). Compare their changes on an E of each one's own (--unpaired)."
        )
        return rows, notes
    notes.append(
        f"{other.name}'s changes are averages over {owner.name}'s responses, without weights; {other.name}'s log finds "
        "no sign that its own policy would draw others."
    )
    return [*rows, *_rows(a, b, ("deltaH1", "deltaH_true"))], notes


def _owner(a: LoggedRun, b: LoggedRun) -> LoggedRun:
    """The run whose policy has drawn E.

    Raises:
        LogError: that cannot be told.
    """
    drawn = [run for run in (a, b) if run.sampled]
    plausible = drawn or [run for run in (a, b) if OTHER_POLICY not in run.flags]
    if len(plausible) != 1:
        raise LogError(
            "expected an E that one of the two policies has drawn, found one that both have read from a file "
            f"({a.log['sequences'].get('E_rollouts')}), so that nothing says whose entropies it measures; run A "
            f"without batch_config.E_rollouts, and {PAIRED.format(a='the log of that').removeprefix('re')}"
        )
    return plausible[0]


def _weighted_levels(
    a: LoggedRun, b: LoggedRun, owner: LoggedRun, other: LoggedRun
) -> tuple[list[ComparedRow], list[str]]:
    """The entropies of the two policies, that of the other one with importance weights."""
    log_w = other.column("logprob_before") - owner.column("logprob_before")
    weights = weight_diagnostics(log_w)
    reweighted = level_elsewhere(log_w, other.column("entropy_before"), other.column("length"), owner.group)
    note = _weight_note(owner, other, weights, len(log_w))
    if not _even(weights):
        return [], [note]
    rows = []
    for estimand in ESTIMANDS:
        own, level = owner.estimate("H_orig", estimand), reweighted[estimand]
        if own is None:
            continue
        first, second = (own, level) if owner is a else (level, own)
        difference = _number(paired_difference(first, second))
        unpaired_se = math.hypot(own.se, level.se)
        rows.append(
            ComparedRow("H_orig", estimand, reported(first), reported(second), difference, unpaired_se)
        )
    return rows, [note]


def _weight_note(owner: LoggedRun, other: LoggedRun, weights: WeightDiagnostics, B: int) -> str:
    """How the other policy's entropy comes from the owner's responses."""
    k = "not fitted" if weights.pareto_k is None else f"{weights.pareto_k:.2f}"
    of = f"ESS {weights.ess:.0f} of {B}, Pareto k {k}, limit {weights.pareto_k_limit:.2f}"
    start = f"Two policies; E was drawn from {owner.name}'s."
    if not _even(weights):
        return f"{start} {other.name}'s entropy is not compared: its weights on these responses are too uneven ({of})."
    return f"{start} H before of {other.name} is by importance weights on these responses ({of})."


def _even(weights: WeightDiagnostics) -> bool:
    """Whether means with these weights can be relied on, by the limits of the verdict on a run's own weights."""
    share = weights.ess / len(weights.weights)
    return share >= EVEN_ESS or (share >= ESS_LOW and weights.pareto_k_good is not False)


# ---------------------------------------------------------------- two E


def _unpaired(a: LoggedRun, b: LoggedRun) -> Comparison:
    """Two runs with independent errors."""
    rows = []
    for estimand in ESTIMANDS:
        for quantity in ("H_orig", "deltaH1", "deltaH_true"):
            first, second = (run.number(quantity, estimand) for run in (a, b))
            if first is None or second is None:
                continue
            mine, other = _known(first), _known(second)
            if mine is None or other is None:
                note = (
                    "not resolved in one of the runs, or without an error in its log (level standard has it)"
                )
                rows.append(ComparedRow(quantity, estimand, first, second, None, note=note))
            else:
                found = independent_difference(mine, other)
                rows.append(ComparedRow(quantity, estimand, first, second, _number(found)))
    if not rows:
        raise LogError("expected something that both runs have, found nothing: neither level nor change")
    notes = [
        "The two E are different draws: their errors are taken as independent. Differences of updates are often far "
        "smaller than what two draws of E differ by: on one E they are known much better "
        f"({PAIRED.format(a=a.path or 'A.json.gz')}).",
        *_flag_notes(a, b),
    ]
    return Comparison(a.described(), b.described(), "unpaired", None, None, None, tuple(rows), tuple(notes))


def _known(number: Number) -> tuple[float, float, float] | None:
    """Value, standard error and degrees of freedom; None where one is not known."""
    if number.value is None or number.se is None or number.df is None:
        return None
    return number.value, number.se, number.df


# ---------------------------------------------------------------- both


def _flag_notes(a: LoggedRun, b: LoggedRun) -> list[str]:
    """The flags of the runs, which hold for their differences too."""
    return [f"{run.name} is flagged: {', '.join(run.flags)}." for run in (a, b) if run.flags]


def _number(found: Difference) -> Number:
    """A difference as a number of a result."""
    return Number(found.value, found.se, found.ci95, df=found.df)


def _with_error(number: Number, found: Estimate) -> Number:
    """A number with the error that its influences give, where it has none of its own."""
    return number if number.se is not None else replace(reported(found), value=number.value)


def _value(number: Number) -> float:
    """The value of a number that is there."""
    return math.nan if number.value is None else number.value
