"""The tidy table of a sweep: one row per point, as CSV and as Parquet."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from probe.files.atomic import atomic_write_bytes
from probe.results import diagnostic_keys, keys
from probe.results.quantity import Quantity
from probe.sweep.store import TABLES, Record

LEADING = (
    *("point", "status", "verdict", "checkpoint", "checkpoint_name", "training_step", "seed"),
    *("B_E", "B_U", "G", "learning_rate", "eta_factor"),
)
"""The columns that stand first: which point, and whether it is any good."""
TRAILING = ("seconds", "finished_at", "verdict_reasons", "error")
"""The columns that stand last."""
LO_HI = ("lo", "hi")
"""What columns of the ends of an interval end in."""
_TEXTS = (
    *("point", "status", "verdict", "checkpoint", "checkpoint_name", "finished_at"),
    *("verdict_reasons", "error"),
)


def build_table(records: Iterable[Record]) -> pd.DataFrame:
    """The table of the points that were finished or have failed.

    Args:
        records: in the order of the rows.

    Returns:
        One row per record. Numbers that a point does not have, or that were not resolved, are missing values.
    """
    rows = [_row(record) for record in records]
    found = dict.fromkeys(name for row in rows for name in row)
    inner = [name for name in found if name not in LEADING and name not in TRAILING]
    columns = [*LEADING, *inner, *TRAILING]
    return pd.DataFrame({name: _column(name, [row.get(name) for row in rows]) for name in columns})


def write_table(table: pd.DataFrame, folder: Path) -> tuple[Path, Path]:
    """Write `sweep.csv` and `sweep.parquet`, each of them whole or not at all.

    Raises:
        LogError: a file cannot be written.
    """
    csv, parquet = (folder / name for name in TABLES)
    atomic_write_bytes(csv, table.to_csv(index=False, lineterminator="\n").encode("utf-8"))
    buffer = io.BytesIO()
    table.to_parquet(buffer, engine="pyarrow", index=False)
    atomic_write_bytes(parquet, buffer.getvalue())
    return csv, parquet


def _row(record: Record) -> dict[str, Any]:
    """One record as flat columns."""
    values = record.get("values") or {}
    own = record.get("own_learning_rate")
    row: dict[str, Any] = {
        "point": record["id"],
        "status": record["status"],
        "checkpoint_name": record.get("checkpoint_name"),
        **record["point"],
        "B_E": record["point"]["B_E"] * record["G_E"],  # responses, as in the results
        "seconds": record.get("seconds"),
        "finished_at": record.get("finished_at"),
        "error": record.get("error"),
        "verdict_reasons": " ".join(values.get("verdict_reasons") or ()) or None,
    }
    parts = keys.parts()
    for key, value in values.items():
        flat = parts[key].flat(key, value, LO_HI) if key in parts else {key: value}
        row |= {name: one for name, one in flat.items() if _is_scalar(name, one)}
    if own and row["learning_rate"] is not None:
        row["eta_factor"] = row["learning_rate"] / own if row["eta_factor"] is None else row["eta_factor"]
    return row | _quality(values, row)


def _is_scalar(key: str, value: Any) -> bool:
    """Whether a result is a column as it is: numbers, and those not resolved."""
    if key in ("verdict", "training_step"):
        return True
    return value is None or isinstance(value, (bool, int, float))


def _quality(values: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The diagnostics and batch statistics that are columns."""
    diagnostics = values.get("diagnostics") or {}
    statistics = values.get("batch_statistics") or {}
    found = {
        key: ", ".join(value) if key == "bias_flags" else value
        for key, value in diagnostics.items()
        if key == "bias_flags" or value is None or isinstance(value, (bool, int, float, str))
    }
    found |= {one.key: statistics[one.key] for one in keys.STATISTICS if one.key in statistics}
    return {(f"diagnostics_{key}" if key in row else key): value for key, value in found.items()}


def _column(name: str, values: list[Any]) -> pd.Series:
    """A column of the type that its values have; missing ones are missing values of that type."""
    there = [value for value in values if value is not None]
    if name in _TEXTS or any(isinstance(value, str) for value in there):
        return pd.Series([None if v is None else _one_line(v) for v in values], dtype="string")
    if there and all(isinstance(value, bool) for value in there):
        return pd.Series(values, dtype="boolean")
    if name in {"seed", *(one.key for one in _result_columns() if one.integer)}:
        return pd.Series(values, dtype="Int64")
    return pd.Series([None if v is None else float(v) for v in values], dtype="float64")


def _result_columns() -> tuple[Quantity, ...]:
    """The quantities that columns come from."""
    return (*keys.QUANTITIES, *diagnostic_keys.DIAGNOSTICS, *keys.STATISTICS)


def _one_line(value: Any) -> str:
    """A text without line breaks and control characters, for readers that take a CSV file line by line."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
