"""A sweep as a Python object: its table, its figures, and how a notebook shows both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from probe.digits import with_error
from probe.errors.exceptions import LogError
from probe.estimand import TOKEN
from probe.report.notebook import Figures, html_table
from probe.sweep.curves import SIZES, estimands, finished, numbers, varying
from probe.sweep.plots.style import plot_style
from probe.sweep.plots.write import figures
from probe.sweep.store import TABLES

COORDINATES = ("checkpoint_name", "seed", *SIZES, "learning_rate")
"""Columns that say which point a row is."""
MOST_ROWS = 200
"""Rows of the table that a notebook shows."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """What a sweep has found.

    Attributes:
        table: one row per point, see `docs/sweeps.md`.

    >>> from probe.sweep import Sweep, load_sweep, run_sweep
    >>> load_sweep("lightning_logs/sweep").plot()  # doctest: +SKIP
    >>> Sweep(run_sweep("quickstart", eta_factors=[0.5, 1, 2])).plot()  # doctest: +SKIP
    """

    table: pd.DataFrame

    def plot(self) -> Figures:
        """The figures that the sweep's folder has as PNG files, by their names; none where nothing varies.

        They are `matplotlib.figure.Figure`s of their own: pyplot's state and settings stay as they are.
        """
        with plot_style():
            found = Figures(figures(self.table))
            for figure in found.values():  # laid out while the style holds
                figure.draw_without_rendering()
        return found

    def _repr_html_(self) -> str:
        """The points with their changes, for a notebook."""
        table = self.table
        ok = finished(table)
        shown = [name for name in COORDINATES if name in varying(table, COORDINATES)] or ["learning_rate"]
        same = [f"{name} = {table[name].iloc[0]}" for name in COORDINATES if len(table) and name not in shown]
        estimand = next(iter(estimands(ok)), TOKEN)
        columns = [*shown, "verdict", *(f"{name}, {estimand.unit}" for name in ("deltaH1", "deltaH_true"))]
        rows = []
        for position, row in enumerate(table.head(MOST_ROWS).to_dict(orient="records")):
            one = table.iloc[position : position + 1]
            changes = [_with_error(one, estimand.key(name)) for name in ("deltaH1", "deltaH_true")]
            if row["status"] != "ok":
                changes = [str(row["error"]), ""]
            word = row["verdict"] if row["status"] == "ok" else row["status"]
            rows.append([*(_cell(row[name]) for name in shown), _cell(word), *changes])
        left_out = f", the first {MOST_ROWS} shown" if len(table) > MOST_ROWS else ""
        caption = f"{len(ok)} of {len(table)} points finished{left_out}{''.join(f'; {one}' for one in same)}"
        return html_table(caption, columns, rows)


def load_sweep(folder: str | Path) -> Sweep:
    """Read the table of a sweep from its folder, finished or not.

    Args:
        folder: `--output_folder` of the sweep.

    Raises:
        LogError: there is no table of a sweep in it.
    """
    path = Path(folder).expanduser() / TABLES[1]
    try:
        return Sweep(pd.read_parquet(path))
    except (OSError, ValueError) as error:
        raise LogError(
            f"cannot read {path}: expected the table of a sweep, found {error}; give the --output_folder of a sweep "
            "that has finished a point"
        ) from error


def _with_error(row: pd.DataFrame, name: str) -> str:
    """A value with its standard error."""
    value, error = (float(numbers(row, key)[0]) for key in (name, f"{name}_se"))
    return with_error(value, error)


def _cell(value: Any) -> str:
    """A coordinate as text."""
    if pd.isna(value):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
