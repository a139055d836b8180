"""What a person can read of a figure, as it is drawn: where its texts stand, and which points have errors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

LEGEND = "legend"
"""The gid of the places of legends."""


def panels(figure: Figure) -> list[Axes]:
    """The axes that have data."""
    return [axis for axis in figure.axes if axis.get_gid() != LEGEND]


def legend_texts(figure: Figure, panel: int) -> list[str]:
    """The texts of the legend of a panel."""
    places = [axis for axis in figure.axes if axis.get_gid() == LEGEND]
    legend = places[panel].get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def unreadable(figure: Figure) -> list[str]:
    """What overprints something else, or is not on the page; the figure is drawn for that.

    Texts and legends may not meet each other; legends may not meet panels either.
    """
    boxes, page = dict(_boxes(figure)), figure.bbox.padded(0.5)
    found = [f"{name} leaves the page" for name, box in boxes.items() if not _inside(box, page)]
    found += [f"{a} on {b}" for a, b in itertools.combinations(boxes, 2) if _meet(boxes[a], boxes[b])]
    for name, box in boxes.items():
        for k, axis in enumerate(panels(figure)):
            if name.startswith("legend") and _meet(box, axis.get_window_extent()):
                found.append(f"{name} on panel {k}")
    return found


def without_error(axis: Axes) -> list[str]:
    """The gids of points in a panel that have no error: neither a bar nor a band, and are not marked as such."""
    bars = [one for one in axis.containers if isinstance(one, ErrorbarContainer)]
    found = []
    for one in bars:
        gid, points = str(one.lines[0].get_gid()), len(np.atleast_1d(one.lines[0].get_xdata()))
        segments = [s for lines in one.lines[2] for s in lines.get_segments() if np.isfinite(s).all()]
        long = [s for s in segments if abs(s[0][1] - s[1][1]) > 0]
        if len(long) != points and not gid.endswith(":no_error"):
            found.append(gid)
    parts = {id(line) for one in bars for line in (one.lines[0], *one.lines[1])}
    banded = {"deltaH1"} if axis.collections else set()
    for line in axis.lines:
        own = (
            isinstance(line, Line2D) and id(line) not in parts and line.get_marker() not in ("None", "", None)
        )
        if own and line.get_gid() not in banded | {"invalid"}:
            found.append(str(line.get_gid()))
    return found


def _boxes(figure: Figure) -> Iterator[tuple[str, Bbox]]:
    """The places of everything that is written, in pixels."""
    FigureCanvasAgg(figure).draw()
    title = figure._suptitle  # type: ignore[attr-defined]  # matplotlib has no name for the artist itself
    if title is not None and title.get_text():
        yield "title", title.get_window_extent()
    for k, axis in enumerate(figure.axes):
        if (legend := axis.get_legend()) is not None:
            yield f"legend {k}", legend.get_window_extent()
        if axis.get_gid() == LEGEND:
            continue
        for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
            if text.get_text() and text.get_visible():
                yield f"{text.get_text()!r} of {k}", text.get_window_extent()
        for name, one in (("x", axis.xaxis), ("y", axis.yaxis)):
            yield from _ticks(f"{name} tick {{}} of {k}", one)


def _ticks(name: str, axis: Axis) -> Iterator[tuple[str, Bbox]]:
    """The labels of ticks within the view, and the factor that they have in common."""
    low, high = sorted(axis.get_view_interval())
    for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
        label = tick.label1
        if label.get_visible() and label.get_text() and low <= tick.get_loc() <= high:
            yield name.format(f"{label.get_text()} at {tick.get_loc()}"), label.get_window_extent()
    offset = axis.get_offset_text()
    if offset.get_visible() and offset.get_text():
        yield name.format("offset"), offset.get_window_extent()


def _inside(box: Bbox, page: Bbox) -> bool:
    return bool(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1)


def _meet(a: Bbox, b: Bbox) -> bool:
    """Whether two boxes have a part of positive area in common, beyond half a pixel."""
    return bool(min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5)
