"""Figures of a training: its entropy, measured and as the changes add up, and the forecast against what came.

Every function takes a watch's history (entries by the names of `docs/training_names.md`) and returns a new
`matplotlib.figure.Figure`; nothing else is read or changed. Figures of a run are in `probe.report.figures`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from probe.errors.exceptions import DataError
from probe.report.drawing import drawn, few_ticks
from probe.report.palette import ALARM, DIFFERENCE, MEASURED, PREDICTED, TRACKED
from probe.report.summary import Collapse, alarms_of, collapse_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, Any]]
MOST_DOTS = 60
"""Probes whose level is drawn with its error; of more, every so many."""
ROOM = 1.15
"""A threshold up to so many times the largest entropy is in the frame."""


def training_figures(history: History) -> dict[str, Figure]:
    """Every figure that a history has the data for, by names that sort as they are best looked at."""
    found = {}
    if any(_number(entry, "H_orig_tok") is not None for entry in history):
        found["1_entropy"] = training_figure(history)
    if any(entry.get("steps_to_collapse") is not None for entry in history):
        found["2_forecast"] = forecast_figure(history)
    return found


def training_figure(history: History) -> Figure:
    """Entropy over the training: measured on E with 95 % intervals, and as the changes of single steps add up to it.

    Thresholds of collapse and explosion are dashed (the latter where it is near), alarms are marked by a line.

    Args:
        history: of a watch.

    Raises:
        DataError: there is no entropy in it.
    """
    rows = [entry for entry in history if _number(entry, "H_orig_tok") is not None]
    if not rows:
        raise DataError(
            "training_figure: expected entries with H_orig_tok, found none; probe at least one step"
        )
    with drawn(1, 1, 7.4, 5.4) as (figure, axes):
        axis = axes[0][0]
        dots = rows[:: max(1, math.ceil(len(rows) / MOST_DOTS))]
        axis.errorbar(
            [entry["step"] for entry in dots],
            [entry["H_orig_tok"] for entry in dots],
            yerr=[1.96 * (_number(entry, "H_orig_tok_se") or 0.0) for entry in dots],
            fmt="o",
            markersize=4.5,
            color=MEASURED,
            elinewidth=1.3,
            label="measured on E, 95 %",
        )
        _curve(axis, rows, "H_predicted_tok", PREDICTED, "sum of predicted changes")
        _curve(axis, rows, "H_tracked_tok", TRACKED, "sum of measured changes")
        top = max(axis.get_ylim()[1], *(entry["H_orig_tok"] for entry in rows))
        for name, words in (("collapse_entropy", "collapse"), ("explosion_entropy", "explosion")):
            level = _number(rows[-1], name)
            if level is not None and level <= ROOM * top:
                axis.axhline(
                    level, color=DIFFERENCE, linestyle="--", linewidth=1.6, label=f"{words}, {level:.3g}"
                )
        _mark_alarms(axis, history)
        axis.set(xlabel="optimizer step", ylabel="entropy, nats per token", title=_training_title(rows))
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        few_ticks(axis, 8, 6, steps=True)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def forecast_figure(history: History) -> Figure:
    """Steps left until the collapse as they were forecast, against what came.

    The band is the 95 % interval; where it has no upper end it goes on beyond the frame, and so does a forecast of no
    collapse, which is an arrow at the top. Once the entropy was found at the threshold (`collapse_of`), a line says
    what was left.

    Args:
        history: of a watch.

    Raises:
        DataError: there is no forecast in it.
    """
    rows = [entry for entry in history if entry.get("steps_to_collapse") is not None]
    if not rows:
        raise DataError(
            "forecast_figure: expected entries with steps_to_collapse, found none; it takes three probes"
        )
    came = collapse_of(history)
    steps = [entry["step"] for entry in rows]
    top = _top_of(rows, came)
    beyond = 2 * top
    median, low, high = (
        [_within(entry.get(name), beyond) for entry in rows]
        for name in ("steps_to_collapse", "steps_to_collapse_low", "steps_to_collapse_high")
    )
    with drawn(1, 1, 7.4, 5.4) as (figure, axes):
        axis = axes[0][0]
        axis.fill_between(steps, low, high, color=MEASURED, alpha=0.18, linewidth=0, label="95 % interval")
        axis.plot(steps, median, color=MEASURED, marker=".", markersize=8.0, label="forecast")
        far = [step for step, value in zip(steps, median, strict=True) if value > top]
        if far:
            axis.plot(
                far,
                [0.97 * top] * len(far),
                "^",
                color=MEASURED,
                markersize=7.0,
                label="beyond, or no collapse",
            )
        if came is not None:
            before = [step for step in steps if step <= came.by]
            left = [came.by - step for step in before]
            axis.plot(before, left, color=PREDICTED, linestyle="-", label="what was left")
        _mark_alarms(axis, history)
        what = "not reached yet" if came is None else f"came {came.words}"
        axis.set(
            xlabel="optimizer step",
            ylabel="steps until collapse",
            ylim=(0, top),
            title=f"Forecast: collapse {what}",
        )
        few_ticks(axis, 8, 6, steps=True)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _number(entry: Mapping[str, Any], name: str) -> float | None:
    """A finite number of an entry; None for anything else."""
    value = entry.get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _curve(axis: Axes, rows: History, name: str, color: str, label: str) -> None:
    """A curve with its band, as far as it is there."""
    shown = [entry for entry in rows if _number(entry, name) is not None]
    if not shown:
        return
    steps = [entry["step"] for entry in shown]
    errors = [1.96 * (_number(entry, f"{name}_se") or 0.0) for entry in shown]
    values = [entry[name] for entry in shown]
    low = [value - error for value, error in zip(values, errors, strict=True)]
    high = [value + error for value, error in zip(values, errors, strict=True)]
    axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axis.plot(steps, values, color=color, marker="." if len(shown) < 3 else "", label=label, zorder=3)


def _mark_alarms(axis: Axes, history: History) -> None:
    """A line at every step after which an alarm was raised."""
    alarms = alarms_of(history)
    for index, step in enumerate(alarms):
        label = f"alarm, step {', '.join(map(str, alarms[:3]))}{', ...' if len(alarms) > 3 else ''}"
        axis.axvline(step, color=ALARM, linewidth=2.0, zorder=1, label="" if index else label)


def _training_title(rows: History) -> str:
    """Where the entropy has gone, and what is forecast, in words."""
    first, last = rows[0], rows[-1]
    title = f"Entropy {first['H_orig_tok']:.3g} to {last['H_orig_tok']:.3g} nats per token"
    outlook = last.get("outlook")
    return f"{title}\n{outlook}" if outlook else title


def _top_of(rows: History, came: Collapse | None) -> float:
    """The upper end of the frame of forecasts: half as much again as there was, or as the shortest forecasts are."""
    if came is not None:
        return max(1.5 * (came.by - rows[0]["step"]), 4.0)
    finite = sorted(x for entry in rows if (x := _number(entry, "steps_to_collapse")) is not None)
    seen = float(rows[-1]["step"] - rows[0]["step"] + 1)
    return max(2.0 * seen, 3.0 * finite[len(finite) // 4] if finite else 0.0, 10.0)


def _within(value: Any, beyond: float) -> float:
    """A number of steps, at most `beyond`; one that has no end is beyond."""
    return min(float(value), beyond) if isinstance(value, (int, float)) and math.isfinite(value) else beyond
