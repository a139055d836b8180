"""The history of a training made of formulas, for the tests of what shows it."""

from __future__ import annotations

import math
from typing import Any

from probe.estimators.estimate import NORMAL_975

THRESHOLD = 0.1
"""Entropy that counts as collapse, nats per token."""


def with_error(name: str, value: float, se: float) -> dict[str, float]:
    half = NORMAL_975 * se
    ends = {f"{name}_ci95_low": value - half, f"{name}_ci95_high": value + half}
    return {name: value, f"{name}_se": se, **ends}


def made_up_history(
    probes: int = 60, every: int = 2, rate: float = -0.02, alarm: int | None = 30
) -> list[dict[str, Any]]:
    """Entries of a watch on a policy whose entropy falls by `rate` of itself per step, from 0.5 nats per token.

    Args:
        probes: entries.
        every: steps between them.
        rate: relative change per step.
        alarm: the entry that has one; None for none.
    """
    entries = []
    for k in range(probes):
        step = 1 + k * every
        H, first = 0.5 * math.exp(rate * step), 0.5 * math.exp(rate)
        left = math.log(THRESHOLD / H) / rate if rate else math.inf
        change = H * rate
        entry: dict[str, Any] = {
            "step": step,
            "verdict": ("trustworthy", "caution", "unresolved")[k % 3],
            "verdict_code": k % 3,
            "verdict_reasons": [f"reason of probe {k}"],
            **with_error("H_orig_tok", H, 0.0123),
            **with_error("deltaH1_tok", change * 1.02, 0.001),
            **with_error("deltaH_true_tok", change, 0.001),
            **with_error("deltaH1_momentum_tok", change * 0.8, 0.0005),
            **with_error("deltaH1_gradient_tok", change * 0.22, 0.0005),
            **with_error("deltaH1_decay_tok", 0.0, 0.0),
            "deltaH1_positive_tok": change * 0.3,
            "deltaH1_negative_tok": -change * 0.1,
            **with_error("cumulative_H_tok", H - first, 0.014),
            **with_error("cumulative_deltaH1_tok", (H - first) * 1.02, 0.002 * k),
            **with_error("cumulative_deltaH_true_tok", H - first, 0.002 * k),
            **with_error("H_predicted_tok", first + (H - first) * 1.02, 0.01),
            **with_error("H_tracked_tok", H, 0.01),
            "collapse_entropy": THRESHOLD,
            "explosion_entropy": 1.0,
            "outlook": "",
        }
        if k > 2 and rate < 0:
            reached = H <= THRESHOLD
            entry |= {
                "steps_to_collapse": max(left, 0.0),
                "steps_to_collapse_low": max(left - 10, 0.0),
                "steps_to_collapse_high": math.inf if k % 4 == 0 else max(left + 10, 0.0),
                "collapse_chance": 1.0 if reached else min(1.0, 20 / max(left, 1.0)),
                "explosion_chance": 0.0,
                "outlook": "collapsed" if reached else f"collapse in about {left:.0f} steps",
            }
        if k == alarm:
            entry["alarms"] = [step]
        entries.append(entry)
    return entries
