"""Figures of a result: prediction against measurement, what deltaH1 is the sum of, whose doing it is, and what if.

Every function takes a result's mapping of values (`docs/quantities.md`) and returns a new `matplotlib.figure.Figure`;
nothing else is read or changed. `result_figures` makes those whose data are there. Figures of a training are in
`probe.report.training_figures`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from probe.attribution.league import CEILING
from probe.digits import with_error
from probe.errors.exceptions import DataError
from probe.estimand import ESTIMANDS, TOKEN
from probe.estimators.estimate import NORMAL_975
from probe.report.attribution import TARGETS, TERMS, summands
from probe.report.drawing import ERROR_BARS, drawn, few_ticks, zero_line
from probe.report.palette import CURVES, DIFFERENCE, FAINT, FALLING, MEASURED, NEUTRAL, PREDICTED, RISING
from probe.report.words import CHANGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"deltaH1": PREDICTED, "deltaH_true": MEASURED, "residual": DIFFERENCE}
"""Of the rows of `changes_figure`."""
LEADERS = 4
"""Predictors that `league_figure` shows against each target, beside the ceiling."""
LONGEST_NAME = 30
"""Characters of an intervention's name in a figure."""
MOST_INTERVENTIONS = 14
"""Interventions that `what_if_figure` shows: those that change deltaH1 most."""
TERM_COLORS = dict(zip(TERMS, (RISING, CURVES[5], CURVES[2], FALLING), strict=True))


def result_figures(values: Mapping[str, Any]) -> dict[str, Figure]:
    """Every figure that a result has the data for, by names that sort as they are best looked at.

    Args:
        values: of a result.
    """
    makers: dict[str, tuple[Callable[[Mapping[str, Any]], Figure], bool]] = {
        "1_prediction_and_measurement": (changes_figure, any(_has(values, key) for key in CHANGES)),
        "2_parts": (parts_figure, bool(values.get("attribution"))),
        "3_what_if": (what_if_figure, bool(_effective(values))),
        "4_coupling": (coupling_figure, _has_shares(values)),
        "5_league": (league_figure, bool((values.get("attribution") or {}).get("league"))),
    }
    return {name: make(values) for name, (make, there) in makers.items() if there}


def changes_figure(values: Mapping[str, Any]) -> Figure:
    """Prediction against measurement: deltaH1, deltaH_true and their difference, each with its 95 % interval.

    Args:
        values: of a result. What was not computed has no row; what could not be resolved has a row without a dot.

    Returns:
        Two panels, nats per token and nats per response, with the verdict in words above them.

    Raises:
        DataError: no change was computed.
    """
    rows = [
        (key, name, COLOURS[key])
        for key, name in CHANGES.items()
        if key in values or TOKEN.key(key) in values
    ]
    if not rows:
        raise DataError(
            "changes_figure: expected deltaH1 or deltaH_true among the values, found neither; run the phase first"
        )
    with drawn(1, 2, 8.0, 1.4 + 0.85 * len(rows), sharey=True) as (figure, axes):
        for axis, estimand in zip(axes[0], ESTIMANDS, strict=True):
            zero_line(axis)
            for place, (key, _, color) in enumerate(rows):
                _dot(axis, values, estimand.key(key), place, color)
            axis.set(xlabel=estimand.unit, ylim=(len(rows) - 0.45, -0.7))
            axis.set_yticks(range(len(rows)), [name for _, name, _ in rows])
            axis.grid(visible=False, axis="y")
            axis.margins(x=0.16)
            few_ticks(axis, 3)
            _say_values(axis, values, [(estimand.key(key), color) for key, _, color in rows])
        figure.suptitle(_verdict_title(values), fontsize=17, fontweight="bold")
    return figure


