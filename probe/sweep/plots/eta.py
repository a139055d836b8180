"""Change against learning rate: prediction, measurement and their difference on log-log axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from probe.estimand import Estimand
from probe.sweep.curves import estimands, eta_10, eta_slope, interval, noise_floor, numbers, resolved
from probe.sweep.fits import PowerLaw
from probe.sweep.plots.style import (
    FIT,
    FLOOR,
    LIMIT,
    NEGATIVE,
    POSITIVE,
    PREDICTED,
    make_panels,
    set_apart,
)

FEW_SEEDS = 3
"""With more of them their points are drawn smaller."""


def eta_figure(rows: pd.DataFrame, title: str) -> Figure:
    """Both estimands side by side: the change above, the same-E residual below.

    Circles are measurements: their colour tells the sign; hollow ones are unresolved (the interval includes 0, or the
    value is below the noise floor); arrows point down from the noise floor for values that are null below it; squares
    have an error that is not known. The line is the prediction with its 95 % band.

    Args:
        rows: the rows of one policy with one set of sizes; several seeds are repetitions.
        title: what they have in common.
    """
    shown = estimands(rows)
    residual = any(np.isfinite(numbers(rows, e.key("residual"))).any() for e in shown)
    panels = make_panels(2 if residual else 1, len(shown), title)
    handles = [[_change_panel(a, rows, e) for a, e in zip(panels.axes[0], shown, strict=True)]]
    if residual:
        handles.append([_residual_panel(a, rows, e) for a, e in zip(panels.axes[1], shown, strict=True)])
    for axis in panels.axes[-1]:
        axis.set(xlabel="learning rate $\\eta$", xlim=_eta_limits(rows))
    return panels.finish(handles)


def _change_panel(axis: Axes, rows: pd.DataFrame, estimand: Estimand) -> list[Any]:
    """|deltaH_true| and |deltaH1|; returns the entries of the legend, as all of these do."""
    label = "$|\\Delta H_\\mathrm{true}|$"
    fit = eta_slope(rows, "deltaH_true", estimand)
    limits = _limits(rows, ("deltaH1", "deltaH_true"), estimand)
    axis.set(title=estimand.per, ylabel=f"$|\\Delta H|$ ({estimand.unit})")
    handles = _prediction(axis, rows, estimand)
    handles += _measurements(axis, rows, "deltaH_true", estimand, label, limits[0])
    handles += _fit_line(axis, fit, 1)
    return handles + _frame(axis, rows, estimand, limits)


def _residual_panel(axis: Axes, rows: pd.DataFrame, estimand: Estimand) -> list[Any]:
    """|residual|: what prediction and measurement on the same E differ by."""
    label = "$|$residual$|$"
    limits = _limits(rows, ("residual",), estimand)
    axis.set(ylabel=f"$|\\Delta H_1 - \\Delta H_\\mathrm{{true}}|$, same E\n({estimand.unit})")
    handles = _measurements(axis, rows, "residual", estimand, label, limits[0])
    handles += _fit_line(
        axis,
        eta_slope(rows, "residual", estimand),
        2,
    )
    return handles + _frame(axis, rows, estimand, limits)


def _prediction(axis: Axes, rows: pd.DataFrame, estimand: Estimand) -> list[Any]:
    """The line of |deltaH1| with its band, one per seed."""
    handles: list[Any] = []
    shade = 0.15 if rows["seed"].nunique() <= FEW_SEEDS else 0.04
    for _, curve in rows.groupby("seed", sort=False):
        eta, value = numbers(curve, "learning_rate"), numbers(curve, estimand.key("deltaH1"))
        if not np.isfinite(value).any() or not np.any(value):
            continue
        low, high = _mirrored(value, *interval(curve, estimand.key("deltaH1")))
        axis.fill_between(eta, np.maximum(low, 1e-300), high, color=PREDICTED, alpha=shade, linewidth=0)
        (line,) = axis.plot(eta, np.abs(value), ".-", color=PREDICTED, markersize=3.0, linewidth=1.2)
        line.set_gid("deltaH1")
        sign = "negative" if np.nansum(value) < 0 else "positive"
        line.set_label(f"$|\\Delta H_1|$ {sign}, 95 % band")
        handles = handles or [line]
    return handles


def _measurements(
    axis: Axes, rows: pd.DataFrame, name: str, estimand: Estimand, label: str, bottom: float
) -> list[Any]:
    """The points of a column with their intervals, those of different seeds a little beside each other."""
    eta, few = _set_apart(rows), rows["seed"].nunique() <= FEW_SEEDS
    value = numbers(rows, estimand.key(name))
    low, high = _mirrored(value, *interval(rows, estimand.key(name)))
    clear, known = resolved(rows, name, estimand), np.isfinite(low) & np.isfinite(high)
    handles: list[Any] = []
    for sign, color, word in ((-1, NEGATIVE, "negative"), (1, POSITIVE, "positive")):
        for what, among, marker, text in (
            ("resolved", known & clear, "o", f"{label} {word}"),
            ("unresolved", known & ~clear, "o", f"{word}, unresolved"),
            ("no_error", ~known, "s", f"{word}, error not known"),
        ):
            here = (np.sign(value) == sign) & among
            if not here.any():
                continue
            size = np.abs(value[here])
            ends = np.stack([size - np.maximum(low[here], bottom / 10), high[here] - size])
            face = color if what == "resolved" else "white"
            bars = axis.errorbar(
                eta[here],
                size,
                yerr=None if what == "no_error" else np.maximum(ends, 0.0),
                fmt=marker,
                color=color,
                markerfacecolor=face,
                elinewidth=1.0 if few else 0.6,
                markersize=5.5 if few else 3.0,
                capsize=2.0 if few else 1.0,
                zorder=3,
            )
            bars.lines[0].set_gid(f"{name}:{word}:{what}")
            handles.append(
                Line2D([], [], linestyle="none", marker=marker, color=color, markerfacecolor=face, label=text)
            )
    handles += _below_floor(axis, rows, name, estimand, value, eta)
    return handles + _invalid(axis, rows, eta, np.abs(value))


def _below_floor(
    axis: Axes, rows: pd.DataFrame, name: str, estimand: Estimand, value: np.ndarray, eta: np.ndarray
) -> list[Any]:
    """Arrows down from the noise floor for values that are null because they are below it."""
    floors = numbers(rows, estimand.key("noise_floor"))
    hidden = np.isnan(value) & np.isfinite(floors) & (name != "residual") & (floors > 0)
    if not hidden.any():
        return []
    bars = axis.errorbar(
        eta[hidden],
        floors[hidden],
        yerr=0.4 * floors[hidden],
        uplims=True,
        fmt="_",
        color="#555555",
        elinewidth=1.0,
        markersize=6.0,
        zorder=3,
    )
    bars.lines[0].set_gid(f"{name}:below_floor")
    arrow: dict[str, Any] = {
        "linestyle": "none",
        "marker": "$\\downarrow$",
        "color": "#555555",
        "markersize": 7.0,
    }
    return [Line2D([], [], label="below the noise floor", **arrow)]


def _invalid(axis: Axes, rows: pd.DataFrame, eta: np.ndarray, size: np.ndarray) -> list[Any]:
    """Crosses over points whose verdict is `invalid`."""
    bad = (rows["verdict"].fillna("") == "invalid").to_numpy(dtype=bool) & np.isfinite(size) & (size > 0)
    if not bad.any():
        return []
    style: dict[str, Any] = {"linestyle": "none", "marker": "x", "color": "black", "markersize": 8.0}
    axis.plot(eta[bad], size[bad], gid="invalid", zorder=4, **style)
    return [Line2D([], [], label="verdict: invalid", **style)]


def _fit_line(axis: Axes, fit: PowerLaw | None, expected: int) -> list[Any]:
    """The fitted power law over the range it was fitted in, beside the slope that small steps have."""
    if fit is None:
        return []
    x = np.geomspace(fit.x_min, fit.x_max, 50)
    for group in fit.factors:
        (line,) = axis.plot(
            x, fit.at(x, group), color=FIT, linestyle="--", linewidth=1.2, gid="fit", zorder=2
        )
    error = "" if fit.slope_se is None else f" $\\pm$ {fit.slope_se:.2g}"
    line.set_label(f"$\\propto \\eta^s$, s = {fit.slope:.3g}{error} ({expected} expected)")
    return [line]


def _frame(axis: Axes, rows: pd.DataFrame, estimand: Estimand, limits: tuple[float, float]) -> list[Any]:
    """Axes, noise floor and eta_10."""
    axis.set(xscale="log", yscale="log", ylim=limits)
    handles: list[Any] = []
    floor = noise_floor(rows, estimand)
    if floor is not None and floor > limits[0]:
        axis.axhspan(limits[0], floor, color=FLOOR, alpha=0.45, linewidth=0, zorder=0, gid="noise_floor")
        handles.append(Patch(color=FLOOR, alpha=0.45, label=f"noise floor {floor:.2g}"))
    limit = eta_10(rows, estimand)
    if limit is not None:
        left, right = _eta_limits(rows)
        inside = left < limit < right
        style: dict[str, Any] = {"color": LIMIT, "linestyle": ":", "linewidth": 1.4}
        if inside:
            axis.axvline(limit, gid="eta_10", zorder=1, **style)
        where = "" if inside else " (outside)"
        handles.append(Line2D([], [], label=f"$\\eta_{{10}}$ = {limit:.2g}{where}", **style))
    return handles


def _eta_limits(rows: pd.DataFrame) -> tuple[float, float]:
    """The learning rates with some room at both sides."""
    eta = np.append(_set_apart(rows), numbers(rows, "learning_rate"))
    low, high = float(eta.min()), float(eta.max())
    room = (high / low) ** 0.06
    return low / room, high * room


def _set_apart(rows: pd.DataFrame) -> np.ndarray:
    """The learning rates `(n,)`, those of different seeds a little beside each other."""
    seeds = list(dict.fromkeys(rows["seed"]))
    rank = np.array([seeds.index(seed) for seed in rows["seed"]])
    return set_apart(numbers(rows, "learning_rate"), rank, len(seeds), log=True)


def _limits(rows: pd.DataFrame, names: Sequence[str], estimand: Estimand) -> tuple[float, float]:
    """A range that shows every value, upper ends of intervals and the noise floor."""
    sizes: list[float] = []
    tops: list[float] = []
    for name in names:
        value = numbers(rows, estimand.key(name))
        sizes += list(np.abs(value[np.isfinite(value) & (value != 0)]))
        _, high = _mirrored(value, *interval(rows, estimand.key(name)))
        tops += list(high[np.isfinite(high) & (high > 0)])
    floor = noise_floor(rows, estimand)
    if floor and (not sizes or floor > min(sizes) / 30):
        sizes.append(floor)
    if not sizes:
        return 1e-12, 1.0
    return min(sizes) / 3, 1.5 * max([*sizes, *tops])


def _mirrored(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The interval of a value as one of its size: negative values are mirrored."""
    negative = value < 0
    return np.where(negative, -high, low), np.where(negative, -low, high)
