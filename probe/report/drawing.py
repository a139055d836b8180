"""Figures without a window: made by matplotlib's classes alone, so that no backend or setting of the user's changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from probe.report.palette import FAINT, INK

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 130
"""A figure is 7 to 8 inches wide, with letters of 14 points: they survive in the small cards of loggers."""
ERROR_BARS: dict[str, Any] = {
    "fmt": "o",
    "markersize": 9.0,
    "capsize": 5.0,
    "elinewidth": 2.4,
    "capthick": 2.4,
}
"""A dot with its 95 % interval."""
_STYLE: dict[Any, Any] = {
    "figure.dpi": DOTS_PER_INCH,
    "savefig.dpi": DOTS_PER_INCH,
    "font.size": 14.0,
    "axes.titlesize": 15.0,
    "axes.labelsize": 14.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-4, 4),
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "legend.fontsize": 12.5,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "lines.linewidth": 2.2,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    # texts of others are no formulas
    "text.parse_math": False,
}


@contextmanager
def drawn(rows: int, columns: int, width: float, height: float, **grid: Any) -> Iterator[tuple[Figure, Any]]:
    """A new figure with a grid of axes, to be filled in inside of a `with` block.

    Args:
        rows: of the grid.
        columns: of the grid.
        width: of the figure, inches.
        height: likewise.
        grid: further arguments of `Figure.subplots`.

    Returns:
        The figure, and its axes `(rows, columns)`. matplotlib's settings are the user's again after the block.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", _STYLE]):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **grid)


def few_ticks(axes: Axes, x: int | None = 4, y: int | None = None, steps: bool = False) -> None:
    """At most so many ticks, so that their numbers can be large; None leaves an axis as it is.

    Args:
        axes: to change.
        x: ticks from left to right.
        y: ticks from bottom to top.
        steps: whether x counts steps, so that its ticks are integers.
    """
    from matplotlib.ticker import MaxNLocator

    for axis, count, integer in ((axes.xaxis, x, steps), (axes.yaxis, y, False)):
        if count is not None:
            axis.set_major_locator(MaxNLocator(count, min_n_ticks=2, integer=integer))


def showable(text: str) -> str:
    r"""A text with a box in the place of every character that the font of figures cannot draw.

    >>> showable("so the total\n")
    'so the total\ufffd'
    """
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans Mono")).get_char_index
    return "".join(c if c.isprintable() and known(ord(c)) else "\ufffd" for c in text)


def zero_line(axes: Axes) -> None:
    """Where nothing changes, for changes that run from left to right."""
    axes.axvline(0.0, color=FAINT, linewidth=1.4, zorder=1)


def pixels(figure: Figure) -> np.ndarray:
    """A figure as a picture, `(height, width, 3)` of unsigned bytes."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
