"""The lines that the drop-in probe prints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from probe.digits import with_error
from probe.forecast.forecast import Forecast, calls_for_alarm
from probe.live.schedule import Schedule
from probe.report.summary import WORTH_SAYING

IN_SIGHT, FEW_PROBES = 10, 50
"""Horizons within which a collapse is in sight; steps between probes from which on a hint says how to get more."""
MEAN_INTERVAL = ("mean_deltaH_true_tok_ci95_low", "mean_deltaH_true_tok_ci95_high")
"""Ends of the interval of the mean change over the last probes."""
ROUNDING = 1.05
"""A share of time up to so many times the budget keeps it."""


@dataclass(frozen=True)
class Outlook:
    """What is forecast of both ends of the band; None where there are too few readings, or no such end.

    Attributes:
        collapse: of the lower end.
        explosion: of the upper one.
    """

    collapse: Forecast | None = None
    explosion: Forecast | None = None

    @property
    def in_words(self) -> str:
        """What it comes to; empty where nothing is forecast."""
        both = [one for one in (self.collapse, self.explosion) if one is not None]
        said = [words for one in both if (words := threshold_words(one))]
        if said:
            return ", ".join(said)
        if any(one.flattening for one in both):
            return "flattening"
        return "no collapse in sight" if both else ""


def probe_line(entry: Mapping[str, Any]) -> str:
    """One probe in a line."""
    change = [_with_error(entry, name) for name in ("deltaH1_tok", "deltaH_true_tok")]
    parts = [
        f"step {entry['step']}: H {_with_error(entry, 'H_orig_tok')} nats/token",
        f"this step {change[0]} predicted, {change[1]} measured ({entry['verdict']})",
    ]
    low, high = (entry.get(name) for name in MEAN_INTERVAL)
    if entry["verdict"] == "unresolved" and low is not None and high is not None and low * high > 0:
        parts.append(f"per step over the last probes {_with_error(entry, 'mean_deltaH_true_tok')} measured")
    if entry.get("outlook"):
        parts.append(entry["outlook"])
    return "; ".join(parts)


def threshold_words(ahead: Forecast) -> str:
    """What a forecast of one threshold comes to; empty where it is not in sight."""
    what = "explosion" if ahead.rising else "collapse"
    if ahead.reached:
        return "exploded" if ahead.rising else "collapsed"
    if ahead.steps <= IN_SIGHT * ahead.horizon:
        return f"{what} {forecast_words(ahead)}"
    if ahead.chance >= WORTH_SAYING:
        return f"{what} within {ahead.horizon:.0f} steps: {chance_words(ahead.chance)}"
    return ""


def chance_words(chance: float) -> str:
    """A chance in per cent; small ones are not known better than that they are small.

    >>> chance_words(0.31), chance_words(0.004)
    ('31 %', 'under 5 %')
    """
    return f"{100 * chance:.0f} %" if chance >= WORTH_SAYING else f"under {100 * WORTH_SAYING:.0f} %"


def forecast_words(ahead: Forecast) -> str:
    """The median number of steps, with its interval where that has an upper end, else with the chance.

    Where the chance calls for an alarm and the median is beyond the horizon, the chance is what there is to say.

    >>> import dataclasses
    >>> far = Forecast(31.2, 21.9, math.inf, -0.1, 0.01, 1.0, 0.1, 9, horizon=50, chance=0.62, ever=0.9)
    >>> forecast_words(far), forecast_words(dataclasses.replace(far, high=55.0))
    ('in about 31 steps (within 50: 62 %)', 'in about 31 steps (95 %: 22 to 55)')
    >>> forecast_words(dataclasses.replace(far, steps=418.0, chance=0.31))
    'within 50 steps with a chance of 31 %'
    """
    steps = f"{ahead.steps:.0f}"
    about = f"in about {steps} step{'' if steps == '1' else 's'}"
    if math.isfinite(ahead.high):
        return f"{about} (95 %: {ahead.low:.0f} to {ahead.high:.0f})"
    if ahead.steps > ahead.horizon and calls_for_alarm(ahead.reached, ahead.chance):
        return f"within {ahead.horizon:.0f} steps with a chance of {chance_words(ahead.chance)}"
    return f"{about} (within {ahead.horizon:.0f}: {chance_words(ahead.chance)})"


def cost_line(schedule: Schedule, B_E: int, length: float, timing: Mapping[str, float]) -> str:
    """The cost model in a line."""
    parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.2g}" for name, seconds in timing.items())
    what = f"a probe of {B_E} responses of {length:.3g} tokens on average"
    line = f"{what} takes {schedule.expected_cost:.2g} s ({parts})"
    if schedule.step_seconds is None or schedule.interval is None:
        return line
    line += f", a training step {schedule.step_seconds:.2g} s"
    every = "every step" if schedule.interval == 1 else f"every {schedule.interval} steps"
    ahead = schedule.share_ahead or 0.0
    share = f"{100 * ahead:.0f} % of the training time"
    if schedule.every is not None:
        return f"{line}: {every}, {share}"
    one = "one" if schedule.responses == B_E else f"one of {schedule.responses} responses"
    if ahead > ROUNDING * schedule.budget:
        kept = (
            f"above the budget of {100 * schedule.budget:.3g} %, since at_least_every is {schedule.interval}"
        )
        return f"{line}: {one} {every}, {share}, {kept}"
    hint = " (set every=... for more)" if schedule.interval > FEW_PROBES else ""
    return f"{line}: {one} {every}, {share}, keeps the budget of {100 * schedule.budget:.3g} %{hint}"


def alarm_line(ahead: Forecast, momentum_share: float | None) -> str:
    """The warning, with the step that the number of steps left counts from, and its remedy.

    Args:
        ahead: what is forecast.
        momentum_share: of momentum in the last change, where known.
    """
    name, ended, end = (
        ("explosion", "exploded", "above") if ahead.rising else ("collapse", "collapsed", "below")
    )
    remedy = (
        "lower the learning rate or the entropy coefficient, or raise the KL coefficient"
        if ahead.rising
        else "lower the learning rate, raise the entropy or KL coefficient, or clip less from above (epsilon_high)"
    )
    if ahead.reached:
        what = (
            f"the policy's entropy has {ended} after step {ahead.step}: {ahead.H:.3g} nats/token, at or {end} "
            f"{ahead.threshold:.3g}"
        )
    else:
        what = (
            f"entropy {name} forecast after step {ahead.step}: from {ahead.H:.3g} to {ahead.threshold:.3g} nats/token "
            f"{forecast_words(ahead)}"
        )
    inertia = (
        f" {100 * momentum_share:.0f} % of the change is momentum, so a lower rate acts with delay."
        if momentum_share is not None and momentum_share > 0.5
        else ""
    )
    return f"{what}; {remedy}.{inertia}"


def _with_error(entry: Mapping[str, Any], name: str) -> str:
    value, se = entry.get(name), entry.get(f"{name}_se")
    return "not resolved" if value is None else with_error(value, se)
