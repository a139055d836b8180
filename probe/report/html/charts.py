"""The charts of a run: what is drawn of a result, line by line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from probe.attribution.league import CEILING
from probe.digits import NOT_RESOLVED, interval_text, number_text, with_error
from probe.estimand import Estimand
from probe.report.attribution import PARTS, TARGETS, TERMS, summands
from probe.report.html.plots import Chart, Line, Mark, Tone
from probe.report.words import CHANGES, is_preconditioned
from probe.text import percent

OF_CHANGES: dict[str, tuple[Tone, str]] = {
    "deltaH1": ("predicted", "deltaH1: the entropy's gradient times the optimizer's step"),
    "deltaH_true": ("measured", "deltaH_true: E rescored after the step"),
    "residual": ("difference", "predicted minus measured by plain estimators on the same E"),
}
"""Tones and meanings of the changes."""
SORTED_BY = {
    "by_outcome": "right and wrong responses (above the middle of the rewards)",
    "by_advantage": "the sign of the advantage",
    "by_entropy": "the entropy of the token's state",
    "by_kind": "what the token is",
    "by_position": "its place in the response, by tenths",
    "by_layer": "the layer (the whole step)",
    "by_matrix": "the matrix (the whole step)",
}
"""Ways to sum contributions up, in words."""


def _meaning(values: Mapping[str, Any], key: str, meaning: str) -> str:
    """What a change means; a prediction of the preconditioned gradient is not of a step."""
    if key == "deltaH1" and is_preconditioned(values):
        return "deltaH1: the entropy's gradient times the preconditioned gradient, no step that an optimizer takes"
    return meaning


def change_chart(values: Mapping[str, Any], estimand: Estimand) -> Chart | None:
    """Prediction against measurement, each with its 95 % interval; None where there is neither."""
    lines = []
    for key, label in CHANGES.items():
        tone, words = OF_CHANGES[key]
        name, meaning = estimand.key(key), _meaning(values, key, words)
        if values.get(name) is not None:
            lines.append(_line(label, values, name, tone, meaning))
        elif name in values:
            lines.append(
                Line(label, (), (NOT_RESOLVED, interval_text(values.get(f"{name}_ci95")) or "-"), meaning)
            )
    if not lines:
        return None
    return Chart(f"Change of the entropy, {estimand.unit}", ("", "value", "95 % interval", ""), lines)


def parts_chart(values: Mapping[str, Any]) -> Chart | None:
    """The waterfall from momentum, decay and tokens to deltaH1; None without an attribution."""
    found: Mapping[str, Any] = values.get("attribution") or {}
    if "total" not in found:
        return None
    at, lines = 0.0, []
    for name, of_tokens, one in summands(found):
        label, meaning = name.replace("_", " "), PARTS.get(name, "")
        if of_tokens:
            label, meaning = name, f"tokens of U: {one.get('tokens', 0)}{_share_of_sum(one, found)}"
        value = one["deltaH1_tok"]
        low, high = (None if end is None else at + end for end in one.get("deltaH1_tok_ci95") or (None, None))
        tone: Tone = "falls" if value < 0 else "rises"
        lines.append(
            Line(label, (Mark(at + value, low, high, tone, start=at),), (_with_error(one),), meaning)
        )
        at += value
    reported = values.get("deltaH1_tok")
    if reported is not None:
        lines.append(
            _line("deltaH1", values, "deltaH1_tok", "predicted", "what is predicted", start=0.0, short=True)
        )
    legend: tuple[tuple[Tone, str], ...] = (("falls", "lowers the entropy"), ("rises", "raises it"))
    return Chart("What deltaH1 is the sum of, nats per token", ("", "adds", ""), lines, legend)


def _share_of_sum(one: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The share of a part in the sum of all that control variates do not add, where that is not 0."""
    total = found["total"]["deltaH1_tok"]
    without = " without control variates" if "control_variates" in found else ""
    share = one["deltaH1_tok"] / total + 0.0 if total else 0.0
    return f"; {percent(share)} of the sum{without}" if total else ""


def class_charts(values: Mapping[str, Any]) -> list[Chart]:
    """What classes of tokens, layers and matrices add."""
    found: Mapping[str, Any] = values.get("attribution") or {}
    charts = []
    for key, words in SORTED_BY.items():
        rows: Sequence[Mapping[str, Any]] = found.get(key) or ()
        lines = []
        for one in rows:
            value = one["deltaH1_tok"]
            tone: Tone = "falls" if value < 0 else "rises"
            counted = f"{one['tokens']}" if "tokens" in one else "-"
            lines.append(_line(one["name"], one, "deltaH1_tok", tone, start=0.0, short=True, more=(counted,)))
        if lines:
            charts.append(Chart(f"By {words}, nats per token", ("", "adds to deltaH1", "tokens"), lines))
    return charts


