"""Where things stand in the charts of a page: axes, dots with intervals, curves with bands. All places are per cent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

Tone = Literal["predicted", "measured", "difference", "tracked", "falls", "rises", "neutral"]
"""What a mark stands for, which gives its colour; labels and texts say the same."""
ROOM = 0.04
"""Share of the range that is left free at either end of an axis."""
MOST_TICKS = 5
"""Stretches between the ticks of an axis, at the most."""
MOST_READINGS = 1000
"""Steps of a chart whose values can be read: a pointer tells no more apart."""


@dataclass(frozen=True)
class Axis:
    """A linear axis.

    Attributes:
        low: its left (or lower) end.
        high: its right (or upper) end; above `low`.
        whole: whether it has whole numbers alone, as steps are.
    """

    low: float
    high: float
    whole: bool = False

    @classmethod
    def over(cls, values: Iterable[float | None], with_zero: bool = False) -> Axis:
        """An axis on which all finite values have room.

        >>> Axis.over([1.0, 3.0, None]).ticks
        (1.0, 1.5, 2.0, 2.5, 3.0)
        """
        finite = [x for x in values if x is not None and math.isfinite(x)]
        finite += [0.0] if with_zero or not finite else []
        low, high = min(finite), max(finite)
        room = ROOM * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - room, high + room)

    def at(self, value: float) -> float:
        """Where a value stands, in per cent; what is beyond an end stands at it.

        >>> Axis(-1.0, 1.0).at(0.5), Axis(-1.0, 1.0).at(math.inf)
        (75.0, 100.0)
        """
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(100 * share, 3)

    @cached_property
    def ticks(self) -> tuple[float, ...]:
        """Round numbers along it, at most six."""
        span = self.high - self.low
        power = 10.0 ** math.floor(math.log10(span / MOST_TICKS))
        for factor in (1, 2, 2.5, 5, 10, 20, 25, 50):
            step = max(factor * power, 1.0) if self.whole else factor * power
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            if last - first <= MOST_TICKS:
                return tuple(float(f"{k * step:.12g}") + 0.0 for k in range(first, last + 1))
        raise AssertionError("a step of 50 times a fifth's power of ten is longer than the axis")

    @property
    def labels(self) -> list[tuple[float, str]]:
        """Where the ticks stand, and what is written at them."""
        step = min((b - a for a, b in pairwise(self.ticks)), default=1.0)
        largest = max((abs(tick) for tick in self.ticks), default=1.0) or 1.0
        # as many digits as tell neighbours apart
        digits = max(math.floor(math.log10(largest)) - math.floor(math.log10(step)) + 2, 3)
        return [(self.at(tick), f"{tick:.{min(digits, 15)}g}") for tick in self.ticks]


@dataclass(frozen=True)
class Mark:
    """A value on the line of a chart.

    Attributes:
        value: where its dot stands.
        low: lower end of its 95 % interval; None without one.
        high: upper end.
        tone: what it stands for.
        start: where a bar begins that ends at the value; None for a dot alone.
    """

    value: float
    low: float | None = None
    high: float | None = None
    tone: Tone = "neutral"
    start: float | None = None

    @property
    def reach(self) -> tuple[float | None, ...]:
        """All that an axis must have room for."""
        return self.value, self.low, self.high, self.start


@dataclass(frozen=True)
class Line:
    """One line of a chart, which is a row of a table.

    Attributes:
        label: what it is about.
        marks: what is drawn.
        cells: the same as texts.
        note: in plain words.
    """

    label: str
    marks: tuple[Mark, ...]
    cells: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """Lines above one axis.

    Attributes:
        caption: what is shown, with its unit.
        heads: of the labels, the cells and, where there are notes, of these.
        lines: from the top.
        legend: tones with their meaning, where there is more than one.
        limit: how far the axis reaches on either side of 0; None for as far as the marks do.
    """

    caption: str
    heads: tuple[str, ...]
    lines: Sequence[Line]
    legend: tuple[tuple[Tone, str], ...] = ()
    limit: float | None = None

    @cached_property
    def axis(self) -> Axis:
        """Over all of its marks, as far as the limit allows, and 0."""
        within = math.inf if self.limit is None else self.limit
        reach = (x for line in self.lines for mark in line.marks for x in mark.reach if x is not None)
        return Axis.over((min(max(x, -within), within) for x in reach), True)

    def beyond(self, mark: Mark) -> bool:
        """Whether a mark stands at the end of the axis because its value is farther out."""
        return not self.axis.low <= mark.value <= self.axis.high

    @property
    def with_notes(self) -> bool:
        """Whether a line has one."""
        return any(line.note for line in self.lines)


@dataclass(frozen=True)
class Curve:
    """One number over the steps of a training.

    Attributes:
        name: of it.
        tone: what it stands for.
        x: optimizer steps.
        y: its values; None where there is none.
        low: lower ends of 95 % intervals, None where there are none; empty without any.
        high: upper ends likewise; one without an upper end is infinite.
        dots: whether values are dots with bars, rather than a curve with a band.
    """

    name: str
    tone: Tone
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    dots: bool = False

    @property
    def edges(self) -> list[tuple[float, float, float]]:
        """Step and both ends of every interval that is known."""
        found = zip(self.x, self.low, self.high, strict=True) if self.low else ()
        return [
            (x, low, high)
            for x, low, high in found
            if low is not None and high is not None and not math.isnan(low + high)
        ]


@dataclass(frozen=True)
class Rule:
    """A straight line across a chart of curves.

    Attributes:
        value: where it stands.
        name: what is written at it.
        upright: whether it stands at a step, rather than at a value.
    """

    value: float
    name: str
    upright: bool = False


@dataclass(frozen=True)
class CurveChart:
    """Curves over the steps of a training.

    Attributes:
        title: what is shown, with its unit.
        curves: back to front.
        rules: thresholds, and steps after which something happened.
        words: what is to be said of it, in a sentence.
    """

    title: str
    curves: Sequence[Curve]
    rules: Sequence[Rule] = ()
    words: str = ""

    @cached_property
    def across(self) -> Axis:
        """Over the steps."""
        steps = [x for curve in self.curves for x in curve.x]
        axis = Axis.over([*steps, *(rule.value for rule in self.rules if rule.upright)])
        return Axis(
            min(axis.low, min(steps, default=0) - 0.5),
            max(axis.high, max(steps, default=0) + 0.5),
            whole=True,
        )

    @cached_property
    def up(self) -> Axis:
        """Over values, intervals and thresholds; open ends of intervals do not count."""
        values = [y for curve in self.curves for part in (curve.y, curve.low, curve.high) for y in part]
        return Axis.over([*values, *(rule.value for rule in self.rules if not rule.upright)])

    @property
    def readings(self) -> list[tuple[float, float, str]]:
        """Steps, where they stand, and their values in words; of very many steps some, the last among them."""
        steps = sorted({x for curve in self.curves for x in curve.x})
        stride = math.ceil(len(steps) / MOST_READINGS) or 1
        kept = sorted({*steps[::stride], *steps[-1:]})
        said: dict[float, list[str]] = {step: [f"step {step:.0f}"] for step in kept}
        for curve in self.curves:
            for k, (step, y) in enumerate(zip(curve.x, curve.y, strict=True)):
                if step in said and y is not None and math.isfinite(y):
                    ends = (curve.low[k], curve.high[k]) if curve.low else (None, None)
                    known = all(end is not None for end in ends)
                    interval = f" [{ends[0]:.4g}, {ends[1]:.4g}]" if known else ""
                    said[step].append(f"{curve.name} {y:.4g}{interval}")
        return [(self.across.at(step), step, "; ".join(words)) for step, words in said.items()]

    def path(self, curve: Curve) -> str:
        """The values as an SVG path; a gap where one is missing."""
        return _path(
            (self._x(x), self._y(y)) if _finite(y) else None for x, y in zip(curve.x, curve.y, strict=True)
        )

    def band(self, curve: Curve) -> str:
        """The band between the ends of the intervals as an SVG path; nothing without."""
        edges = curve.edges
        if curve.dots or len(edges) < 2:
            return ""
        there = " ".join(f"{self._x(x)},{self._y(low)}" for x, low, _ in edges)
        back = " ".join(f"{self._x(x)},{self._y(high)}" for x, _, high in reversed(edges))
        return f"M{there} L{back} Z"

    def bars(self, curve: Curve) -> str:
        """The intervals as upright bars."""
        if not curve.dots:
            return ""
        return " ".join(f"M{self._x(x)},{self._y(low)} V{self._y(high)}" for x, low, high in curve.edges)

    def points(self, curve: Curve) -> str:
        """Values as an SVG path of lines of no length, whose round caps are dots; of a curve those that stand alone."""
        there = [_finite(y) for y in curve.y]
        alone = [
            known and (curve.dots or not (any(there[k - 1 : k] if k else ()) or any(there[k + 1 : k + 2])))
            for k, known in enumerate(there)
        ]
        places = zip(curve.x, curve.y, alone, strict=True)
        return " ".join(f"M{self._x(x)},{self._y(y)} h0" for x, y, shown in places if shown)

    def _x(self, step: float) -> float:
        return self.across.at(step)

    def _y(self, value: float | None) -> float:
        return round(100 - self.up.at(0.0 if value is None else value), 3)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _path(points: Iterable[tuple[float, float] | None]) -> str:
    """An SVG path through points; None begins a new stretch."""
    parts, pen_up = [], True
    for point in points:
        if point is None:
            pen_up = True
            continue
        parts.append(f"{'M' if pen_up else 'L'}{point[0]},{point[1]}")
        pen_up = False
    return " ".join(parts)
