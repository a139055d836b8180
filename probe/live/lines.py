"""The lines that the drop-in probe prints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from probe.forecast.forecast import Forecast
from probe.live.names import STEPS
from probe.live.schedule import Schedule
from probe.report.numbers import with_error

IN_SIGHT, FEW_PROBES = 10, 50
"""Horizons within which a collapse is in sight; steps between probes from which on a hint says how to get more."""


def probe_line(entry: Mapping[str, Any]) -> str:
    """One probe in a line."""
    change = [_with_error(entry, name) for name in ("deltaH1_tok", "deltaH_true_tok")]
    parts = [
        f"step {entry['step']}: H {_with_error(entry, 'H_orig_tok')} nats/token",
        f"this step {change[0]} predicted, {change[1]} measured ({entry['verdict']})",
    ]
    if entry.get("outlook"):
        parts.append(entry["outlook"])
    return "; ".join(parts)


def outlook(ahead: Forecast | None, horizon: int) -> str:
    """What a forecast comes to, in words; empty where there is none.

    Args:
        ahead: the forecast.
        horizon: of the alarm, optimizer steps. Ten of them ahead nothing is in sight.
    """
    if ahead is None:
        return ""
    if ahead.threshold >= ahead.H:
        return "collapsed"
    if not ahead.expected or ahead.steps > IN_SIGHT * horizon:
        return "no collapse in sight"
    return f"collapse in {forecast_words(ahead.steps, ahead.low, ahead.high)}"


def forecast_words(steps: float, low: float, high: float) -> str:
    """A number of steps with its interval.

    >>> forecast_words(31.2, 21.9, 55.0), forecast_words(31.2, 21.9, math.inf)
    ('about 31 steps (95 %: 22 to 55)', 'about 31 steps (95 %: at least 22)')
    """
    interval = f"{low:.0f} to {high:.0f}" if math.isfinite(high) else f"at least {low:.0f}"
    return f"about {steps:.0f} steps (95 %: {interval})"


def cost_line(schedule: Schedule, B_E: int, length: float, timing: Mapping[str, float]) -> str:
    """The cost model in a line."""
    parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.2g}" for name, seconds in timing.items())
    line = f"a probe of {B_E} responses of {length:.0f} tokens takes {schedule.expected_cost:.2g} s ({parts})"
    if schedule.step_seconds is None or schedule.interval is None:
        return line
    line += f", a training step {schedule.step_seconds:.2g} s"
    every = "every step" if schedule.interval == 1 else f"every {schedule.interval} steps"
    share = f"{100 * (schedule.share_ahead or 0):.0f} % of the training time"
    if schedule.every is not None:
        return f"{line}: {every}, {share}"
    hint = " (set every=... for more)" if schedule.interval > FEW_PROBES else ""
    return f"{line}: one {every}, {share}, keeps the budget of {100 * schedule.budget:.3g} %{hint}"


def alarm_line(entry: Mapping[str, Any], threshold: float, horizon: int) -> str:
    """The warning, with its remedy."""
    H = entry["H_orig_tok"]
    if threshold >= H:
        what = f"the policy's entropy has collapsed: {H:.3g} nats/token, at or below {threshold:.3g}"
    else:
        what = (
            f"entropy collapse forecast: from {H:.3g} to {threshold:.3g} nats/token in "
            f"{forecast_words(*(entry[name] for name in STEPS))}, within the horizon of {horizon}"
        )
    share = entry.get("momentum_share_tok")
    inertia = (
        f" {100 * share:.0f} % of the change is momentum, so a lower rate acts with delay."
        if share is not None and share > 0.5
        else ""
    )
    return (
        f"{what}; lower the learning rate, raise the entropy or KL coefficient, or clip less from above "
        f"(epsilon_high).{inertia}"
    )


def _with_error(entry: Mapping[str, Any], name: str) -> str:
    value, se = entry.get(name), entry.get(f"{name}_se")
    return "not resolved" if value is None else with_error(value, se)
