"""How the plots of a sweep look: fonts, and colours that the colour-blind can tell apart (Okabe and Ito)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probe.report import palette

NEGATIVE, POSITIVE = palette.FALLING, palette.RISING
"""Colours of the sign of a change."""
PREDICTED, MEASURED, DIFFERENCE, SPREAD = (
    palette.PREDICTED,
    palette.MEASURED,
    palette.DIFFERENCE,
    palette.TRACKED,
)
CURVES, FLOOR = palette.CURVES, palette.NEUTRAL
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 9.0,
    "legend.fontsize": 7.5,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.5,
    "mathtext.fontset": "dejavusans",
    "savefig.dpi": 200,
}


@contextmanager
def plot_style() -> Iterator[None]:
    """Draw with this style; settings are put back."""
    with matplotlib.rc_context(_STYLE):
        yield


def make_figure(
    rows: int, columns: int, title: str, share_x: bool = True, row_height: float = 3.1
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a grid of axes, drawn by Agg without a window or a global state (a notebook's stays as it is)."""
    figure = Figure(figsize=(1.0 + 4.6 * columns, 0.7 + row_height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex="col" if share_x else False, squeeze=False)
    figure.suptitle(title, fontsize=11)
    return figure, [list(row) for row in axes]
