"""Error against batch size, on log-log axes with the slope -1/2 that sampling gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from probe.estimand import Estimand
from probe.sweep.curves import (
    MEASURES,
    ErrorMeasure,
    coordinates,
    error_curve,
    error_slope,
    estimands,
    grouped,
    other_sizes,
    varying,
)
from probe.sweep.plots.style import CURVES, make_figure

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
    figure, axes = make_figure(1, len(shown), title, row_height=4.6)
    for axis, estimand in zip(axes[0], shown, strict=True):
        _panel(axis, rows, axis_name, estimand)
    return figure


def _panel(axis: Axes, rows: pd.DataFrame, axis_name: str, estimand: Estimand) -> None:
    """One estimand."""
    curves = list(grouped(rows, other_sizes(axis_name)))
    lone, different = len(curves) == 1, varying(rows, other_sizes(axis_name))
    by_curve: list[Line2D] = []
    by_measure: dict[str, Line2D] = {}
    reference: tuple[np.ndarray, np.ndarray] | None = None
    for k, (shared, curve) in enumerate(curves):
        if not lone:
            label = coordinates(shared, different)
            by_curve.append(Line2D([], [], color=CURVES[k % len(CURVES)], linewidth=3, label=label))
        for m, measure in enumerate(MEASURES):
            sizes, errors = error_curve(curve, axis_name, measure, estimand)
            if not len(sizes):
                continue
            style: dict[str, Any] = {"marker": measure.marker, "linewidth": 0.9}
            color = CURVES[(m if lone else k) % len(CURVES)]
            axis.plot(sizes, errors, gid=measure.name, color=color, **style)
            if reference is None or (measure.name == "deltaH1_sd_U" and axis_name != "B_E" and k == 0):
                reference = (sizes, errors)  # through the error that this size is there to reduce
            label = _label(curve, axis_name, measure, estimand) if lone else measure.label
            by_measure[measure.name] = Line2D(
                [], [], label=label, color=color if lone else "#555555", **style
            )
    handles = [*by_curve, *by_measure.values()]
    if reference is not None:
        handles.append(_reference(axis, *reference))
    axis.set(xscale="log", yscale="log", xlabel=SIZE_LABELS[axis_name], ylabel=f"error ({estimand.unit})")
    axis.set_title("per token" if estimand.name == "token" else "per response")
    _ticks(axis, rows, axis_name)
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=1 if lone else 2)


def _label(curve: pd.DataFrame, axis_name: str, measure: ErrorMeasure, estimand: Estimand) -> str:
    """The measure with its slope."""
    fit = error_slope(curve, axis_name, measure, estimand)
    if fit is None:
        return measure.label
    error = "" if fit.slope_se is None else f" $\\pm$ {fit.slope_se:.1g}"
    return f"{measure.label} (slope {fit.slope:.2f}{error})"


def _reference(axis: Axes, sizes: np.ndarray, errors: np.ndarray) -> Line2D:
    """A line of slope -1/2 through the geometric mean of a curve."""
    center_x, center_y = (float(np.exp(np.log(v).mean())) for v in (sizes, errors))
    line = axis.plot(
        sizes, center_y * (sizes / center_x) ** -0.5, color="#777777", linestyle="--", linewidth=1.2, zorder=1
    )[0]
    line.set_gid("reference")
    line.set_label("slope $-1/2$")
    return line


def _ticks(axis: Axes, rows: pd.DataFrame, axis_name: str) -> None:
    """Ticks at the sizes that were measured."""
    sizes = sorted({int(size) for size in rows[axis_name]})
    axis.set_xticks(sizes, labels=[str(size) for size in sizes])
    axis.set_xticks([], minor=True)
