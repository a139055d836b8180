"""Interventions on the update."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from probe.config.numbers import check_numbers
from probe.errors.exceptions import require


@dataclass(frozen=True)
class WhatIfConfig:
    """Interventions compared on the same E and U (`entropy-probe whatif` switches it on)."""

    enabled: bool = False
    """Compare interventions; needs the attribution."""
    interventions: list[str] = field(default_factory=list)
    """Such as `clip_cov`, `stare(weight=1.05)` or `drop(tokens_of=wrong)+entropy_bonus(coef=0.01)`; empty for all of
    them with their published defaults."""
    steps: bool = True
    """Let the optimizer take the step of every intervention on a snapshot, a backward of U for each: its denominator
    and gradient clipping are then those of that step. Without, effects are sums of contributions alone."""
    exact: list[str] = field(default_factory=list)
    """Those whose step is measured too, or `all`; each costs a forward of E."""
    target_deltaH: float | None = None
    """Solve for the setting at which the predicted change is so many nats, and take its step."""
    target_estimand: Literal["token", "sequence"] = "token"
    """Whether that is in nats per token or per response."""
    solve_for: list[Literal["learning_rate", "entropy_bonus"]] = field(
        default_factory=lambda: ["learning_rate", "entropy_bonus"]
    )
    """The factor of the learning rate, the coefficient of an entropy bonus, or both."""

    def __post_init__(self) -> None:
        """Check what was given."""
        check_numbers(self, "whatif.")
        require(
            self.target_deltaH is None or self.target_deltaH != 0,
            "whatif.target_deltaH",
            "a number other than 0, or null",
            self.target_deltaH,
        )
