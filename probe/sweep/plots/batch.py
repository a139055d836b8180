"""Error against batch size, on log-log axes with the slope -1/2 that sampling gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from probe.estimand import Estimand
from probe.sweep.curves import (
    MEASURES,
    ErrorCurve,
    ErrorMeasure,
    coordinates,
    error_curve,
    error_slope,
    estimands,
    grouped,
    other_sizes,
    varying,
)
from probe.sweep.plots.style import CURVES, DASHES, NEUTRAL, PANEL_WIDTH, make_panels, set_apart, with_room

SIZE_LABELS = {
    "B_E": "$B_E$ (responses in E)",
    "B_U": "$B_U$ (prompts in U)",
    "G": "$G$ (responses per prompt of U)",
}


def batch_figure(rows: pd.DataFrame, axis_name: str, title: str) -> Figure:
    """Errors against one batch size, both estimands side by side.

    Args:
        rows: rows of one checkpoint at one learning rate per combination; seeds are repetitions, of which the root
            mean square is shown. Curves differ in the other two sizes.
        axis_name: `B_E`, `B_U` or `G`.
        title: what the rows have in common.
    """
    shown = estimands(rows)
    panels = make_panels(1, len(shown), title, row_height=3.9)
    handles = [_panel(a, rows, axis_name, e) for a, e in zip(panels.axes[0], shown, strict=True)]
    return panels.finish([handles])


def _panel(axis: Axes, rows: pd.DataFrame, axis_name: str, estimand: Estimand) -> list[Any]:
    """One estimand; returns the entries of its legend."""
    curves = list(grouped(rows, other_sizes(axis_name)))
    lone, different = len(curves) == 1, varying(rows, other_sizes(axis_name))
    by_curve: list[Line2D] = []
    by_measure: dict[str, Line2D] = {}
    reference: ErrorCurve | None = None
    for k, (shared, curve) in enumerate(curves):
        dashes = DASHES[k // len(CURVES) % len(DASHES)]
        if not lone:
            label = coordinates(shared, different)
            by_curve.append(
                Line2D([], [], color=CURVES[k % len(CURVES)], linestyle=dashes, linewidth=2, label=label)
            )
        for m, measure in enumerate(MEASURES):
            found = error_curve(curve, axis_name, measure, estimand)
            if not len(found.sizes):
                continue
            style: dict[str, Any] = {"marker": measure.marker, "linewidth": 0.9}
            color = CURVES[(m if lone else k) % len(CURVES)]
            rank = k * len(MEASURES) + m
            x = set_apart(found.sizes, rank, len(curves) * len(MEASURES), log=True)
            bars = axis.errorbar(
                x,
                found.errors,
                found.band,
                color=color,
                linestyle=dashes,
                elinewidth=0.8,
                capsize=1.5,
                **style,
            )
            bars.lines[0].set_gid(measure.name)
            if reference is None or (measure.name == "deltaH1_sd_U" and axis_name != "B_E" and k == 0):
                reference = found  # through the error that this size is there to reduce
            label = _label(curve, axis_name, measure, estimand) if lone else measure.label
            by_measure[measure.name] = Line2D(
                [], [], label=label, color=color if lone else "#555555", **style
            )
    handles = [*by_curve, *by_measure.values()]
    if reference is not None:
        handles.append(_reference(axis, reference))
    axis.set(xscale="log", yscale="log", xlabel=SIZE_LABELS[axis_name], title=estimand.per)
    axis.set_ylabel(f"error ({estimand.unit}), 95 % intervals")
    _ticks(axis, rows, axis_name)
    return handles


def _label(curve: pd.DataFrame, axis_name: str, measure: ErrorMeasure, estimand: Estimand) -> str:
    """The measure with its slope."""
    fit = error_slope(curve, axis_name, measure, estimand)
    if fit is None:
        return measure.label
    error = "" if fit.slope_se is None else f" $\\pm$ {fit.slope_se:.1g}"
    return f"{measure.label} (slope {fit.slope:.2f}{error})"


def _reference(axis: Axes, of: ErrorCurve) -> Line2D:
    """A line of slope -1/2 through the geometric mean of a curve."""
    center_x, center_y = (float(np.exp(np.log(v).mean())) for v in (of.sizes, of.errors))
    line = axis.plot(
        of.sizes,
        center_y * (of.sizes / center_x) ** -0.5,
        color=NEUTRAL,
        linestyle="--",
        linewidth=1.2,
        zorder=1,
    )[0]
    line.set_gid("reference")
    line.set_label("slope $-1/2$")
    return line


def _ticks(axis: Axes, rows: pd.DataFrame, axis_name: str) -> None:
    """Ticks at the sizes that were measured; labels as far as there is room for them."""
    sizes = sorted({int(size) for size in rows[axis_name]})
    low, high = np.log(axis.get_xlim())
    inches = (PANEL_WIDTH - 0.8) / (high - low)
    labelled = with_room(
        [float(np.log(size)) * inches for size in sizes], [0.08 * len(str(size)) + 0.08 for size in sizes]
    )
    axis.set_xticks([sizes[i] for i in labelled], labels=[str(sizes[i]) for i in labelled])
    axis.set_xticks([size for i, size in enumerate(sizes) if i not in labelled], minor=True)
    axis.xaxis.set_minor_formatter(NullFormatter())
