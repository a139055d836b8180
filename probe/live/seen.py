"""What a watch has seen so far, and what is forecast from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from probe.forecast.curves import Anchor, CumulativeSum
from probe.forecast.forecast import forecast_of, trend_of
from probe.forecast.mean_change import ProbedChange
from probe.forecast.readings import EntropyReading, above_zero, logged_readings
from probe.live.lines import Outlook
from probe.live.pooling import ErrorMemory
from probe.live.settings import WatchSettings


@dataclass
class Run:
    """What a watch has seen so far; plain values, so that it can go into a checkpoint.

    Attributes:
        step: optimizer steps.
        history: one entry per probe.
        readings: what the forecast is made from.
        threshold: entropy that counts as collapse, nats per token; None before the first probe.
        ceiling: entropy that counts as explosion, nats per token; None likewise, and where none does.
        logged: optimizer step and entropy, nats per token, that the training has logged itself.
        sums: cumulative sums by the name of what is summed up.
        anchors: where the curves start, by the same names.
        changes: of the last probes, by the same names.
        errors: how large those of the last probes were.
    """

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    readings: list[EntropyReading] = field(default_factory=list)
    threshold: float | None = None
    ceiling: float | None = None
    logged: list[tuple[int, float]] = field(default_factory=list)
    sums: dict[str, CumulativeSum] = field(default_factory=dict)
    anchors: dict[str, Anchor] = field(default_factory=dict)
    changes: dict[str, list[ProbedChange]] = field(default_factory=dict)
    errors: ErrorMemory = field(default_factory=ErrorMemory)


def look_ahead(run: Run, settings: WatchSettings, momentum: float, most: float = math.inf) -> Outlook:
    """What is forecast from all that was read so far; its steps are counted from the last optimizer step taken.

    Args:
        run: what was seen.
        settings: of the forecast.
        momentum: what correlates the updates of neighbouring steps, in [0, 1).
        most: the largest entropy that there can be, the logarithm of the vocabulary: beyond it nothing is forecast.
    """
    if run.threshold is None or not run.readings:
        return Outlook()
    logged = logged_readings(run.logged)
    first = run.readings[0].step
    readings = sorted(
        [*run.readings, *(one for one in logged if one.step >= first)],
        key=lambda one: (one.step, one.logged),
    )
    # an older reading may be the last one: entropies are logged late, and a step of exactly 0 leaves none
    found = trend_of(readings, settings.window, momentum, now=max(run.step, readings[-1].step))
    if found is None:
        return Outlook()
    up = None
    if run.ceiling is not None and run.ceiling < most:
        up = forecast_of(*found, run.ceiling, settings.horizon, rising=True)
    return Outlook(forecast_of(*found, run.threshold, settings.horizon, rising=False), up)


def settle_band(run: Run, settings: WatchSettings) -> None:
    """The band of an earlier training, as far as the settings do not say another one."""
    if run.threshold is None or not run.history:
        return
    low, high = band_of(settings, above_zero(run.history[0]["H_orig_tok"]))
    if settings.entropy_band is not None or settings.collapse_entropy is not None:
        run.threshold = low
    if settings.entropy_band is not None or high is None or run.ceiling is None:
        run.ceiling = high


def band_of(settings: WatchSettings, first: float) -> tuple[float, float | None]:
    """The entropies that count as collapse and as explosion, nats per token; `first` is that of the first probe."""
    if settings.entropy_band is not None:
        low, high = settings.entropy_band
        return low, high
    given, factor = settings.collapse_entropy, settings.explosion_factor
    low = settings.collapse_fraction * first if given is None else given
    return low, None if factor is None else factor * first
