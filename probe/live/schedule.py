"""What probing costs, and how often it can be afforded."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

RECENT = 20
"""Training steps whose median is taken for the time of one."""


@dataclass
class Schedule:
    """Which steps are probed, and what that costs.

    With `every` fixed, steps 1, 1 + every, 1 + 2 every, ... are probed. Without, a step is probed when the probes so
    far and one more are at most `budget` times the training time so far, so that the share never exceeds the budget
    but for the first probe, which runs on the first step.

    Attributes:
        every: steps from probe to probe; None chooses by `budget`.
        budget: largest share of probes in the training time, the probes' own left out.
        probe_seconds: time spent in probes, and in attaching.
        train_seconds: time of training without them, since the first step ended.
        probes: their number.
    """

    every: int | None
    budget: float
    probe_seconds: float = 0.0
    train_seconds: float = 0.0
    probes: int = 0
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _cost: deque[float] = field(default_factory=lambda: deque(maxlen=3))

    def due(self, step: int, growth: float = 1.0) -> bool:
        """Whether a step, counted from 1, is probed; `growth` is what the next probe costs in times the last ones.

        >>> [step for step in range(1, 12) if Schedule(every=5, budget=0.05).due(step)]
        [1, 6, 11]
        """
        if self.every is not None:
            return (step - 1) % self.every == 0
        if self.probes == 0:
            return True
        return self.probe_seconds + growth * self.expected_cost <= self.budget * self.train_seconds

    def add_step(self, seconds: float) -> None:
        """Note the time of one training step, probes left out."""
        self._steps.append(seconds)
        self.train_seconds += seconds

    def add_probe(self, seconds: float) -> None:
        """Note the time of one probe."""
        self._cost.append(seconds)
        self.probe_seconds += seconds
        self.probes += 1

    @property
    def expected_cost(self) -> float:
        """Seconds that the next probe will take: the median of the last three."""
        return median(self._cost) if self._cost else 0.0

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a training step without probes, the median of the last 20; None before the second step."""
        return median(self._steps) if self._steps else None

    @property
    def interval(self) -> int | None:
        """Steps from probe to probe: `every`, or what the budget comes to now; None while that is not known."""
        if self.every is not None:
            return self.every
        if not self._steps or not self._cost:
            return None
        return max(1, math.ceil(self.expected_cost / (self.budget * max(self.step_seconds or 0.0, 1e-9))))

    @property
    def share(self) -> float | None:
        """Time in probes over training time without them so far; None before the second step."""
        return self.probe_seconds / self.train_seconds if self.train_seconds > 0 else None

    @property
    def share_ahead(self) -> float | None:
        """The share that the present interval leads to."""
        if self.interval is None or not self.step_seconds:
            return None
        return self.expected_cost / (self.interval * self.step_seconds)
