"""The printed page of a plan."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from probe.digits import with_error
from probe.estimand import ESTIMANDS
from probe.estimators.control_variates import SMALLEST_SAMPLE
from probe.estimators.power import PROMISED
from probe.plan.sizes import SPREAD, Plan, RunCost, Wanted
from probe.text import percent
from probe.verdict.resolution import LEAST_FREEDOM, PRECISE

WIDTH = 80
"""Columns of the page."""
MEANINGS = {
    "pilot": "this run",
    "second pilot": "a better pilot",
    "resolves": "interval excludes 0",
    "precise": f"{PRECISE:g} standard errors",
    "steadier U": "another U would say the same",
}
"""What each run of the cost table is for."""
NO_PLAN = (
    "No plan: the pilot has no change of entropy with an error (it is null, below the noise floor of the arithmetic; "
    "all responses are alike; or no phase that measures one has run)."
)


def page(plan: Plan) -> str:
    """The plan as plain text: what the pilot found, the sizes, the costs, and what to know about them."""
    parts = [_heading(plan), _sizes(plan), _updates(plan), _costs(plan), _notes(plan)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _heading(plan: Plan) -> list[str]:
    """What was probed, what it found, and the answer in a line."""
    rate = "" if plan.learning_rate is None else f", learning rate {plan.learning_rate:.6g}"
    lines = [f"Plan for {plan.checkpoint}: pilot of B_E = {plan.B_E}, B_U = {plan.B_U} prompts{rate}"]
    one = plan.headline
    if one is None:
        return [*lines, "", *_wrapped(NO_PLAN)]
    own = (
        "The pilot itself resolves the change." if one.resolved else "The pilot does not resolve the change."
    )
    if one.resolves.size is None:
        answer = (
            f"{own} It is too noisy to recommend a size: run a second pilot of --pilot_B_E {plan.second_pilot}, which "
            f"resolves a change of {one.se:.2g} (its standard error) with probability {percent(plan.power)}."
        )
    else:
        answer = (
            f"{own} With batch_config.B_E = {one.resolves.size} a run resolves it with probability "
            f"{percent(plan.power)}"
            + ("." if one.precise.size is None else f", with {one.precise.size} precisely.")
        )
    return [*lines, "", *_wrapped(answer)]


def _sizes(plan: Plan) -> list[str]:
    """B_E for every change."""
    rows = [("B_E, prompts", "pilot found", "resolves", f"precise ({PRECISE:g} se)")]
    for estimand in ESTIMANDS:
        there = [(name, one) for name, both in plan.changes.items() if (one := both[estimand]) is not None]
        rows += [(estimand.unit, "", "", "")] if there else []
        for name, one in there:
            found = with_error(one.value, one.se)
            rows.append((f"  {name}", found, _wanted(one.resolves), _wanted(one.precise)))
    return _table(rows) if len(rows) > 1 else []


def _updates(plan: Plan) -> list[str]:
    """B_U for every estimand."""
    rows = [("B_U, prompts", "spread over U", "of deltaH1", f"spread below {percent(SPREAD)}")]
    for estimand in ESTIMANDS:
        one = plan.updates[estimand]
        if one is not None:
            rows.append((estimand.unit, f"{one.sd_U:.2g}", one.share, _wanted(one.B_U)))
    return _table(rows) if len(rows) > 1 else []


def _costs(plan: Plan) -> list[str]:
    """What the runs cost."""

    def row(one: RunCost) -> tuple[str, ...]:
        seconds = f"{one.seconds:.0f} s" if one.seconds < 7200 else f"{one.seconds / 3600:.1f} h"
        return one.what, str(one.B_E), str(one.B_U), f"{one.responses:,}", seconds, MEANINGS[one.what]

    heads = (
        f"Cost: {plan.cost.passes_E} passes over all of E, {plan.cost.passes_U} over U; responses: all together",
    )
    return [
        *heads,
        *_table([("run", "B_E", "B_U", "responses", "time", "for"), *map(row, plan.costs)]),
    ]


def _notes(plan: Plan) -> list[str]:
    """What to know about the numbers."""
    return [line for note in _sentences(plan) for line in _wrapped(note, "  - ")]


def _sentences(plan: Plan) -> Iterator[str]:
    """See `_notes`."""
    one = plan.headline
    if one is not None:
        yield (
            "[low to high]: what it would take if the change were as large, or as small, as the pilot's 95 % leave "
            "open. The recommended size averages over what the pilot does not know of change and error."
        )
        if not one.resolved:
            yield (
                f"No upper end: the pilot's interval contains 0, and a change may be as small as it likes. B_E = "
                f"{one.of_one_se} resolves a change of {one.se:.2g}; the pilot's own size one of {one.resolvable:.2g}. "
                f"A change below {PROMISED:g} of the pilot's standard error resolves less often than planned."
            )
        if one.df < LEAST_FREEDOM:
            yield (
                f"A few responses carry the pilot's error ({one.df:.2g} degrees of freedom): others like them may be "
                "missing in it. A larger pilot knows better."
            )
        if not plan.with_controls:
            yield (
                f"Without control variates, which from {SMALLEST_SAMPLE} prompts on (auto) make smaller errors: then "
                "less is enough."
            )
        elif any(
            size is not None and size < SMALLEST_SAMPLE for size in (one.resolves.size, one.precise.size)
        ):
            yield (
                f"The pilot's errors are those with control variates, which runs below {SMALLEST_SAMPLE} prompts have "
                "only with probe_rework.control_variates: on."
            )
    if any(plan.updates):
        yield (
            "B_U: for a result about such updates, and not about this draw of U. A larger U is another update (its "
            "step is averaged, and Adam normalises it): deltaH1 itself will be another one."
        )
    elif one is not None:
        yield (
            "No B_U: how much deltaH1 owes to this draw of U (deltaH1_sd_U) is not known; that takes two prompts in U "
            "and probe_rework.update_spread."
        )
    yield "Time: the pilot's passes, in proportion to B_E and B_U, on this machine; loading included."


def _wanted(one: Wanted) -> str:
    """A size with its range."""
    size = "?" if one.size is None else str(one.size)
    return f"{size} [{one.low} to {'any' if one.high is None else one.high}]"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns, the first of them the heads."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _wrapped(text: str, bullet: str = "") -> list[str]:
    """A text within the page."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=bullet, subsequent_indent=" " * len(bullet), break_on_hyphens=False
    )