def coupling_charts(values: Mapping[str, Any]) -> list[Chart]:
    """Whose doing the change of a state's entropy is: the shares of sampled states, and of whole responses."""
    both: Mapping[str, Any] = (values.get("attribution") or {}).get("coupling") or {}
    charts = []
    for which, words in (("states", "states of U"), ("responses", "whole responses of U")):
        if which not in both:
            continue
        lines = []
        own = {"own": "the tokens of the response itself"} if which == "responses" else {}
        for name, meaning in (TERMS | own).items():
            share = both[which]["size_share"].get(name)
            if share is None or share["value"] is None or (which == "responses" and name == "response"):
                continue
            value = 100 * share["value"]
            low, high = (
                (100 * end for end in share["value_ci95"]) if share.get("value_ci95") else (None, None)
            )
            text = "" if low is None or high is None else f"[{low:.1f}, {high:.1f}]"
            lines.append(
                Line(
                    name, (Mark(value, low, high, start=0.0),), (f"{value:.1f}", text or "not known"), meaning
                )
            )
        if lines:
            caption = (
                f"Share in the size of all changes in per cent, {both[which]['sampled']} sampled {words}"
            )
            charts.append(Chart(caption, ("", "share", "95 % interval", ""), lines))
    return charts


def league_charts(values: Mapping[str, Any]) -> list[Chart]:
    """How well the formulas of the literature rank tokens, against each target."""
    league: Sequence[Mapping[str, Any]] = (values.get("attribution") or {}).get("league") or ()
    charts = []
    for target, words in TARGETS.items():
        lines = []
        for one in league:
            if one["target"] != target or one["ranked"] != "contributions" or one["spearman"] is None:
                continue
            low, high = one["spearman_ci95"]
            tone: Tone = "neutral" if one["predictor"] == CEILING else "predicted"
            signs = "-" if one["sign_agreement"] is None else f"{100 * one['sign_agreement']:.1f} %"
            interval = f" [{low:+.2f}, {high:+.2f}]" if low is not None and high is not None else ""
            cells = (
                f"{one['spearman']:+.2f}{interval}",
                signs,
                f"{100 * one['captured_top_10']:.1f} %",
                str(one["tokens"]),
            )
            lines.append(
                Line(one["predictor"].replace("_", " "), (Mark(one["spearman"], low, high, tone),), cells)
            )
        if lines:
            heads = ("", "Spearman, 95 % interval", "signs right", "its top 10 % hold", "tokens")
            charts.append(Chart(f"Ranking of tokens against {words}", heads, lines))
    return charts


def what_if_chart(values: Mapping[str, Any]) -> Chart | None:
    """What interventions would change of deltaH1, those that raise the entropy most first, with what was measured."""
    found: Mapping[str, Any] = values.get("what_if") or {}
    rows: Sequence[Mapping[str, Any]] = found.get("interventions") or ()
    rows = [
        one
        for one in sorted(rows, key=lambda one: -(one["difference"]["deltaH1_tok"] or 0.0))
        if one["difference"]["deltaH1_tok"] is not None
        and (one["difference"]["deltaH1_tok"] != 0 or one["tokens"] != 0)
    ]
    if not rows:
        return None
    measured = any(_measured(one) is not None for one in rows)
    lines = []
    for one in rows:
        difference, exact, per = one["difference"], _measured(one), one.get("per_reward")
        marks = [_mark(difference, "deltaH1_tok", "predicted")]
        cells = [_with_error(difference)]
        if measured:
            cells.append("-" if exact is None else _with_error(exact, "difference_true_tok"))
        if exact is not None:
            marks.append(_mark(exact, "difference_true_tok", "measured"))
        cells.append(_with_error(difference, "deltaR1") if "deltaR1" in difference else "-")
        cells.append("-" if per is None else number_text(per["value"]))
        lines.append(Line(one["name"], tuple(marks), tuple(cells)))
    heads = ["", "predicted", "measured", "reward's difference", "deltaH1 per reward"]
    legend: list[tuple[Tone, str]] = [("predicted", "predicted")]
    if measured:
        legend.append(("measured", "measured by its step"))
    else:
        heads.remove("measured")
    caption = "Difference that an intervention makes to deltaH1 (without control variates), nats per token"
    return Chart(caption, tuple(heads), lines, tuple(legend), _limit(lines))


def _measured(one: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What was measured of an intervention's step; None where it was not."""
    exact: Mapping[str, Any] = one.get("exact") or {}
    return exact if exact.get("difference_true_tok") is not None else None


def _limit(lines: Sequence[Line]) -> float | None:
    """How far an axis reaches where a few values would squeeze all others to a point; None where none would."""
    sizes = sorted(abs(line.marks[0].value) for line in lines)
    usual = sizes[(3 * len(sizes)) // 4] if len(sizes) > 3 else math.inf
    return 1.5 * usual if 0 < usual < sizes[-1] / 3 else None


def _mark(one: Mapping[str, Any], key: str, tone: Tone, start: float | None = None) -> Mark:
    low, high = one.get(f"{key}_ci95") or (None, None)
    return Mark(one[key], low, high, tone, start)


def _line(
    label: str,
    one: Mapping[str, Any],
    key: str,
    tone: Tone,
    note: str = "",
    start: float | None = None,
    short: bool = False,
    more: tuple[str, ...] = (),
) -> Line:
    """A value with its interval; `short` leaves the interval to the drawing."""
    cells = (
        _with_error(one, key),
        *(() if short else (interval_text(one.get(f"{key}_ci95")) or "-",)),
        *more,
    )
    return Line(label, (_mark(one, key, tone, start),), cells, note)


def _with_error(one: Mapping[str, Any], key: str = "deltaH1_tok") -> str:
    return with_error(one[key], one.get(f"{key}_se"))