def parts_figure(values: Mapping[str, Any]) -> Figure:
    """What deltaH1 is the sum of: a waterfall from momentum to the reported number, nats per token.

    The tokens of U are cut into right and wrong responses where rewards tell them apart, else by the sign of their
    advantage. Error bars are 95 % intervals of each part over E.

    Args:
        values: of a result.

    Raises:
        DataError: nothing was attributed.
    """
    found = _section(values, "attribution", "parts_figure")
    rows = _waterfall(found)
    total = values.get("deltaH1_tok", found["total"]["deltaH1_tok"])
    with drawn(1, 1, 7.2, 1.8 + 0.5 * len(rows)) as (figure, axes):
        axis, at = axes[0][0], 0.0
        zero_line(axis)
        for place, (_, one) in enumerate(rows):
            change = one["deltaH1_tok"]
            axis.barh(place, change, left=at, height=0.62, color=FALLING if change < 0 else RISING, zorder=2)
            axis.plot([at + change] * 2, [place - 0.31, place + 1.31], color=FAINT, linewidth=1.0, zorder=1)
            _bar_error(axis, at + change, one, place)
            at += change
        last = {
            "deltaH1_tok_ci95": values.get("deltaH1_tok_ci95"),
            "deltaH1_tok_se": values.get("deltaH1_tok_se"),
        }
        axis.barh(len(rows), total, height=0.62, color=PREDICTED, zorder=2)
        _bar_error(axis, total, last, len(rows), color=NEUTRAL)
        labels = [f"{name}  {one['deltaH1_tok']:+.2g}" for name, one in rows]
        axis.set_yticks(range(len(rows) + 1), [*labels, f"deltaH1  {total:+.2g}"])
        axis.set(xlabel="nats per token", ylim=(len(rows) + 0.6, -0.6), title="What deltaH1 is the sum of")
        axis.grid(visible=False, axis="y")
        axis.margins(x=0.08)
        few_ticks(axis, 3)
    return figure


