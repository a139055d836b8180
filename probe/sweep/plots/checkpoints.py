"""Entropy, and its predicted and measured change by the next update, along the checkpoints of a training run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probe.estimand import Estimand
from probe.sweep.curves import SIZES, coordinates, estimands, grouped, interval, numbers, varying
from probe.sweep.plots.style import CURVES, make_figure


def checkpoint_figure(rows: pd.DataFrame, title: str) -> Figure:
    """Entropy above, its change below, both estimands side by side.

    Args:
        rows: rows at one learning rate per combination; seeds are repetitions, whose mean is shown. Curves differ in
            the batch sizes.
        title: what the rows have in common.
    """
    shown = estimands(rows)
    figure, axes = make_figure(2, len(shown), title)
    rows = rows.assign(position=_positions(rows))
    for column, estimand in enumerate(shown):
        curves = list(grouped(rows, SIZES))
        for k, (shared, curve) in enumerate(curves):
            name = coordinates(shared, varying(rows, SIZES))
            _entropy(axes[0][column], curve, estimand, CURVES[k % len(CURVES)], name)
            _changes(axes[1][column], curve, estimand, k, name)
        _finish(axes[0][column], axes[1][column], rows, estimand, bool(len(curves) > 1))
    return figure


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


def _entropy(axis: Axes, rows: pd.DataFrame, estimand: Estimand, color: str, name: str) -> None:
    """The entropy before the update."""
    x, mean, half = along(rows, estimand.key("H_orig"))
    if len(x):
        _errorbar(axis, x, mean, half, "o-", color, name or "entropy $H$", "H_orig", color)


def _changes(axis: Axes, rows: pd.DataFrame, estimand: Estimand, index: int, name: str) -> None:
    """Predicted and measured change, set apart a little."""
    span = np.ptp(numbers(rows, "position")) or 1.0
    lone = not name
    for offset, column, label, fmt in (
        (-0.006, "deltaH1", "$\\Delta H_1$ predicted", "s--"),
        (0.006, "deltaH_true", "$\\Delta H_\\mathrm{true}$ measured", "o-"),
    ):
        x, mean, half = along(rows, estimand.key(column))
        color = CURVES[index % len(CURVES)]
        if lone:
            color = CURVES[1] if column == "deltaH1" else CURVES[0]
        face = "white" if column == "deltaH1" else color
        if len(x):
            text = f"{label}{', ' if name else ''}{name}"
            _errorbar(axis, x + (offset + 0.02 * index) * span, mean, half, fmt, color, text, column, face)


def _errorbar(
    axis: Axes,
    x: np.ndarray,
    mean: np.ndarray,
    half: np.ndarray,
    fmt: str,
    color: str,
    label: str,
    gid: str,
    face: str,
) -> None:
    """Points with their 95 % intervals, where these are known."""
    style: dict[str, Any] = {"elinewidth": 1.0, "capsize": 2.0, "linewidth": 1.0, "markerfacecolor": face}
    errors = np.nan_to_num(half) if np.isfinite(half).any() else None
    bars = axis.errorbar(x, mean, yerr=errors, fmt=fmt, color=color, label=label, **style)
    bars.lines[0].set_gid(gid)


def _finish(upper: Axes, lower: Axes, rows: pd.DataFrame, estimand: Estimand, several: bool) -> None:
    """Labels, the line of no change and legends."""
    per = "token" if estimand.name == "token" else "response"
    upper.set(title=f"per {per}", ylabel=f"entropy $H$ ({estimand.unit})")
    lower.set(ylabel=f"change by the next update\n({estimand.unit}, 95 % intervals)")
    lower.axhline(0.0, color="#777777", linewidth=0.8, zorder=1)
    steps = numbers(rows, "training_step")
    if np.array_equal(steps, numbers(rows, "position")):
        lower.set_xlabel("training step")
    else:
        names = dict(zip(rows["position"], rows["checkpoint_name"], strict=True))
        lower.set_xticks(list(names), labels=[str(n) for n in names.values()], rotation=30, ha="right")
        lower.set_xlabel("checkpoint")
    for axis in (upper, lower) if several else (lower,):
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
