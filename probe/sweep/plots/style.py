"""How the plots of a sweep look: colours that the colour-blind can tell apart (Okabe and Ito), panels, legends, ticks.

Legends stand below their panels, never in them; ticks have as many labels as there is room for.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.legend import Legend
from matplotlib.ticker import (
    FixedLocator,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    StrMethodFormatter,
)

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
Dashes = Literal["-", "--", "-.", ":"]
DASHES: tuple[Dashes, ...] = ("-", "--", "-.", ":")
"""Line styles of curves beside each other: the next one when the colours have been through."""
FIT, LIMIT, NEUTRAL = "#E69F00", "#CC79A7", "#777777"
PANEL_WIDTH, MARGIN = 4.6, 1.0
"""Inches."""
GAP, SPAN = 0.6, 0.1
"""Shares of the smallest gap between positions, and of all that they span, over which points of one are spread."""
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 9.0,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
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


@dataclass(frozen=True)
class Panels:
    """A figure of panels, each with a place for its legend below.

    Attributes:
        figure: drawn by Agg without a window or a global state (a notebook's stays as it is).
        axes: the panels, row by row.
        legends: the places of the legends, likewise.
        grid: rows of panels and of legends in turn.
        row_height: of a panel, inches.
    """

    figure: Figure
    axes: list[list[Axes]]
    legends: list[list[Axes]]
    grid: GridSpec
    row_height: float

    def finish(self, handles: Sequence[Sequence[Sequence[Any]]], extra: float = 0.0) -> Figure:
        """Put the legends into their places, label the ticks, and make the figure as high as all that needs.

        Args:
            handles: entries of each panel's legend, row by row.
            extra: what the lowest panels need besides, inches.
        """
        heights = []
        for i, (places, entries) in enumerate(zip(self.legends, handles, strict=True)):
            legend_heights = [_legend(place, found) for place, found in zip(places, entries, strict=True)]
            lowest = extra if i + 1 == len(handles) else 0.0
            heights += [self.row_height + lowest, max(legend_heights)]
        self.grid.set_height_ratios(heights)
        lines = self.figure.get_suptitle().count("\n") + 1
        width = self.figure.get_size_inches()[0]
        self.figure.set_size_inches(width, 0.3 + 0.2 * lines + sum(heights))
        for axis in (axis for row in self.axes for axis in row):
            for one in (axis.xaxis, axis.yaxis):
                if one.get_scale() == "log" and not isinstance(one.get_major_locator(), FixedLocator):
                    log_ticks(one)
        return self.figure


def make_panels(rows: int, columns: int, title: str, share_x: bool = True, row_height: float = 2.8) -> Panels:
    """A figure with a grid of panels.

    Args:
        rows: of panels.
        columns: of panels.
        title: of the figure; broken into lines of its width.
        share_x: whether the panels of a column have one x axis.
        row_height: of a panel, inches.
    """
    width = MARGIN + PANEL_WIDTH * columns
    figure = Figure(figsize=(width, 1.0 + row_height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 * rows, columns)
    axes: list[list[Axes]] = []
    legends: list[list[Axes]] = []
    for i in range(rows):
        above: list[Axes | None] = [*axes[0]] if share_x and axes else [None] * columns
        axes.append([figure.add_subplot(grid[2 * i, j], sharex=above[j]) for j in range(columns)])
        if share_x and i + 1 < rows:
            for axis in axes[-1]:
                axis.tick_params(labelbottom=False)
        legends.append([figure.add_subplot(grid[2 * i + 1, j], gid="legend") for j in range(columns)])
        for place in legends[-1]:
            place.set_axis_off()
    figure.suptitle(wrapped(title, width), fontsize=11)
    return Panels(figure, axes, legends, grid, row_height)


def wrapped(title: str, width: float) -> str:
    r"""A title in lines that fit a figure of that width in inches; nothing in it is taken for mathematics.

    >>> wrapped("checkpoint-60, B_E = 256, costs $5", 3.0)
    'checkpoint-60, B_E = 256,\ncosts \\$5'
    """
    lines = textwrap.wrap(title, width=max(int(width * 9), 20)) or [""]
    return "\n".join(line.replace("$", r"\$") for line in lines)


def _legend(place: Axes, handles: Sequence[Any]) -> float:
    """A legend in its place, in as many columns as fit; returns its height in inches."""
    if not handles:
        return 0.05
    figure = place.get_figure(root=True)
    assert figure is not None
    renderer: Any = figure.canvas.get_renderer()  # type: ignore[attr-defined]  # that of Agg
    for columns in (3, 2, 1):
        legend: Legend = place.legend(
            handles=handles, loc="upper center", ncols=columns, columnspacing=1.2, borderaxespad=0.2
        )
        box = legend.get_window_extent(renderer)
        if box.width / figure.dpi <= PANEL_WIDTH - 0.35:
            break
    legend.set_in_layout(False)  # the place is made for it, not the other way round
    return float(box.height / figure.dpi) + 0.15


def log_ticks(axis: Axis) -> None:
    """Labels for a logarithmic axis: powers of ten, or what lies between them where it has few of these."""
    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    axis.set_minor_formatter(NullFormatter())
    if decades >= 2:
        axis.set_major_locator(LogLocator(numticks=7))
    elif decades >= 0.5:
        axis.set_major_locator(LogLocator(subs=(1, 3) if decades >= 1 else (1, 2, 5), numticks=12))
        axis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(math.inf, math.inf)))
    else:
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:.4g}"))


def with_room(positions: Sequence[float], widths: Sequence[float]) -> list[int]:
    """Which of several labels can be written beside each other: the last, and as many before it as do not touch.

    Args:
        positions: their centres, in ascending order.
        widths: in the same unit, what they need with the space between them.

    >>> with_room([0.0, 0.5, 1.0, 3.0], [1.0, 1.0, 1.0, 1.0])
    [0, 2, 3]
    """
    kept: list[int] = []
    for i in reversed(range(len(positions))):
        if not kept or positions[kept[-1]] - positions[i] >= (widths[kept[-1]] + widths[i]) / 2:
            kept.append(i)
    return kept[::-1]


def set_apart(positions: np.ndarray, rank: np.ndarray | int, of: int, log: bool = False) -> np.ndarray:
    """Positions `(n,)` of points that share some of them, a little beside each other by their rank among `of`.

    Args:
        positions: along an axis.
        rank: `(n,)`, or one of all, from 0 on.
        of: how many there are at a position.
        log: whether the axis is logarithmic.

    >>> set_apart(np.array([0.0, 10.0]), np.array([0, 1]), 2).round(2).tolist()
    [-0.25, 10.25]
    """
    if log:
        where = np.log(positions)
        return np.asarray(positions * np.exp(set_apart(where, rank, of) - where), dtype=float)
    apart = np.diff(np.unique(positions))
    width = (
        min(float(apart.min()) * min(GAP, 0.15 * (of - 1)), SPAN * float(apart.sum())) if len(apart) else 0.1
    )
    return np.asarray(positions + width * ((rank + 0.5) / of - 0.5), dtype=float)


def short_names(names: Sequence[str], longest: int = 22) -> list[str]:
    """Names for labels: what all long ones begin with is left out, and what is still too long is cut in the middle.

    >>> short_names(["checkpoint-10", "checkpoint-20"])
    ['checkpoint-10', 'checkpoint-20']
    >>> short_names(["a-very-long-name-of-a-run-seed1", "a-very-long-name-of-a-run-seed2"])
    ['...seed1', '...seed2']
    """
    shown = [str(name) for name in names]
    if len(set(shown)) > 1 and max(map(len, shown)) > longest:
        common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*shown, strict=False)))
        while common and shown[0][common - 1].isalnum():
            common -= 1
        shown = [f"...{name[common:]}" if common > len("...") else name for name in shown]
    half = (longest - len("...")) // 2
    cut = [name if len(name) <= longest else f"{name[:half]}...{name[-half:]}" for name in shown]
    told_apart = [f"{i + 1}: {name}" if cut.count(name) > 1 else name for i, name in enumerate(cut)]
    return [name.replace("$", r"\$") for name in told_apart]
