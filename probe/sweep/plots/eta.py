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
from probe.sweep.plots.style import FLOOR, NEGATIVE, POSITIVE, PREDICTED, make_figure


def eta_figure(rows: pd.DataFrame, title: str) -> Figure:
    """Both estimands side by side: the change above, the same-E residual below.

    Circles are measurements: their colour tells the sign; hollow ones are unresolved (the interval includes 0, or the
    value is below the noise floor); triangles stand at the noise floor for values that are null below it. The line is
    the prediction with its 95 % band.

    Args:
        rows: the rows of one policy with one set of sizes; several seeds are repetitions.
        title: what they have in common.
    """
    shown = estimands(rows)
    residual = any(np.isfinite(numbers(rows, e.key("residual"))).any() for e in shown)
    figure, axes = make_figure(2 if residual else 1, len(shown), title)
    for column, estimand in enumerate(shown):
        _change_panel(axes[0][column], rows, estimand)
        if residual:
            _residual_panel(axes[1][column], rows, estimand)
        axes[-1][column].set_xlabel("learning rate $\\eta$")
        _frame(axes[0][column], rows)
    return figure


def _change_panel(axis: Axes, rows: pd.DataFrame, estimand: Estimand) -> None:
    """|deltaH_true| and |deltaH1|."""
    label = "$|\\Delta H_\\mathrm{true}|$"
    fit = eta_slope(rows, "deltaH_true", estimand)
    limits = _limits(rows, ("deltaH1", "deltaH_true"), estimand)
    axis.set(title=f"per {_per(estimand)}", ylabel=f"$|\\Delta H|$ ({estimand.unit})")
    handles = _prediction(axis, rows, estimand)
    handles += _measurements(axis, rows, "deltaH_true", estimand, label, limits[0])
    handles += _fit_line(axis, fit, f"{label} $\\propto \\eta^s$")
    _finish(axis, rows, estimand, limits, handles)


def _residual_panel(axis: Axes, rows: pd.DataFrame, estimand: Estimand) -> None:
    """|residual|: what prediction and measurement on the same E differ by."""
    label = "$|$residual$|$"
    limits = _limits(rows, ("residual",), estimand)
    axis.set(ylabel=f"$|\\Delta H_1 - \\Delta H_\\mathrm{{true}}|$, same E\n({estimand.unit})")
    handles = _measurements(axis, rows, "residual", estimand, label, limits[0])
    handles += _fit_line(
        axis,
        eta_slope(rows, "residual", estimand),
        "$|$residual$| \\propto \\eta^s$",
        " (2 for small $\\eta$)",
    )
    _finish(axis, rows, estimand, limits, handles)


def _prediction(axis: Axes, rows: pd.DataFrame, estimand: Estimand) -> list[Any]:
    """The line of |deltaH1| with its band, one per seed."""
    handles: list[Any] = []
    for _, curve in rows.groupby("seed", sort=False):
        eta, value = numbers(curve, "learning_rate"), numbers(curve, estimand.key("deltaH1"))
        if not np.isfinite(value).any() or not np.any(value):
            continue
        low, high = _mirrored(value, *interval(curve, estimand.key("deltaH1")))
        axis.fill_between(eta, np.maximum(low, 1e-300), high, color=PREDICTED, alpha=0.12, linewidth=0)
        (line,) = axis.plot(eta, np.abs(value), color=PREDICTED, alpha=0.85)
        line.set_gid("deltaH1")
        sign = "negative" if np.nansum(value) < 0 else "positive"
        line.set_label(f"$|\\Delta H_1|$ predicted ({sign}), 95 % band")
        handles = handles or [line]
    return handles


def _measurements(
    axis: Axes, rows: pd.DataFrame, name: str, estimand: Estimand, label: str, bottom: float
) -> list[Any]:
    """The points of a column with their intervals; returns the entries of the legend."""
    eta, value = _set_apart(rows), numbers(rows, estimand.key(name))
    low, high = _mirrored(value, *interval(rows, estimand.key(name)))
    clear = resolved(rows, name, estimand)
    handles: list[Any] = []
    for sign, color, word in ((-1, NEGATIVE, "negative"), (1, POSITIVE, "positive")):
        for full in (True, False):
            here = (np.sign(value) == sign) & (clear == full)
            if not here.any():
                continue
            size = np.abs(value[here])
            lower = np.nan_to_num(size - np.maximum(low[here], bottom / 10))
            bars = axis.errorbar(
                eta[here],
                size,
                yerr=[np.maximum(lower, 0.0), np.nan_to_num(high[here] - size)],
                fmt="o",
                color=color,
                markerfacecolor=color if full else "white",
                elinewidth=1.0,
                capsize=2.0,
                zorder=3,
            )
            bars.lines[0].set_gid(f"{name}:{word}:{'resolved' if full else 'unresolved'}")
            handles.append(_marker(color, full, f"{label} {word}" if full else f"{word}, unresolved"))
    handles += _below_floor(axis, rows, name, estimand, value, eta)
    return handles + _invalid(axis, rows, eta, np.abs(value))


