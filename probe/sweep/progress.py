"""What a sweep says while it runs: one line per point."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from probe.digits import with_error
from probe.estimand import SEQUENCE, TOKEN, from_mapping
from probe.sweep.grid import Grid, Point
from probe.sweep.store import TABLES, Record
from probe.text import duration


@dataclass
class Tally:
    """Counts the points of a sweep and times them.

    Attributes:
        total: points of the grid.
        done: points that are finished, in this session or before.
        failed: points that failed in this session.
        runs_left: runs (one per combination) that have not ended yet.
    """

    total: int
    done: int
    failed: int
    runs_left: int = 0
    _runs: list[float] = field(default_factory=list)
    _points: list[float] = field(default_factory=list)
    _run_start: float = field(default_factory=time.perf_counter)
    _lap_start: float = field(default_factory=time.perf_counter)

    def start_run(self) -> None:
        """A combination's run starts."""
        self._run_start = self._lap_start = time.perf_counter()
        self.runs_left -= 1

    def end_run(self) -> None:
        """It has ended; what follows are measurements at further learning rates."""
        self._runs.append(time.perf_counter() - self._run_start)

    def lap(self, failed: bool) -> float:
        """Count a point; gives the seconds since the last one, those of a run being its first point's."""
        now = time.perf_counter()
        seconds, self._lap_start = now - self._lap_start, now
        self.failed += failed
        self.done += not failed
        if not failed:
            self._points.append(seconds)
        return round(seconds, 3)

    def seconds_left(self) -> float | None:
        """An estimate from the means so far; None before anything was measured."""
        if not self._points:
            return None
        run = sum(self._runs) / len(self._runs)
        further = max(sum(self._points) - sum(self._runs), 0.0) / len(self._points)
        return self.runs_left * run + (self.total - self.done - self.failed) * further

    def opening(self, folder: Path) -> str:
        """The first line of a session."""
        before = f", {self.done} of them finished before" if self.done else ""
        return f"Sweep of {self.total} {_points(self.total)}{before}, in {folder}"

    def closing(self, folder: Path, plots: int) -> str:
        """The last lines of a session."""
        failed = f", {self.failed} failed" if self.failed else ""
        files = f"{folder / TABLES[0]}, {TABLES[1]}" + (
            f" and {plots} plot{'s' if plots > 1 else ''}" if plots else ""
        )
        return f"{self.done} of {self.total} points finished{failed}: {files}"


def point_line(point: Point, record: Record, grid: Grid, tally: Tally) -> str:
    """The line of a finished or failed point: which, its verdict, predicted and measured change, the time."""
    width = len(str(tally.total))
    head = f"[{tally.done + tally.failed:>{width}}/{tally.total}] {point_text(point, record, grid)}:"
    if record["status"] == "failed":
        return f"{head} failed: {record['error']}"
    values = record["values"]
    responses_only = "deltaH_true" in values and TOKEN.key("deltaH_true") not in values
    estimand = SEQUENCE if responses_only else TOKEN
    changes = [
        f"{name} {with_error(number.value, number.se)}"
        for name in ("deltaH1", "deltaH_true")
        if (number := from_mapping(values, name)[estimand]) is not None
    ]
    verdict = f" {values['verdict']};" if values.get("verdict") else ""
    return f"{head}{verdict} {', '.join(changes)} {estimand.unit}; {_time(record, tally)}"


def point_text(point: Point, record: Record, grid: Grid) -> str:
    """The coordinates along which the grid varies, and the learning rate."""
    parts = []
    if "checkpoints" in grid.varying:
        parts.append(record.get("checkpoint_name") or Path(point.checkpoint).name)
    for axis, name in (("seeds", "seed"), ("B_U", "B_U"), ("G", "G"), ("B_E", "B_E")):
        if axis in grid.varying:
            parts.append(f"{name} {getattr(point, name)}")
    eta = (record.get("values") or {}).get("learning_rate", point.learning_rate)
    parts.append(f"eta {eta:.4g}" if eta is not None else f"{point.eta_factor:g} x the learning rate")
    return ", ".join(parts)


def _time(record: Record, tally: Tally) -> str:
    """The seconds of a point, and about how long the rest takes."""
    left = tally.seconds_left()
    rest = f", about {duration(left)} left" if left is not None and left >= 1 else ""
    return f"{record['seconds']:.1f} s{rest}"


def _points(count: int) -> str:
    return "point" if count == 1 else "points"
