"""The curves in a sweep's table: what belongs together, what is resolved, and the slopes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from probe.estimand import ESTIMANDS, Estimand
from probe.estimators.estimate import NORMAL_975
from probe.sweep.fits import PowerLaw, fit_power_law

SIZES = ("B_E", "B_U", "G")
POLICY = ("checkpoint", *SIZES)
"""What rows of one curve over learning rates have in common; seeds are repetitions of it."""
FEWEST = 3
"""Learning rates that a fit needs in the range of small steps, if it is to leave out those above."""


def finished(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that have results."""
    return table[table["status"] == "ok"]


def estimands(rows: pd.DataFrame) -> list[Estimand]:
    """Those with a change in the table."""
    return [
        e
        for e in ESTIMANDS
        if any(
            rows.get(e.key(name), pd.Series(dtype=float)).notna().any() for name in ("deltaH1", "deltaH_true")
        )
    ]


def numbers(rows: pd.DataFrame, name: str) -> np.ndarray:
    """A column as float64, `(n,)`; NaN where it has no value, or is not there at all."""
    if name not in rows:
        return np.full(len(rows), np.nan)
    return rows[name].to_numpy(dtype=float, na_value=np.nan)


def interval(rows: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % intervals of a column, `(n,)` each; NaN where they are not known."""
    low, high = numbers(rows, f"{name}_ci95_lo"), numbers(rows, f"{name}_ci95_hi")
    value, half = numbers(rows, name), NORMAL_975 * numbers(rows, f"{name}_se")
    return np.where(np.isnan(low), value - half, low), np.where(np.isnan(high), value + half, high)


def noise_floor(rows: pd.DataFrame, estimand: Estimand) -> float | None:
    """The largest noise floor of the rows, nats."""
    floors = numbers(rows, estimand.key("noise_floor"))
    return float(np.nanmax(floors)) if np.isfinite(floors).any() else None


def resolved(rows: pd.DataFrame, name: str, estimand: Estimand) -> np.ndarray:
    """Where a change is above the noise floor and its interval does not include 0, `(n,)`."""
    value = numbers(rows, estimand.key(name))
    low, high = interval(rows, estimand.key(name))
    floor = np.nan_to_num(numbers(rows, estimand.key("noise_floor")), nan=0.0)
    known = np.isfinite(value) & (np.abs(value) > floor)
    return known & ~((low <= 0) & (high >= 0))


def eta_10(rows: pd.DataFrame, estimand: Estimand) -> float | None:
    """The learning rate at which curvature is a tenth of first order; the median over repetitions."""
    found = numbers(rows, estimand.key("eta_10"))
    return float(np.nanmedian(found)) if np.isfinite(found).any() else None


def eta_slope(rows: pd.DataFrame, name: str, estimand: Estimand) -> PowerLaw | None:
    """The slope of `|name|` against the learning rate, on log-log axes, one factor per seed.

    Fitted are resolved points whose verdict is not `invalid`, and of these only those up to `eta_10 / 10` (where
    curvature is 1 % of first order) or else up to `eta_10`, as far as that leaves three learning rates: beyond, higher
    orders bend the curves.
    """
    usable = resolved(rows, name, estimand) & (rows["verdict"].fillna("") != "invalid").to_numpy(dtype=bool)
    eta = numbers(rows, "learning_rate")
    # an estimand whose second order vanishes by chance has a third one at the same steps as the other
    known = [found for e in ESTIMANDS if (found := eta_10(rows, e)) is not None]
    for limit in (min(known) / 10, min(known)) if known else ():
        below = usable & (eta <= limit)
        if len(set(eta[below])) >= FEWEST:
            usable = below
            break
    used = rows[usable]
    errors = numbers(used, estimand.key(name, "_se"))
    return fit_power_law(
        numbers(used, "learning_rate"),
        numbers(used, estimand.key(name)),
        errors if np.all(errors > 0) else None,
        [int(seed) for seed in used["seed"]],
    )


def eta_curves(table: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The rows of each curve over learning rates, with what they have in common; only where the rates vary."""
    for shared, rows in grouped(finished(table), POLICY):
        if (
            rows["learning_rate"].nunique() > 1
            and (rows.groupby("seed")["learning_rate"].nunique() > 1).any()
        ):
            yield shared, rows.sort_values(["seed", "learning_rate"])


def reference_rows(table: pd.DataFrame) -> pd.DataFrame:
    """The rows at one learning rate per policy and sizes: the one nearest to the policy's own."""
    rows = finished(table)
    if rows.empty:
        return rows
    distance = pd.Series(np.abs(np.log(numbers(rows, "eta_factor"))), index=rows.index).round(9)
    nearest = distance.groupby([rows[key] for key in (*POLICY, "seed")], dropna=False).transform("min")
    return rows[distance == nearest].drop_duplicates(subset=[*POLICY, "seed"])


def grouped(rows: pd.DataFrame, keys: tuple[str, ...]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The groups of rows with equal keys, in the order of the table."""
    if len(rows):
        for values, group in rows.groupby(list(keys), sort=False, dropna=False):
            yield dict(zip(keys, values, strict=True)), group


def varying(rows: pd.DataFrame, keys: tuple[str, ...]) -> list[str]:
    """The keys that have several values in the rows."""
    return [key for key in keys if rows[key].nunique(dropna=False) > 1]


def coordinates(shared: Mapping[str, Any], keys: Iterable[str]) -> str:
    """`B_E = 64, G = 8`: what a legend or a title says."""
    return ", ".join(f"{key} = {shared[key]}" for key in keys if not pd.isna(shared[key]))


def root_mean_square(values: np.ndarray) -> float:
    """The root of the mean square of the values that are known; NaN if none is."""
    known = values[np.isfinite(values)]
    return float(np.sqrt(np.mean(known**2))) if len(known) else float("nan")


REPETITIONS = 3
"""From so many seeds on, the spread over them is shown."""


@dataclass(frozen=True)
class ErrorMeasure:
    """One measure of error.

    Attributes:
        name: its name in the summary.
        label: its name in legends.
        marker: its marker.
        of: the quantity whose part it is; empty where it is worked out from several.
        part: ending of the part's key.
    """

    name: str
    label: str
    marker: str
    of: str = ""
    part: str = ""


MEASURES = (
    ErrorMeasure("deltaH_true_se", "se of $\\Delta H_\\mathrm{true}$ over E", "o", "deltaH_true", "_se"),
    ErrorMeasure("deltaH1_se", "se of $\\Delta H_1$ over E", "s", "deltaH1", "_se"),
    ErrorMeasure("deltaH1_sd_U", "sd of $\\Delta H_1$ over U", "^", "deltaH1", "_sd_U"),
    ErrorMeasure("difference", "$|\\Delta H_1 - \\Delta H_\\mathrm{true}|$, same E", "x"),
    ErrorMeasure("spread", "sd of $\\Delta H_1$ over seeds", "D"),
)


@dataclass(frozen=True)
class ErrorCurve:
    """A measure of error against a batch size.

    Attributes:
        sizes: `(n,)`, ascending.
        errors: `(n,)` nats, above 0.
        se: `(n,)` standard errors of `errors`, nats; NaN where they are not known.
    """

    sizes: np.ndarray
    errors: np.ndarray
    se: np.ndarray

    @property
    def band(self) -> np.ndarray:
        """The 95 % intervals as `(2, n)` distances down and up: of the errors' logarithms, as errors are above 0."""
        factor = np.exp(NORMAL_975 * self.se / self.errors)
        return np.stack([self.errors - self.errors / factor, self.errors * factor - self.errors])


def error_curve(rows: pd.DataFrame, axis_name: str, measure: ErrorMeasure, estimand: Estimand) -> ErrorCurve:
    """The errors at the batch sizes; those not known are left out."""
    found = []
    for shared, group in grouped(rows.sort_values(axis_name), (axis_name,)):
        error, se = _error(group, measure, estimand)
        if np.isfinite(error) and error > 0:
            found.append((float(shared[axis_name]), error, se))
    columns = np.array(found, dtype=float).reshape(-1, 3).T
    return ErrorCurve(*columns)


def error_slope(
    rows: pd.DataFrame, axis_name: str, measure: ErrorMeasure, estimand: Estimand
) -> PowerLaw | None:
    """The slope of an error against batch size, on log-log axes."""
    curve = error_curve(rows, axis_name, measure, estimand)
    return fit_power_law(curve.sizes, curve.errors)


def other_sizes(axis_name: str) -> tuple[str, ...]:
    """The sizes that tell curves apart."""
    return tuple(name for name in SIZES if name != axis_name)


def _error(group: pd.DataFrame, measure: ErrorMeasure, estimand: Estimand) -> tuple[float, float]:
    r"""A measure of error over repetitions, and its own standard error.

    A standard deviation known to `df` degrees of freedom has the relative standard error `1 / sqrt(2 df)`. For the root
    of the mean of `n` squares `x_i^2` with errors `s_i` it is

    .. math:: \sqrt{\sum_i x_i^2 s_i^2} / (n \cdot rms)
    """
    if measure.name == "spread":
        predicted = numbers(group, estimand.key("deltaH1"))
        known = predicted[np.isfinite(predicted)]
        if len(known) < REPETITIONS:
            return float("nan"), float("nan")
        spread = float(known.std(ddof=1))
        return spread, spread / math.sqrt(2 * (len(known) - 1))
    if measure.name == "difference":
        values, errors = (numbers(group, estimand.key("residual", part)) for part in ("", "_se"))
    else:
        values = numbers(group, estimand.key(measure.of, measure.part))
        freedom = numbers(group, estimand.key(measure.of, "_df"))
        if measure.part == "_sd_U":  # over the prompts of U
            freedom = np.maximum(numbers(group, "B_U") - 1, 0)
        with np.errstate(divide="ignore"):
            errors = values / np.sqrt(2 * freedom)
    there = np.isfinite(values)
    if not there.any():
        return float("nan"), float("nan")
    rms = root_mean_square(values)
    if rms == 0:
        return rms, float("nan")
    error = float(np.sqrt((values[there] ** 2 * errors[there] ** 2).sum())) / (int(there.sum()) * rms)
    return rms, error if math.isfinite(error) else float("nan")
