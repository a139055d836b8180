"""The page of a training, made from the history of a watch: running, finished, or read back from a log."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from probe.digits import NOT_RESOLVED, with_error
from probe.report.attribution import Table
from probe.report.html.plots import Curve, CurveChart, Rule, Tone
from probe.report.html.render import rendered
from probe.report.rows import Row
from probe.report.summary import WORTH_SAYING, alarms_of, collapse_of, is_resolved, summary_of
from probe.report.words import verdict_meaning
from probe.verdict.words import WORDS

SECTIONS = {
    "verdict": "How it stands",
    "entropy": "Entropy",
    "forecast": "Forecast",
    "changes": "Change per step",
    "parts": "Which parts",
    "updates": "Largest updates",
    "all": "Every probe",
    "configuration": "Settings and versions",
}
"""Sections of the page, by their ids."""
PARTS: tuple[tuple[str, str, Tone], ...] = (
    ("deltaH1_momentum_tok", "momentum of earlier updates", "predicted"),
    ("deltaH1_gradient_tok", "this step's gradient", "measured"),
    ("deltaH1_decay_tok", "weight decay", "neutral"),
)
CLASSES: tuple[tuple[str, str, Tone], ...] = (
    ("deltaH1_right_tok", "right responses", "rises"),
    ("deltaH1_wrong_tok", "wrong responses", "falls"),
    ("deltaH1_positive_tok", "positive advantage", "tracked"),
    ("deltaH1_negative_tok", "negative advantage", "difference"),
    ("deltaH1_high_entropy_tok", "highest fifth of entropy", "predicted"),
)
"""Parts of deltaH1 per token that a training can know, with their tones."""
LARGEST = 10
"""Updates that the page lists on either side."""


def training_page(
    history: Sequence[Mapping[str, Any]],
    steps: int,
    cost_share: float | None = None,
    settings: Mapping[str, Any] | None = None,
    versions: Mapping[str, str | None] | None = None,
    title: str = "Entropy of a training",
) -> str:
    """A training as one self-contained HTML page.

    Args:
        history: entries of a watch in the order of their steps, one at least.
        steps: optimizer steps seen.
        cost_share: time in probes over training time without them; None where it is not known.
        settings: of the probe.
        versions: of packages.
        title: of the page.

    Returns:
        The text of the page. It loads nothing, and every text of the history is shown as text.
    """
    last = history[-1]
    alarms = alarms_of(history)
    charts = {
        "entropy": [_entropy(history, alarms)],
        "forecast": [chart for chart in (_forecast(history, alarms),) if chart is not None],
        "changes": [_changes(history)],
        "parts": [
            chart
            for words, names in (("parts of the step", PARTS), ("classes of the batch's tokens", CLASSES))
            if (chart := _parts(history, words, names)) is not None
        ],
    }
    summary = summary_of(history, steps, cost_share)
    shown = {**charts, "updates": True, "verdict": True, "all": True, "configuration": settings or versions}
    return rendered(
        "training",
        title=title,
        facts=[
            f"{steps} optimizer step{'s' if steps != 1 else ''}",
            f"{len(history)} probed",
            f"last probe at step {last['step']}",
        ],
        sections=[(id, words) for id, words in SECTIONS.items() if shown[id]],
        state=_state(last, alarms),
        answer=_answer(history),
        verdicts=_verdicts(history),
        summary=None if summary is None else str(summary),
        charts=charts,
        largest=_largest(history),
        probes=[_probe_row(entry) for entry in history],
        words=[word for word in WORDS if any(entry.get("verdict") == word for entry in history)],
        settings=settings or {},
        versions=versions or {},
    )


def _state(last: Mapping[str, Any], alarms: Sequence[int]) -> tuple[str, str]:
    """How it stands: the class of its card, and its words."""
    outlook = outlook_of(last)
    if outlook.startswith(("collapsed", "exploded")):
        return "invalid", f"The policy's entropy has {outlook}"
    if outlook.startswith(("collapse", "explosion")):
        return "caution", f"Forecast: {outlook}"
    if outlook:
        return ("caution" if alarms else "trustworthy"), f"Forecast: {outlook}"
    return "unresolved", "No forecast yet: it takes three probes whose steps have moved the policy"


def outlook_of(entry: Mapping[str, Any]) -> str:
    """The forecast in words; of a log, which has numbers alone, in fewer."""
    if entry.get("outlook"):
        return str(entry["outlook"])
    if entry.get("steps_to_collapse") == 0:
        return "collapsed"
    for what in ("collapse", "explosion"):
        chance = entry.get(f"{what}_chance")
        if _known(chance) and chance >= WORTH_SAYING:
            return f"{what} within the horizon with a chance of {100 * chance:.0f} %"
    return "no collapse in sight" if _known(entry.get("collapse_chance")) else ""


def _answer(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """What happened so far, in sentences; nats per token."""
    first, last = history[0], history[-1]
    H = number_of(last, "H_orig_tok")
    sentences = [f"Entropy before step {last['step']}: {H} nats per token."]
    if len(history) > 1 and last.get("cumulative_H_tok") is not None:
        changes = ("cumulative_H_tok", "cumulative_deltaH_true_tok", "cumulative_deltaH1_tok")
        levels, measured, predicted = (number_of(last, name) for name in changes)
        sentences[0] = (
            f"From step {first['step']} to step {last['step']} the entropy went from "
            f"{number_of(first, 'H_orig_tok')} to {H} nats per token: {levels} by its levels, {measured} by the "
            f"changes measured step by step, {predicted} by those predicted."
        )
    alarms = alarms_of(history)
    if alarms:
        listed = ", ".join(str(step) for step in alarms)
        sentences.append(f"Alarm after step{'s' if len(alarms) > 1 else ''} {listed}.")
    return sentences


def _verdicts(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, str, str]]:
    """How many probes had which verdict, with its meaning, and the first reason of the last of them."""
    counted = Counter(entry.get("verdict") for entry in history)
    reasons: dict[Any, str] = {}
    for entry in history:
        if entry.get("verdict_reasons") and entry.get("verdict") != WORDS[0]:
            reasons[entry.get("verdict")] = f"step {entry['step']}: {entry['verdict_reasons'][0]}"
    return [
        (word, counted[word], verdict_meaning(word), reasons.get(word, "")) for word in WORDS if counted[word]
    ]


def _column(history: Sequence[Mapping[str, Any]], name: str) -> list[float | None]:
    return [entry.get(name) for entry in history]


def _curve(
    history: Sequence[Mapping[str, Any]], name: str, words: str, tone: Tone, dots: bool = False
) -> Curve:
    """A number of the history with its interval, where it has one."""
    low, high = (_column(history, f"{name}_ci95_{end}") for end in ("low", "high"))
    with_interval = any(x is not None for x in low)
    return Curve(
        words,
        tone,
        [entry["step"] for entry in history],
        _column(history, name),
        low if with_interval else (),
        high if with_interval else (),
        dots,
    )


def _alarm_rules(alarms: Sequence[int]) -> list[Rule]:
    return [Rule(step, "alarm", upright=True) for step in alarms]


def _entropy(history: Sequence[Mapping[str, Any]], alarms: Sequence[int]) -> CurveChart:
    """The entropy measured, and what the predicted and the measured changes add up to."""
    curves = [
        _curve(history, "H_predicted_tok", "predicted: the sum of deltaH1", "predicted"),
        _curve(history, "H_tracked_tok", "tracked: the sum of deltaH_true", "tracked"),
        _curve(history, "H_orig_tok", "measured: E drawn anew, 95 % intervals", "measured", dots=True),
    ]
    rules = _alarm_rules(alarms)
    top = max((x for x in _column(history, "H_orig_tok") if x is not None), default=math.inf)
    for name, words in (("collapse_entropy", "collapse"), ("explosion_entropy", "explosion")):
        values = [x for x in _column(history, name) if x is not None]
        if values and (name == "collapse_entropy" or values[-1] < 2 * top):
            rules.append(Rule(values[-1], words))
    return CurveChart("Entropy before the step, nats per token", curves, rules)


def _forecast(history: Sequence[Mapping[str, Any]], alarms: Sequence[int]) -> CurveChart | None:
    """The step at whose end a collapse was forecast, over time, against the step at whose end it came."""
    came = collapse_of(history)
    rows = [e for e in history if _known(e.get("steps_to_collapse")) and e["steps_to_collapse"] > 0]

    def at(entry: Mapping[str, Any], name: str) -> float | None:
        ahead = entry.get(name)
        return entry["step"] + ahead if _known(ahead) else None

    first, last = history[0]["step"], history[-1]["step"]
    horizon = last + (last - first)
    # a median or an end far beyond everything that was seen would squeeze the chart to a line
    seen = [e for e in rows if (at(e, "steps_to_collapse") or math.inf) <= horizon]
    if not seen:
        return None
    ends = [
        min(end, horizon) if (end := at(e, "steps_to_collapse_high")) is not None else horizon for e in seen
    ]
    curve = Curve(
        "forecast: the median, 95 % interval (open ends are cut)",
        "predicted",
        [e["step"] for e in seen],
        [at(e, "steps_to_collapse") for e in seen],
        [at(e, "steps_to_collapse_low") for e in seen],
        ends,
        dots=True,
    )
    today = Curve("the present step", "neutral", [first, last], [first, last])
    rules = _alarm_rules(alarms)
    words = "The entropy has not been found at the threshold so far."
    if came is not None:
        rules.append(Rule(came.by, f"came by step {came.by}"))
        words = f"The entropy came to the threshold {came.words}."
    left_out = len(rows) - len(seen)
    if left_out:
        words += f" {left_out} forecast{'s are' if left_out > 1 else ' is'} beyond step {horizon:.0f} and not drawn."
    return CurveChart("Step at whose end a collapse was forecast", [today, curve], rules, words)


def _known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _changes(history: Sequence[Mapping[str, Any]]) -> CurveChart:
    """What single steps did, predicted and measured."""
    curves = [
        _curve(history, "deltaH1_tok", "predicted: deltaH1", "predicted"),
        _curve(history, "deltaH_true_tok", "measured: deltaH_true", "measured", dots=True),
    ]
    return CurveChart("Change of the entropy by the step, nats per token", curves, [Rule(0.0, "0")])


def _parts(
    history: Sequence[Mapping[str, Any]], words: str, names: Sequence[tuple[str, str, Tone]]
) -> CurveChart | None:
    """Parts of deltaH1 over time; None where none is known."""
    curves = [_curve(history, name, label, tone) for name, label, tone in names]
    curves = [curve for curve in curves if any(y is not None for y in curve.y)]
    if not curves:
        return None
    return CurveChart(f"deltaH1 by {words}, nats per token", curves, [Rule(0.0, "0")])


def _largest(history: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The updates with the largest resolved falls and rises of the entropy."""
    known = [entry for entry in history if is_resolved(entry, "deltaH_true_tok")]
    tables = []
    for words, sign in (("Largest falls", -1), ("Largest rises", 1)):
        rows = sorted(
            (entry for entry in known if sign * entry["deltaH_true_tok"] > 0),
            key=lambda entry: -abs(entry["deltaH_true_tok"]),
        )[:LARGEST]
        cells = [
            Row(
                f"step {entry['step']}",
                (
                    number_of(entry, "deltaH_true_tok"),
                    number_of(entry, "deltaH1_tok"),
                    number_of(entry, "deltaH1_momentum_tok"),
                    number_of(entry, "deltaH1_gradient_tok"),
                ),
                str(entry.get("verdict", "")),
            )
            for entry in rows
        ]
        if cells:
            tables.append(
                Table((words, "measured", "predicted", "of it momentum", "of it gradient", "verdict"), cells)
            )
    return tables


def _probe_row(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One probe as a row of the table of all."""
    reasons = entry.get("verdict_reasons") or ()
    return {
        "step": entry["step"],
        "cells": [number_of(entry, name) for name in ("H_orig_tok", "deltaH1_tok", "deltaH_true_tok")],
        "verdict": entry.get("verdict", ""),
        "alarms": ", ".join(f"alarm after step {step}" for step in entry.get("alarms", ())),
        "outlook": outlook_of(entry),
        "reason": reasons[0] if reasons else "",
    }


def number_of(entry: Mapping[str, Any], name: str) -> str:
    """A number of the history with its error."""
    value = entry.get(name)
    return NOT_RESOLVED if value is None else with_error(value, entry.get(f"{name}_se"))