def _below_floor(
    axis: Axes, rows: pd.DataFrame, name: str, estimand: Estimand, value: np.ndarray, eta: np.ndarray
) -> list[Any]:
    """Triangles at the noise floor for values that are null because they are below it."""
    floors = numbers(rows, estimand.key("noise_floor"))
    hidden = np.isnan(value) & np.isfinite(floors) & (name != "residual") & (floors > 0)
    if not hidden.any():
        return []
    style: dict[str, Any] = {
        "linestyle": "none",
        "marker": "v",
        "color": "#555555",
        "markerfacecolor": "white",
    }
    axis.plot(eta[hidden], floors[hidden], gid=f"{name}:below_floor", zorder=3, **style)
    return [Line2D([], [], label="below the noise floor", **style)]


def _invalid(axis: Axes, rows: pd.DataFrame, eta: np.ndarray, size: np.ndarray) -> list[Any]:
    """Crosses over points whose verdict is `invalid`."""
    bad = (rows["verdict"].fillna("") == "invalid").to_numpy(dtype=bool) & np.isfinite(size) & (size > 0)
    if not bad.any():
        return []
    style: dict[str, Any] = {"linestyle": "none", "marker": "x", "color": "black", "markersize": 8.0}
    axis.plot(eta[bad], size[bad], gid="invalid", zorder=4, **style)
    return [Line2D([], [], label="verdict: invalid", **style)]


def _fit_line(axis: Axes, fit: PowerLaw | None, label: str, expected: str = "") -> list[Any]:
    """The fitted power law over the range it was fitted in."""
    if fit is None:
        return []
    x = np.geomspace(fit.x_min, fit.x_max, 50)
    for group in fit.factors:
        (line,) = axis.plot(
            x, fit.at(x, group), color="#E69F00", linestyle="--", linewidth=1.2, gid="fit", zorder=2
        )
    error = "" if fit.slope_se is None else f" $\\pm$ {fit.slope_se:.2g}"
    line.set_label(f"{label}: s = {fit.slope:.3g}{error}{expected}")
    return [line]


def _finish(
    axis: Axes, rows: pd.DataFrame, estimand: Estimand, limits: tuple[float, float], handles: list[Any]
) -> None:
    """Axes, noise floor, eta_10 and legend."""
    axis.set(xscale="log", yscale="log", ylim=limits)
    floor = noise_floor(rows, estimand)
    if floor is not None and floor > limits[0]:
        axis.axhspan(limits[0], floor, color=FLOOR, alpha=0.45, linewidth=0, zorder=0, gid="noise_floor")
        handles.append(Patch(color=FLOOR, alpha=0.45, label=f"noise floor {floor:.2g}"))
    limit = eta_10(rows, estimand)
    if limit is not None:
        left, right = _eta_limits(rows)
        inside = left < limit < right
        style: dict[str, Any] = {"color": "#CC79A7", "linestyle": ":", "linewidth": 1.4}
        if inside:
            axis.axvline(limit, gid="eta_10", zorder=1, **style)
        where = "" if inside else " (outside)"
        handles.append(Line2D([], [], label=f"$\\eta_{{10}}$ = {limit:.2g}{where}", **style))
    axis.legend(handles=handles, loc="upper left")


def _frame(axis: Axes, rows: pd.DataFrame) -> None:
    """The range of learning rates."""
    axis.set_xlim(_eta_limits(rows))


def _eta_limits(rows: pd.DataFrame) -> tuple[float, float]:
    """The learning rates with some room at both sides."""
    eta = numbers(rows, "learning_rate")
    return float(eta.min()) / 1.5, float(eta.max()) * 1.5


def _limits(rows: pd.DataFrame, names: Sequence[str], estimand: Estimand) -> tuple[float, float]:
    """A range that shows every value, upper ends of intervals, the noise floor, and has room for the legend."""
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
    low, high_end = min(sizes) / 3, max([*sizes, *tops])
    return low, high_end * (high_end / low) ** 0.45


def _set_apart(rows: pd.DataFrame) -> np.ndarray:
    """The learning rates, those of different seeds a little beside each other."""
    seeds = list(dict.fromkeys(rows["seed"]))
    rank = np.array([seeds.index(seed) for seed in rows["seed"]]) - (len(seeds) - 1) / 2
    return numbers(rows, "learning_rate") * (1.12 ** (rank / max(len(seeds) - 1, 1)))


def _mirrored(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The interval of a value as one of its size: negative values are mirrored."""
    negative = value < 0
    return np.where(negative, -high, low), np.where(negative, -low, high)


def _marker(color: str, full: bool, label: str) -> Line2D:
    """An entry of the legend."""
    face = color if full else "white"
    return Line2D([], [], linestyle="none", marker="o", color=color, markerfacecolor=face, label=label)


def _per(estimand: Estimand) -> str:
    return "token" if estimand.name == "token" else "response"
