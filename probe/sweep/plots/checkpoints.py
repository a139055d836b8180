"""Entropy, and its predicted and measured change by the next update, along the checkpoints of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from probe.estimand import Estimand
from probe.sweep.curves import SIZES, coordinates, estimands, grouped, interval, numbers, varying
from probe.sweep.plots.style import (
    CURVES,
    DASHES,
    NEUTRAL,
    PANEL_WIDTH,
    Dashes,
    Panels,
    make_panels,
    set_apart,
    short_names,
    with_room,
)

Curves = Sequence[tuple[str, pd.DataFrame]]
"""Rows of equal batch sizes, with what tells them apart."""
CHANGES = (
    ("deltaH1", "$\\Delta H_1$ predicted", "s"),
    ("deltaH_true", "$\\Delta H_\\mathrm{true}$ measured", "o"),
)
"""Columns, and how they are shown."""


def checkpoint_figure(rows: pd.DataFrame, title: str) -> Figure:
    """Entropy above, its change below, both estimands side by side.

    Args:
        rows: rows at one learning rate per combination; seeds are repetitions, whose mean is shown. Curves differ in
            the batch sizes.
        title: what the rows have in common.
    """
    shown = estimands(rows)
    panels = make_panels(2, len(shown), title)
    rows = rows.assign(position=_positions(rows))
    different = varying(rows, SIZES)
    curves = [(coordinates(shared, different), curve) for shared, curve in grouped(rows, SIZES)]
    handles: list[list[list[Any]]] = [[], []]
    for column, estimand in enumerate(shown):
        upper, lower = (row[column] for row in panels.axes)
        handles[0].append(_entropy(upper, curves, estimand))
        handles[1].append(_changes(lower, curves, estimand))
    return panels.finish(handles, extra=_label_axes(panels, rows, shown))


def along(rows: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, means over seeds, and half widths of 95 % intervals (NaN where not known), `(n,)` each.

    Batches of different seeds are independent, so the variances of their estimates add up.
    """
    found = []
    for shared, group in grouped(rows.sort_values("position"), ("position",)):
        value = numbers(group, name)
        low, high = interval(group, name)
        known = np.isfinite(value)
        if known.any():
            half = (high - low)[known] / 2
            found.append(
                (shared["position"], value[known].mean(), float(np.sqrt((half**2).sum())) / known.sum())
            )
    columns = np.array(found, dtype=float).reshape(-1, 3).T
    return columns[0], columns[1], columns[2]


def _positions(rows: pd.DataFrame) -> np.ndarray:
    """Training steps; the ranks of the checkpoints where a step is not known, or not its own."""
    steps = numbers(rows, "training_step")
    checkpoints = list(dict.fromkeys(rows["checkpoint"]))
    if np.isfinite(steps).all() and len(set(steps)) == len(checkpoints):
        return steps
    return np.array([float(checkpoints.index(checkpoint)) for checkpoint in rows["checkpoint"]])


def _entropy(axis: Axes, curves: Curves, estimand: Estimand) -> list[Any]:
    """The entropy before the update; returns the entries of the legend."""
    for k, (_, curve) in enumerate(curves):
        x, mean, half = along(curve, estimand.key("H_orig"))
        if len(x):
            x = set_apart(x, k, len(curves))
            color, dashes = _look(k)
            _errorbar(axis, x, mean, half, "H_orig", color=color, marker="o", linestyle=dashes)
    return [] if len(curves) == 1 else _names(curves)


def _changes(axis: Axes, curves: Curves, estimand: Estimand) -> list[Any]:
    """Predicted and measured change; returns the entries of the legend."""
    lone, handles = len(curves) == 1, []
    for which, (column, label, marker) in enumerate(CHANGES):
        alone = CURVES[1] if column == "deltaH1" else CURVES[0]
        drawn = False
        for k, (_, curve) in enumerate(curves):
            x, mean, half = along(curve, estimand.key(column))
            if not len(x):
                continue
            color, dashes = (alone, DASHES[int(column == "deltaH1")]) if lone else _look(k)
            face = "white" if column == "deltaH1" else color
            x = set_apart(x, 2 * k + which, 2 * len(curves))
            _errorbar(
                axis,
                x,
                mean,
                half,
                column,
                color=color,
                marker=marker,
                linestyle=dashes,
                markerfacecolor=face,
            )
            drawn = True
        color = alone if lone else "#555555"
        face = "white" if column == "deltaH1" else color
        style: dict[str, Any] = {
            "color": color,
            "marker": marker,
            "markerfacecolor": face,
            "linestyle": "none",
        }
        handles += [Line2D([], [], label=label, **style)] if drawn else []
    return handles if lone else [*_names(curves), *handles]


def _look(k: int) -> tuple[str, Dashes]:
    """Colour and dashes of the `k`-th curve."""
    return CURVES[k % len(CURVES)], DASHES[k // len(CURVES) % len(DASHES)]


def _names(curves: Curves) -> list[Any]:
    """The curves' entries in a legend."""
    looks = [(_look(k), name) for k, (name, _) in enumerate(curves)]
    return [Line2D([], [], color=c, linestyle=dashes, linewidth=2, label=name) for (c, dashes), name in looks]


def _errorbar(axis: Axes, x: np.ndarray, mean: np.ndarray, half: np.ndarray, gid: str, **style: Any) -> None:
    """Points with their 95 % intervals, where these are known."""
    bars = axis.errorbar(
        x, mean, yerr=half, elinewidth=1.0, capsize=2.0, linewidth=1.0, markersize=4.5, **style
    )
    bars.lines[0].set_gid(gid)


def _label_axes(panels: Panels, rows: pd.DataFrame, shown: Sequence[Estimand]) -> float:
    """Labels and the line of no change; returns the inches that names of checkpoints need."""
    for upper, lower, estimand in zip(*panels.axes, shown, strict=True):
        upper.set(title=estimand.per, ylabel=f"entropy $H$\n({estimand.unit}, 95 % intervals)")
        lower.set(ylabel=f"change by the next update\n({estimand.unit}, 95 % intervals)")
        lower.axhline(0.0, color=NEUTRAL, linewidth=0.8, zorder=1)
    if np.array_equal(numbers(rows, "training_step"), numbers(rows, "position")):
        for axis in panels.axes[1]:
            axis.set_xlabel("training step")
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return 0.0
    checkpoints = rows.drop_duplicates("position").sort_values("position")
    positions, names = list(checkpoints["position"]), short_names(list(checkpoints["checkpoint_name"]))
    inches = (PANEL_WIDTH - 0.9) / max(max(positions) - min(positions), 1.0)
    room = max(len(name) for name in names) * 0.075
    upright = room + 0.1 > inches or len(names) == 1 < room / PANEL_WIDTH
    labelled = with_room(
        [position * inches for position in positions], [0.17 if upright else room + 0.1] * len(names)
    )
    for axis in panels.axes[1]:
        axis.set_xlabel("checkpoint")
        axis.set_xticks(
            [positions[i] for i in labelled],
            labels=[names[i] for i in labelled],
            rotation=90 if upright else 0,
        )
    return room if upright else 0.0