def what_if_figure(values: Mapping[str, Any]) -> Figure:
    """What interventions on the update would change of deltaH1, nats per token, with 95 % intervals.

    Those that were measured have a diamond beside: the measured difference on the same E. Interventions that change
    nothing are left out, and changes of the learning rate, which can be made as large as one likes, do not set the
    scale: what is beyond it stands as an arrow with its number.

    Args:
        values: of a result.

    Raises:
        DataError: no intervention was compared, or none has an effect.
    """
    _section(values, "what_if", "what_if_figure")
    shown = _effective(values)
    if not shown:
        raise DataError(
            "what_if_figure: expected an intervention that changes deltaH1, found none; name some with --interventions"
        )
    scale = [one for one in shown if not one["name"].startswith("learning_rate")] or shown
    ordinary = sorted(abs(one["difference"]["deltaH1_tok"]) for one in scale)
    end = 1.5 * max(x for x in ordinary if x <= 8 * ordinary[len(ordinary) // 2])
    # the side where little happens gets no more of the width than it needs
    largest = [
        max((sign * one["difference"]["deltaH1_tok"] for one in shown), default=0.0) for sign in (-1, 1)
    ]
    sides = [sign * min(max(1.5 * size / end, 0.2), 1.0) for sign, size in zip((-1, 1), largest, strict=True)]
    with drawn(1, 1, 7.4, 1.7 + 0.36 * len(shown)) as (figure, axes):
        axis = axes[0][0]
        zero_line(axis)
        for place, one in enumerate(shown):
            change = one["difference"]["deltaH1_tok"]
            if abs(change) > end:
                _beyond(axis, change, end, place)
                continue
            _dot(axis, one["difference"], "deltaH1_tok", place, PREDICTED, markersize=7.0)
            if one.get("exact"):
                _dot(
                    axis, one["exact"], "difference_true_tok", place + 0.22, MEASURED, fmt="D", markersize=6.0
                )
        axis.set_yticks(range(len(shown)), [_short(one["name"]) for one in shown], fontsize=13)
        axis.set(
            xlim=(1.12 * end * sides[0], 1.12 * end * sides[1]),
            ylim=(len(shown) - 0.3, -0.7),
            xlabel="difference, nats per token",
            title="What if? To the right: more entropy",
        )
        axis.plot([], [], "o", color=PREDICTED, label="predicted, 95 %")
        if any(one.get("exact") for one in shown):
            axis.plot([], [], "D", color=MEASURED, label="measured, 95 %")
        axis.legend(loc="lower right")
        few_ticks(axis, 5)
    return figure


def coupling_figure(values: Mapping[str, Any]) -> Figure:
    """Whose doing the change of a state's entropy is: shares of the sizes, of sampled states and whole responses.

    Args:
        values: of a result.

    Raises:
        DataError: no coupling was computed.
    """
    both = _section(_section(values, "attribution", "coupling_figure"), "coupling", "coupling_figure")
    rows = [
        (label, both[of][which])
        for label, of, which in (
            ("all changes\nof states", "states", "size_share"),
            ("mean over\nstates", "states", "mean_share"),
            ("whole\nresponses", "responses", "size_share"),
        )
        if of in both
    ]
    with drawn(1, 1, 7.4, 2.4 + 0.7 * len(rows)) as (figure, axes):
        axis = axes[0][0]
        for place, (_, shares) in enumerate(rows):
            at = 0.0
            for name in TERMS:
                size = 100 * (shares[name]["value"] or 0.0)
                axis.barh(place, size, left=at, height=0.66, color=TERM_COLORS[name], edgecolor="white")
                if size >= 5:
                    axis.text(
                        at + size / 2,
                        place,
                        f"{size:.0f} %",
                        ha="center",
                        va="center",
                        color="white",
                        weight="bold",
                    )
                at += size
        for name in TERMS:
            axis.barh([0], [0], color=TERM_COLORS[name], label=TERMS[name])
        axis.set_yticks(range(len(rows)), [label for label, _ in rows])
        axis.set(
            xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5), xlabel="share of what moves the entropy, per cent"
        )
        axis.grid(visible=False)
        figure.suptitle("Whose doing is the change of a state's entropy?", fontsize=15)
        figure.legend(loc="outside lower center", ncols=2, fontsize=11.5, columnspacing=1.0)
    return figure


def league_figure(values: Mapping[str, Any]) -> Figure:
    """How well formulas of the literature rank the tokens of U: Spearman's correlation with what they really add.

    A panel for each target, with the best formulas and 95 % intervals; the grey bar is how far a perfect predictor
    would come on this E.

    Args:
        values: of a result.

    Raises:
        DataError: there is no league table.
    """
    league = _section(_section(values, "attribution", "league_figure"), "league", "league_figure")
    rows = [one for one in league if one["ranked"] == "contributions"]
    targets = [target for target in TARGETS if any(one["target"] == target for one in rows)]
    with drawn(len(targets), 1, 7.2, 0.6 + 2.3 * len(targets), sharex=True) as (figure, axes):
        for axis, target in zip(axes[:, 0], targets, strict=True):
            of_target = [one for one in rows if one["target"] == target and one["spearman"] is not None]
            ceiling = [one["spearman"] for one in of_target if one["predictor"] == CEILING]
            best = [one for one in of_target if one["predictor"] != CEILING][:LEADERS]
            for value in ceiling:
                axis.axvspan(value, 1.0, color=NEUTRAL, alpha=0.5, linewidth=0, zorder=0)
            zero_line(axis)
            for place, one in enumerate(best):
                _dot(axis, one, "spearman", place, MEASURED, markersize=7.0)
            axis.set_yticks(range(len(best)), [_short(one["predictor"].replace("_", " ")) for one in best])
            axis.set(ylim=(len(best) - 0.5, -0.6), title=TARGETS[target])
        few_ticks(axes[-1, 0], 5)
        axes[-1, 0].set(xlim=(-1.0, 1.0), xlabel="rank correlation (grey: out of reach on this E)")
    return figure


def _has(values: Mapping[str, Any], key: str) -> bool:
    """Whether a change was computed, for either estimand."""
    return any(values.get(estimand.key(key)) is not None for estimand in ESTIMANDS)


def _has_shares(values: Mapping[str, Any]) -> bool:
    """Whether there is a share of coupling that is not 0."""
    both = (values.get("attribution") or {}).get("coupling") or {}
    return any(share["value"] for one in both.values() for share in one["size_share"].values())


def _section(values: Mapping[str, Any], key: str, of: str) -> Any:
    """A section of a result that a figure needs.

    Raises:
        DataError: it is not there.
    """
    found = values.get(key)
    if not found:
        raise DataError(
            f"{of}: expected `{key}` in the result, found none; `entropy-probe whatif` computes all of them"
        )
    return found


def _verdict_title(values: Mapping[str, Any]) -> str:
    """The verdict, and what the update does, in words."""
    verdict = values.get("verdict")
    ends = values.get("deltaH_true_tok_ci95") or values.get("deltaH1_tok_ci95")
    change = values.get("deltaH_true_tok", values.get("deltaH1_tok"))
    level = values.get("H_orig_tok")
    if verdict == "invalid":
        what = "do not believe these numbers"
    elif change is None or ends is None or ends[0] is None or ends[0] <= 0 <= ends[1]:
        what = "no change of the entropy is resolved"
    else:
        what = f"the update {'lowers' if change < 0 else 'raises'} the entropy"
        what += f" by {100 * abs(change) / level:.2g} %" if level else ""
    return f"{verdict}: {what}" if verdict else what


def _interval(values: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The 95 % interval of a number, else 1.96 standard errors on either side; None where there is no error."""
    ends = values.get(f"{key}_ci95")
    if ends is not None and None not in ends and all(map(math.isfinite, ends)):
        return float(ends[0]), float(ends[1])
    value, se = values.get(key), values.get(f"{key}_se")
    if value is None or se is None or not math.isfinite(se):
        return None
    return value - NORMAL_975 * se, value + NORMAL_975 * se


def _dot(
    axis: Axes,
    values: Mapping[str, Any],
    key: str,
    place: float,
    color: str,
    **style: Any,
) -> None:
    """A number as a dot with its interval."""
    if key not in values:
        return  # never computed, which is not the same as not resolved
    value, ends = values[key], _interval(values, key)
    if value is None or not math.isfinite(value):
        axis.text(0.0, place, " not resolved", color=color, va="center")
        return
    errors = None if ends is None else [[max(value - ends[0], 0.0)], [max(ends[1] - value, 0.0)]]
    axis.errorbar([value], [place], xerr=errors, color=color, zorder=3, **{**ERROR_BARS, **style})


def _say_values(axis: Axes, values: Mapping[str, Any], rows: Sequence[tuple[str, str]]) -> None:
    """Write every number of `rows` (key and colour) above its dot, inside of the frame."""
    low, high = axis.get_xlim()
    for place, (key, color) in enumerate(rows):
        value = values.get(key)
        if value is not None and math.isfinite(value):
            at = (value - low) / (high - low)
            side, shift = ("left", -12) if at < 0.4 else ("right", 12) if at > 0.6 else ("center", 0)
            # a true minus and heavy letters outlive the small cards of loggers; the box keeps the zero line out of them
            text = with_error(value, values.get(f"{key}_se")).replace("+/-", "\u00b1").replace("-", "\u2212")
            axis.annotate(
                text,
                (value, place),
                (shift, 11),
                textcoords="offset points",
                ha=side,
                va="bottom",
                color=color,
                fontsize=14.5,
                weight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
                zorder=4,
            )


def _bar_error(axis: Axes, end: float, one: Mapping[str, Any], place: int, color: str = FAINT) -> None:
    """The interval of a part, about the end of its bar."""
    ends, se = one.get("deltaH1_tok_ci95"), one.get("deltaH1_tok_se")
    half = (ends[1] - ends[0]) / 2 if ends is not None and None not in ends else None
    half = NORMAL_975 * se if half is None and se is not None else half
    if half is not None:
        axis.errorbar([end], [place], xerr=[half], **{**ERROR_BARS, "fmt": "none"}, color=color, zorder=4)


def _beyond(axis: Axes, change: float, end: float, place: int) -> None:
    """A change that is beyond the frame."""
    side = math.copysign(1.0, change)
    axis.plot([side * 1.06 * end], [place], marker=">" if side > 0 else "<", color=FAINT, markersize=9.0)
    axis.text(
        side * 1.02 * end,
        place,
        f"{change:+.2g}",
        ha="right" if side > 0 else "left",
        va="center",
        color=FAINT,
    )


def _waterfall(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The parts of deltaH1 in their order, by name; those of exactly 0 are left out."""
    ending = " responses" if found.get("by_outcome") else ""
    rows = [
        (f"tokens: {name}{ending}" if of_tokens else name.replace("_", " "), one)
        for name, of_tokens, one in summands(found)
    ]
    return [(name, one) for name, one in rows if one["deltaH1_tok"]]


def _effective(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The interventions that change deltaH1 most, those that raise the entropy first."""
    found = (values.get("what_if") or {}).get("interventions") or ()
    moving = [one for one in found if one["difference"].get("deltaH1_tok")]
    moving.sort(key=lambda one: -abs(one["difference"]["deltaH1_tok"]))
    return sorted(moving[:MOST_INTERVENTIONS], key=lambda one: -one["difference"]["deltaH1_tok"])


def _short(name: str) -> str:
    """A name, shortened to what a figure has room for."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."
