"""Two runs compared by their logs: paired differences on one E, see `docs/compare.md`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from probe.errors.exceptions import LogError
from probe.estimand import ESTIMANDS, Estimand, Number
from probe.estimators.estimate import Estimate
from probe.estimators.importance_weights import weight_diagnostics
from probe.estimators.paired import independent_difference, paired_difference
from probe.report.comparison import LABELS, ComparedRow, Comparison
from probe.report.logged_run import Log, LoggedRun
from probe.report.matching import PAIRED, common_responses, different, same_prompts, same_responses
from probe.report.two_policies import of_two_policies
from probe.results.changes import reported

ROUNDING, HALF_ROUNDING = 1e-3, 0.05
"""Nats: log-prob and entropy of a response that are nearer than this times the root of its length may be those of one
policy, in 32 and in 16 bits. Two checkpoints can be as near: see `_same_policy`."""
UNEVEN = 1e-6
"""Share of E that weights between two policies may cost, for these to be one: far below any error that E leaves."""
FEW_DF = 5.0
"""Degrees of freedom of a difference below which its error is itself known to about a third at best."""
NO_ERROR = "error not known: a run without derivatives per token, or with a fresh E after the step"


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
        order = same_responses(first, second)
    if order is not None:
        return _paired(first, second.in_order(order, first.group))
    if not unpaired and (group := same_prompts(first, second)) is not None:
        return _by_prompt(first, replace(second, group=group))
    if not unpaired:
        raise LogError(different(first, second))
    return _unpaired(first, second)


# ---------------------------------------------------------------- one E


def _paired(a: LoggedRun, b: LoggedRun) -> Comparison:
    """Two runs on one E."""
    same = _same_policy(a, b)
    rows, notes = (_of_one_policy(a, b), []) if same else of_two_policies(a, b)
    if not rows:
        raise LogError("expected something that both runs have, found nothing: neither level nor change")
    place = list(LABELS)
    return Comparison(
        a=a.described(),
        b=b.described(),
        how="paired",
        same_policy=same,
        responses=len(a.records),
        prompts=len(a.group.unique()),
        rows=tuple(sorted(rows, key=lambda row: (ESTIMANDS.index(row.estimand), place.index(row.quantity)))),
        notes=(*notes, *_notes(a, b, rows)),
    )


def _same_policy(a: LoggedRun, b: LoggedRun) -> bool:
    """Whether one policy scored E in both runs.

    Log-probs and entropies of every response have to agree within rounding. As those of neighbouring checkpoints may
    too, in 16 bits above all, the logs have to name one checkpoint, or the weights between the two to be as good as 1.
    """
    half = "half_precision" in (*a.flags, *b.flags)
    room = (HALF_ROUNDING if half else ROUNDING) * a.column("length").sqrt()
    gaps = [b.column(name) - a.column(name) for name in ("logprob_before", "entropy_before")]
    if not all(bool((gap.abs() <= room).all()) for gap in gaps):
        return False
    paths = [run.log.get("checkpoint_path") for run in (a, b)]
    if paths[0] is not None and paths[0] == paths[1]:
        return True
    return weight_diagnostics(gaps[0]).ess >= (1 - UNEVEN) * len(room)


def _of_one_policy(a: LoggedRun, b: LoggedRun) -> list[ComparedRow]:
    """The rows of two updates of one policy.

    They start from one entropy, however rounding shows it in the two runs: what they differ by after the update is what
    the changes differ by.
    """
    rows = []
    for estimand in ESTIMANDS:
        level, after, first, change = (_row(a, b, name, estimand) for name in LABELS)
        if level is not None:
            note = "one policy: the updates start from the same entropy"
            rows.append(replace(level, difference=None, unpaired_se=None, note=note))
        if after is not None and change is not None:
            rows.append(replace(after, difference=change.difference, note=change.note))
        rows += [row for row in (first, change) if row is not None]
    return rows


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
        return _above_floor(a, b, ComparedRow(quantity, estimand, first, second, difference, note=NO_ERROR))
    found = paired_difference(mine, other, torch.equal(a.rank, b.rank) if same_fit is None else same_fit)
    first, second = _with_error(first, mine), _with_error(second, other)
    unpaired_se = math.hypot(mine.se, other.se)
    return _above_floor(a, b, ComparedRow(quantity, estimand, first, second, found.number, unpaired_se))


def _above_floor(a: LoggedRun, b: LoggedRun, row: ComparedRow) -> ComparedRow:
    """The row without its difference where that is below what the runs may be wrong by besides sampling."""
    floor = math.hypot(*(run.floor(row.quantity, row.estimand) for run in (a, b)))
    if row.difference is None or abs(_value(row.difference)) >= floor:
        return row
    what = "error of the derivatives" if row.quantity == "deltaH1" else "noise floor"
    return replace(row, difference=None, note=f"B - A is below the {what} ({floor:.2g})")


# ---------------------------------------------------------------- the same prompts


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
        notes=(note, *_notes(a, b, rows)),
    )


# ---------------------------------------------------------------- two E


def _unpaired(a: LoggedRun, b: LoggedRun) -> Comparison:
    """Two runs with independent errors."""
    rows = []
    for estimand in ESTIMANDS:
        for quantity in LABELS:
            first, second = (run.number(quantity, estimand) for run in (a, b))
            if first is None or second is None:
                continue
            first, second = (_known(run, quantity, estimand, n) for run, n in ((a, first), (b, second)))
            rows.append(_above_floor(a, b, _independent(quantity, estimand, first, second)))
    if not rows:
        raise LogError("expected something that both runs have, found nothing: neither level nor change")
    notes = (_two_samples(a, b), *_notes(a, b, rows))
    return Comparison(a.described(), b.described(), "unpaired", None, None, None, tuple(rows), notes)


def _known(run: LoggedRun, quantity: str, estimand: Estimand, number: Number) -> Number:
    """A number with the error that is reported, or else with that of the influences in the log."""
    found = run.estimate(quantity, estimand) if run.has_responses else None
    return number if found is None else _with_error(number, found)


def _independent(quantity: str, estimand: Estimand, first: Number, second: Number) -> ComparedRow:
    """A quantity with the difference of two samples."""
    if first.value is None or second.value is None:
        note = "not resolved in one of the runs (below the noise floor)"
        return ComparedRow(quantity, estimand, first, second, None, note=note)
    if first.se is None or first.df is None or second.se is None or second.df is None:
        note = "no error in one of the logs"
        if quantity == "H_upd":  # results have none of it
            note += " (level detailed has it)"
        return ComparedRow(quantity, estimand, first, second, None, note=note)
    found = independent_difference((first.value, first.se, first.df), (second.value, second.se, second.df))
    return ComparedRow(quantity, estimand, first, second, found.number)


def _two_samples(a: LoggedRun, b: LoggedRun) -> str:
    """Whether the errors are independent, as they are taken to be."""
    better = (
        "Differences of updates are often far smaller than what two draws of E differ by: on one E they are known much "
        f"better ({PAIRED.format(a=a.path or 'A.json.gz')})."
    )
    common = common_responses(a, b)
    if common is None:
        return (
            "The errors are taken as independent. Whether they are cannot be known: there is a log without responses "
            f"(level detailed has them), and the two E may be one. {better}"
        )
    if common:
        return (
            f"The errors are taken as independent, but the two E have {common} of {len(a.records)} and "
            f"{len(b.records)} responses in common: unless two draws came to these by chance (few prompts, short "
            "answers), the errors are not independent, and those shown may be too large or too small. "
            f"{better}"
        )
    if a.has_responses and b.has_responses and same_prompts(a, b) is not None:
        return (
            "The errors are taken as independent, but the two E have the same prompts: without --unpaired they are "
            f"paired by prompt. {better}"
        )
    return f"The two E are different draws: their errors are taken as independent. {better}"


# ---------------------------------------------------------------- both


def _notes(a: LoggedRun, b: LoggedRun, rows: Sequence[ComparedRow]) -> list[str]:
    """What to know of the two runs, which holds for their differences too, and of the errors of these."""
    notes = ["A and B are one run: that they do not differ says nothing."] if a.log == b.log else []
    for run in (a, b):
        if run.flags:
            notes.append(f"{run.name} is flagged: {', '.join(run.flags)}.")
        word, reasons = run.results.get("verdict"), run.results.get("verdict_reasons")
        if word in ("invalid", "unresolved") and reasons:
            notes.append(f"{run.name} is {word}: {reasons[0]}")
    few = [
        f"{row.label} {row.estimand.per} ({row.difference.df:.2g})"
        for row in rows
        if row.difference is not None and row.difference.df is not None and row.difference.df < FEW_DF
    ]
    if few:
        notes.append(
            f"A few prompts carry the error of B - A, by its degrees of freedom, in {', '.join(few)}: others like them "
            "may not have been drawn, and those are in no interval; take a larger E."
        )
    return notes


def _with_error(number: Number, found: Estimate) -> Number:
    """A number with the error that its influences give, where it has none of its own."""
    return number if number.se is not None else replace(reported(found), value=number.value)


def _value(number: Number) -> float:
    """The value of a number that is there."""
    return math.nan if number.value is None else number.value
