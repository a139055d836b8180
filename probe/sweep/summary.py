"""The slopes and counts of a sweep, for scripts: `sweep_summary.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from probe.files.atomic import atomic_write_bytes
from probe.files.strict_json import dump_bytes
from probe.sweep.curves import (
    MEASURES,
    SIZES,
    error_slope,
    estimands,
    eta_10,
    eta_curves,
    eta_slope,
    finished,
    grouped,
    noise_floor,
    other_sizes,
    reference_rows,
)
from probe.sweep.fits import PowerLaw
from probe.sweep.store import SUMMARY

SUMMARY_SCHEMA = "entropy-probe/sweep-summary"
EXPECTED = {"deltaH_true": 1, "residual": 2}
"""Slopes against the learning rate where it is small enough for first (and second) order."""


def build_summary(table: pd.DataFrame) -> dict[str, Any]:
    """Counts, verdicts, reasons of failures, and every slope that the plots show."""
    status = table["status"].value_counts()
    failed = table[table["status"] == "failed"]
    return {
        "schema": SUMMARY_SCHEMA,
        "schema_version": 1,
        "points": {"finished": int(status.get("ok", 0)), "failed": int(status.get("failed", 0))},
        "verdicts": {str(k): int(v) for k, v in finished(table)["verdict"].value_counts().items()},
        "failed": [
            {"point": row["point"], "error": row["error"]} for row in failed.to_dict(orient="records")
        ],
        "eta_slopes": _eta_slopes(table),
        "batch_size_slopes": _batch_slopes(table),
    }


def write_summary(table: pd.DataFrame, folder: Path) -> Path:
    """Write `sweep_summary.json`, whole or not at all.

    Raises:
        LogError: it cannot be written.
    """
    return atomic_write_bytes(folder / SUMMARY, dump_bytes(build_summary(table)))


def varying_sizes(table: pd.DataFrame) -> list[str]:
    """The batch sizes that have several values."""
    return [name for name in SIZES if finished(table)[name].nunique() > 1]


def _eta_slopes(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Slopes of change and residual against the learning rate."""
    return [
        {
            **_plain(shared),
            "estimand": estimand.name,
            "quantity": name,
            "expected": expected,
            **_slope(eta_slope(rows, name, estimand), "eta"),
            "eta_10": eta_10(rows, estimand),
            "noise_floor": noise_floor(rows, estimand),
        }
        for shared, rows in eta_curves(table)
        for estimand in estimands(rows)
        for name, expected in EXPECTED.items()
        if estimand.key(name) in rows
    ]


def _batch_slopes(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Slopes of the errors against the batch sizes."""
    found = []
    for axis in varying_sizes(table):
        for shared, rows in grouped(reference_rows(table), ("checkpoint", *other_sizes(axis))):
            for estimand in estimands(rows):
                for measure in MEASURES:
                    fit = error_slope(rows, axis, measure, estimand)
                    if fit is not None:
                        entry = {**_plain(shared), "axis": axis, "estimand": estimand.name}
                        found.append({**entry, "error": measure.name, **_slope(fit, axis)})
    return found


def _slope(fit: PowerLaw | None, axis: str) -> dict[str, Any]:
    """A fit as plain values; null where there were too few resolved points."""
    if fit is None:
        return {"slope": None, "slope_se": None, "points": 0, f"{axis}_min": None, f"{axis}_max": None}
    return {
        "slope": fit.slope,
        "slope_se": fit.slope_se,
        "points": fit.points,
        f"{axis}_min": fit.x_min,
        f"{axis}_max": fit.x_max,
    }


def _plain(shared: dict[str, Any]) -> dict[str, Any]:
    """Coordinates as plain Python values."""
    return {
        key: None if pd.isna(value) else getattr(value, "item", lambda v=value: v)()
        for key, value in shared.items()
    }
