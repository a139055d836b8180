"""What forecasts and alarms are worth: trainings of nine shapes, and real ones, against a free rival's rule.

A synthetic training follows a curve of its family, multiplied by a random walk: the steps' own noise, white or with the
correlation that a momentum of 0.9 gives it. Levels are read with an error of 3 %, changes with one of a fifth of their
mean size. The policy has collapsed when its entropy is at a tenth of its first reading.

The rival fits a straight line and an exponential to the levels of the last half, takes the better of the two and
projects it to the threshold. Both raise an alarm where the collapse is forecast within 50 steps, and may raise another
after three readings of calm.

    python benchmarks/forecast.py --series 1000                # synthetic
    python benchmarks/forecast.py --runs FOLDER                # trains two policies with TRL, keeps them there

Columns: `false`, alarms per 100 steps in trainings that do not collapse; `cried`, share of these that have one;
`missed`, share of the collapses without an alarm before; `lead`, median number of steps from the first alarm to the
collapse; `early`, share of first alarms more than two horizons before it; `covers`, share of the intervals with an
upper end that hold the step of the collapse; `ends`, share of the readings that have such an interval.

Two more tables follow. One counts the readings from the step at which a fall stops without notice to the first one
after which the outlook is `flattening` or `no collapse in sight`, for trainings whose noise goes on and for trainings
that stand still from there on, as with a learning rate of 0; forecasts are made every fifth step. The other one says
how often the collapse came within the horizon, by the chance of it that was given, over all families.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.collapse import COLLAPSING, HEALTHY, Run, load_or_train
from probe.forecast.arrival import arrival
from probe.forecast.forecast import ALARM_CHANCE, forecast
from probe.forecast.hypotheses import Array, hypotheses
from probe.forecast.readings import EntropyReading, logged_readings
from probe.forecast.trend import ReadingArrays, fit_trend
from probe.live.alarm import CALM_CHANCE, CALM_READINGS, ThresholdAlarm
from probe.live.lines import IN_SIGHT, WORTH_SAYING

STEPS, HORIZON, WINDOW = 200, 50, 60
FRACTION = 0.1
FLOOR = 0.02
"""Share of the first entropy that curves end at."""
LEVEL_ERROR, CHANGE_ERROR = 0.03, 0.2
MOMENTUM = 0.9
STILL = 0.01
"""Error of the changes of a training that stands still, as a share of that before: both are as small as the step."""
CHANCES = (0.0, 0.02, 0.05, 0.15, 0.3, 0.6, 1.0)
"""Ends of the bins of chances."""


# ---------------------------------------------------------------- trainings


def straight(rng: np.random.Generator, k: Array) -> Array:
    """Down to a tenth in 60 to 180 steps, along a line."""
    return 1 - 0.9 * k / rng.uniform(60, 180)


def exponential(rng: np.random.Generator, k: Array) -> Array:
    """Down to a tenth in 60 to 180 steps, exponentially."""
    return np.asarray(0.1 ** (k / rng.uniform(60, 180)))


def faster(rng: np.random.Generator, k: Array) -> Array:
    """Down to a tenth in 60 to 180 steps, faster and faster."""
    return np.asarray(1 - 0.9 * (k / rng.uniform(60, 180)) ** rng.uniform(1.5, 3))


def plateau_then_fall(rng: np.random.Generator, k: Array) -> Array:
    """Flat for 30 to 90 steps, then down to a tenth in 30 to 90, along a line or exponentially."""
    fallen = np.clip((k - rng.uniform(30, 90)) / rng.uniform(30, 90), 0, None)
    return np.asarray(1 - 0.9 * fallen if rng.random() < 0.5 else 0.1**fallen)


def fall_then_plateau(rng: np.random.Generator, k: Array) -> Array:
    """Exponentially to a floor of 20 to 60 % with a time constant of 8 to 40 steps."""
    floor = rng.uniform(0.2, 0.6)
    return np.asarray(floor + (1 - floor) * np.exp(-k / rng.uniform(8, 40)))


def fall_that_stops(rng: np.random.Generator, k: Array) -> Array:
    """Along a line to a floor of 20 to 60 % in 20 to 80 steps, and there it ends without notice."""
    floor = rng.uniform(0.2, 0.6)
    return np.maximum(1 - (1 - floor) * k / rng.uniform(20, 80), floor)


def flat(rng: np.random.Generator, k: Array) -> Array:
    """Nothing but noise."""
    return np.ones_like(k)


def rising(rng: np.random.Generator, k: Array) -> Array:
    """Up by 30 to 200 %."""
    return 1 + rng.uniform(0.3, 2) * k / STEPS


def oscillating(rng: np.random.Generator, k: Array) -> Array:
    """Up and down by 10 to 30 % with a period of 20 to 80 steps."""
    return np.asarray(
        1 + rng.uniform(0.1, 0.3) * np.sin(2 * np.pi * k / rng.uniform(20, 80) + rng.uniform(0, 6.3))
    )


FAMILIES: tuple[Callable[[np.random.Generator, Array], Array], ...] = (
    straight,
    exponential,
    faster,
    plateau_then_fall,
    fall_then_plateau,
    fall_that_stops,
    flat,
    rising,
    oscillating,
)


@dataclass(frozen=True)
class Trainings:
    """Trainings and what was read of them.

    Attributes:
        readings: before and of every step.
        threshold: `(S,)`.
        end: `(S,)`, the first step that starts from a collapsed policy; infinite where there is none.
        stop: `(S,)`, the step from which on the curve is level; infinite where it moves to the end.
    """

    readings: ReadingArrays
    threshold: Array
    end: Array
    stop: Array


def synthetic(
    family: Callable[[np.random.Generator, Array], Array],
    series: int,
    phi: float,
    seed: int,
    stands: bool = False,
) -> Trainings:
    """Trainings of a family.

    Args:
        family: the curve.
        series: their number.
        phi: autocorrelation of the steps' noise; its long-run variance does not depend on it.
        seed: of the random numbers.
        stands: whether nothing moves any more, and the errors of the changes are small, once the curve is level.
    """
    rng = np.random.default_rng([seed, *family.__name__.encode(), round(10 * phi)])
    H, stop = np.empty((series, STEPS + 1)), np.full(series, np.inf)
    for place, row in enumerate(H):
        curve = np.maximum(family(rng, np.arange(STEPS + 1.0)), FLOOR)
        usual = float(np.clip(np.abs(np.diff(np.log(curve))).mean(), 0.003, 0.015))
        size = rng.uniform(0.2, 1.0) * usual * math.sqrt((1 - phi) / (1 + phi))
        noise = rng.standard_normal(STEPS)
        for k in range(1, STEPS):
            noise[k] = phi * noise[k - 1] + math.sqrt(1 - phi**2) * noise[k]
        moves = np.flatnonzero(np.diff(curve))
        if len(moves) and moves[-1] < STEPS - 1:
            stop[place] = moves[-1] + 1
            noise[int(stop[place]) if stands else STEPS :] = 0
        row[:] = curve * np.exp(np.concatenate([[0], size * noise.cumsum()]))
    change = np.diff(H, axis=1)
    error = CHANGE_ERROR * np.abs(change).mean(1, keepdims=True) * np.ones_like(change)
    if stands:
        error *= np.where(np.arange(STEPS) < stop[:, None], 1, STILL)
    level = H[:, :-1] * np.exp(LEVEL_ERROR * rng.standard_normal(change.shape))
    threshold = FRACTION * level[:, 0]
    below = threshold[:, None] >= H
    readings = ReadingArrays(
        step=np.arange(STEPS),
        logged=np.zeros(STEPS, dtype=bool),
        has_change=np.ones(STEPS, dtype=bool),
        level=level,
        level_se=LEVEL_ERROR * level,
        change=change + error * rng.standard_normal(change.shape),
        change_se=error,
    )
    return Trainings(readings, threshold, np.where(below.any(1), below.argmax(1), np.inf), stop)


# ---------------------------------------------------------------- forecasts


@dataclass(frozen=True)
class Said:
    """What was said after one reading, of all trainings.

    Attributes:
        step: the next step.
        alarm: `(S,)`, whether the collapse is forecast within the horizon.
        calm: whether it is not, by far.
        low: lower end of the interval, steps from `step`.
        high: its upper end.
        chance: of the collapse within the horizon.
        quiet: whether the outlook is `flattening` or `no collapse in sight`.
    """

    step: int
    alarm: np.ndarray
    calm: np.ndarray
    low: Array
    high: Array
    chance: Array
    quiet: np.ndarray


def probe_says(trainings: Trainings, every: int, momentum: float) -> Iterator[Said]:
    """What the probe's forecast says after every fifth step, from the fifth reading on."""
    at = np.arange(0, STEPS, every)
    for n in range(5, len(at) + 1, 5 if every == 1 else 1):
        read = trainings.readings.part(at[max(0, n - WINDOW) : n])
        reached = arrival(fit_trend(read, hypotheses(), momentum), trainings.threshold)
        chance = reached.within(HORIZON)
        low, steps, high = (reached.quantile(p) for p in (0.025, 0.5, 0.975))
        quiet = (steps > IN_SIGHT * HORIZON) & (chance < WORTH_SAYING)
        yield Said(int(at[n - 1]) + 1, chance >= ALARM_CHANCE, chance < CALM_CHANCE, low, high, chance, quiet)


def rival_says(trainings: Trainings, every: int) -> Iterator[Said]:
    """The rival's projection, after the same readings, from the eighth on."""
    at = np.arange(0, STEPS, every)
    for n in range(8, len(at) + 1, 5 if every == 1 else 1):
        yield rival_projection(trainings.readings.part(at[n - max(n // 2, 8) : n]), trainings.threshold)


def rival_projection(read: ReadingArrays, threshold: Array) -> Said:
    """What the rival's rule makes of some levels.

    Args:
        read: the last half of what was read.
        threshold: `(S,)`.
    """
    design = np.stack([np.ones(len(read.step)), read.step - read.step[-1] - 1.0])
    left, misfit = [], []
    for transform, inverse in ((np.asarray, np.asarray), (np.log, np.exp)):
        fit = transform(read.level) @ np.linalg.pinv(design)
        misfit.append(((inverse(fit @ design) - read.level) ** 2).sum(1))
        falls = fit[:, 1] < 0
        distance = transform(threshold) - fit[:, 0]
        left.append(np.where(falls, np.maximum(distance / np.where(falls, fit[:, 1], -1.0), 0.0), np.inf))
    steps = np.where(misfit[0] <= misfit[1], left[0], left[1])
    nothing = np.full(len(steps), np.inf)
    return Said(
        int(read.step[-1]) + 1,
        steps <= HORIZON,
        steps > 2 * HORIZON,
        nothing,
        nothing,
        (steps <= HORIZON).astype(np.float64),
        steps > IN_SIGHT * HORIZON,
    )


# ---------------------------------------------------------------- what they are worth


@dataclass(frozen=True)
class Worth:
    """See the columns in this file's docstring; NaN where there is nothing to count."""

    false: float
    cried: float
    missed: float
    lead: float
    early: float
    covers: float
    ends: float


def worth(said: Iterable[Said], end: Array) -> Worth:
    """Count alarms and intervals.

    Args:
        said: after each reading.
        end: `(S,)`, the step of the collapse.
    """
    S = len(end)
    armed, calm = np.ones(S, dtype=bool), np.zeros(S, dtype=int)
    first, alarms = np.full(S, np.inf), np.zeros(S)
    held, given, before_end = 0, 0, 0
    for one in said:
        before = one.step < end
        new = armed & one.alarm & before
        first, alarms = np.where(new, np.minimum(first, one.step), first), alarms + new
        armed = armed & ~new
        calm = np.where(one.calm, calm + 1, 0)
        armed |= calm >= CALM_READINGS
        finite = before & np.isfinite(one.high)
        # the level is at the threshold somewhere in the step before the one that starts from a collapsed policy
        left = end - one.step
        held += int(((one.low <= left) & (left - 1 <= one.high) & finite).sum())
        given, before_end = given + int(finite.sum()), before_end + int(before.sum())
    collapsed = np.isfinite(end)
    lead = (end - first)[collapsed & np.isfinite(first)]
    healthy = ~collapsed
    return Worth(
        false=100 * float(alarms[healthy].sum()) / (healthy.sum() * STEPS) if healthy.any() else math.nan,
        cried=float(np.isfinite(first[healthy]).mean()) if healthy.any() else math.nan,
        missed=float(np.isinf(first[collapsed]).mean()) if collapsed.any() else math.nan,
        lead=float(np.median(lead)) if len(lead) else math.nan,
        early=float((lead > 2 * HORIZON).mean()) if len(lead) else math.nan,
        covers=held / given if given else math.nan,
        ends=given / max(before_end, 1),
    )


def readings_to_quiet(said: Sequence[Said], stop: Array, every: int) -> Array:
    """Readings after a stop until the outlook is quiet, of trainings where it was not before; infinite if it never is.

    Args:
        said: after each reading.
        stop: `(S,)`, the step from which on nothing moves; infinite where there is none.
        every: steps from one reading to the next.
    """
    loud, first = np.zeros(len(stop), dtype=bool), np.full(len(stop), np.inf)
    for one in said:
        before = one.step <= stop
        loud = np.where(before, ~one.quiet, loud)
        first = np.where(~before & one.quiet, np.minimum(first, one.step), first)
    return np.ceil((first - stop)[loud & np.isfinite(stop)] / every)


@dataclass
class Calibration:
    """How often a collapse came within the horizon, by the chance that was given.

    Attributes:
        given: number of forecasts in each bin of `CHANCES`.
        chances: their sum.
        came: of these, those within whose horizon it came.
    """

    given: Array
    chances: Array
    came: Array

    @classmethod
    def of(cls, said: Sequence[Said], end: Array) -> Calibration:
        """Forecasts before the collapse whose horizon ends within the training."""
        count = len(CHANCES) - 1
        given, chances, came = np.zeros((3, count))
        for one in said:
            known = (one.step < end) & (one.step + HORIZON < STEPS)
            place = np.searchsorted(CHANCES[1:-1], one.chance[known], side="right")
            given += np.bincount(place, minlength=count)
            chances += np.bincount(place, one.chance[known], count)
            came += np.bincount(place, end[known] <= one.step + HORIZON, count)
        return cls(given, chances, came)

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(self.given + other.given, self.chances + other.chances, self.came + other.came)


HEADER = (
    "| family | noise | probes every | collapse | false | rival | cried | rival | missed | rival | lead | rival "
    "| early | rival | covers | ends |"
)


def print_synthetic(series: int, seed: int, workers: int) -> None:
    """The tables of synthetic trainings, as Markdown."""
    print(HEADER)
    print("|" + "---|" * (HEADER.count("|") - 1))
    rows = [
        (family, phi, every, series, seed)
        for family in FAMILIES
        for phi in (0.0, MOMENTUM)
        for every in (1, 5)
    ]
    calibration: dict[tuple[float, int], Calibration] = {}
    with ProcessPoolExecutor(workers) as pool:
        stops = [
            pool.submit(stop_row, stands, phi, every, series, seed)
            for stands in (False, True)
            for phi in (0.0, MOMENTUM)
            for every in (1, 5)
        ]
        for (_, phi, every, *_), (line, found) in zip(rows, pool.map(_row, rows), strict=True):
            print(line, flush=True)
            before = calibration.get((phi, every))
            calibration[phi, every] = before + found if before else found
    print("\n| after the stop | noise | probes every | trainings | readings: median | 90 % |")
    print("|" + "---|" * 6)
    for one in stops:
        print(one.result())
    print_calibration(calibration)


def _row(
    of: tuple[Callable[[np.random.Generator, Array], Array], float, int, int, int],
) -> tuple[str, Calibration]:
    """One row of the first table, and how often its chances came."""
    family, phi, every, series, seed = of
    trainings = synthetic(family, series, phi, seed)
    said = list(probe_says(trainings, every, phi))
    ours = worth(said, trainings.end)
    rival = worth(rival_says(trainings, every), trainings.end)
    cells = [
        *_cell_names(family.__name__, phi, every),
        str(int(np.isfinite(trainings.end).sum())),
        *(_cell(x, 2) for x in (ours.false, rival.false)),
        *(_percent(x) for x in (ours.cried, rival.cried, ours.missed, rival.missed)),
        *(_cell(x, 0) for x in (ours.lead, rival.lead)),
        *(_percent(x) for x in (ours.early, rival.early, ours.covers, ours.ends)),
    ]
    return "| " + " | ".join(cells) + " |", Calibration.of(said, trainings.end)


def stop_row(stands: bool, phi: float, every: int, series: int, seed: int) -> str:
    """Readings until the outlook is quiet, a row of Markdown; the arguments are those of `synthetic`."""
    trainings = synthetic(fall_that_stops, series, phi, seed, stands)
    said = list(probe_says(trainings, every, phi))
    # a training whose noise has it collapse in the end has not stopped
    stop = np.where(np.isfinite(trainings.end), np.inf, trainings.stop)
    found = np.sort(readings_to_quiet(said, stop, every))
    cells = [
        *_cell_names("nothing moves" if stands else "noise goes on", phi, every),
        str(len(found)),
        *(f"{found[int(share * (len(found) - 1))]:.0f}" for share in (0.5, 0.9)),
    ]
    return "| " + " | ".join(cells) + " |"


def print_calibration(calibration: dict[tuple[float, int], Calibration]) -> None:
    """The table of chances, as Markdown.

    Args:
        calibration: by autocorrelation of the noise and steps between probes.
    """
    names = [" ".join(_cell_names("", phi, every)[1:]) for phi, every in calibration]
    print("\n| chance | " + " | ".join(f"{one}: mean chance | came | of" for one in names) + " |")
    print("|" + "---|" * (3 * len(names) + 1))
    for place, (low, high) in enumerate(pairwise(CHANCES)):
        cells = [f"{100 * low:.0f} to {100 * high:.0f} %"]
        for one in calibration.values():
            given = one.given[place] or math.nan
            cells += [
                _percent(one.chances[place] / given),
                _percent(one.came[place] / given),
                _cell(given, 0),
            ]
        print("| " + " | ".join(cells) + " |")


def _cell_names(family: str, phi: float, every: int) -> list[str]:
    return [family.replace("_", " "), "correlated" if phi else "white", str(every)]


def print_runs(folder: Path) -> None:
    """The table of two real trainings, each with two thresholds, as Markdown.

    Args:
        folder: where `benchmarks/collapse.py` keeps its runs; they are trained where they are not there.
    """
    print(
        "| run | threshold | probes every | logged entropy | collapse at step | alarms after steps | rival's alarms |"
    )
    print("|" + "---|" * 7)
    for rate in (COLLAPSING, HEALTHY):
        run = load_or_train(
            folder, learning_rate=rate, steps=STEPS, seed=0, every=1, B_E=64, fraction=0.2, report_to="none"
        )
        for fraction in (0.2, 0.1):
            threshold = fraction * run.history[0]["H_orig_tok"]
            smooth = [float(np.median(run.entropy[max(0, k - 2) : k + 3])) for k in range(len(run.entropy))]
            collapse = next((k + 1 for k, H in enumerate(smooth) if threshold >= H), None)
            for every in (1, 5):
                for with_log in (False, True):
                    cells = [
                        f"GRPO, {rate:g}",
                        f"{100 * fraction:.0f} %: {threshold:.3f}",
                        str(every),
                        "yes" if with_log else "no",
                        str(collapse or "-"),
                        _steps(_real_alarms(run, threshold, every, with_log, collapse)),
                        _steps(_rival_alarms(run, threshold, every, collapse)),
                    ]
                    print("| " + " | ".join(cells) + " |", flush=True)


def _real_alarms(run: Run, threshold: float, every: int, with_log: bool, end: int | None) -> list[int]:
    """Steps after which the probe would have raised an alarm."""
    alarm, found = ThresholdAlarm(), []
    names = ("H_orig_tok", "H_orig_tok_se", "deltaH_true_tok", "deltaH_true_tok_se")
    probes = [EntropyReading(e["step"], *(e[name] for name in names)) for e in run.history]
    probes = [one for one in probes if (one.step - 1) % every == 0]
    for step in range(1, (end or len(run.entropy)) + 1):
        logs = (
            logged_readings(list(enumerate(run.entropy[:step], start=1))[-4 * HORIZON :]) if with_log else []
        )
        read = sorted([*(x for x in probes if x.step <= step), *logs], key=lambda one: (one.step, one.logged))
        if not with_log and (step - 1) % every:
            continue
        if alarm.update(forecast(read, threshold, WINDOW, MOMENTUM, horizon=HORIZON), step):
            found.append(step)
    return found


def _rival_alarms(run: Run, threshold: float, every: int, end: int | None) -> list[int]:
    """Steps after which the rival, which has the logged entropy alone, would have raised one."""
    level = np.array(run.entropy)[None, ::every]
    nothing = np.zeros_like(level)
    count = level.shape[1]
    readings = ReadingArrays(
        np.arange(count) * every,
        np.zeros(count, dtype=bool),
        np.ones(count, dtype=bool),
        level,
        *[nothing] * 3,
    )
    armed, calm, found = True, 0, []
    for n in range(8, count + 1):
        said = rival_projection(readings.part(slice(n - max(n // 2, 8), n)), np.array([threshold]))
        if end is not None and said.step >= end:
            break
        if armed and said.alarm[0]:
            armed, calm = False, 0
            found.append(said.step)
        calm = calm + 1 if said.calm[0] else 0
        armed = armed or calm >= CALM_READINGS
    return found


def _steps(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def _cell(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--series", type=int, default=1000, help="synthetic trainings of each family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes for synthetic trainings")
    parser.add_argument("--runs", default=None, help="real trainings instead, kept in this folder")
    options = parser.parse_args()
    if options.runs is None:
        print_synthetic(options.series, options.seed, options.workers)
    else:
        print_runs(Path(options.runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
