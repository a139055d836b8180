"""What probing costs, and how often it can be afforded."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

RECENT = 20
"""Training steps whose median is taken for the time of one."""
WANTED = 10
"""Steps from probe to probe for which E is made smaller, where the budget does not allow as many at full size."""
FIXED = 0.25
"""Share of a probe's time that is taken not to depend on the number of its responses."""


@dataclass
class Schedule:
    """Which steps are probed, with how many responses, and what that costs.

    With `every` fixed, steps 1, 1 + every, 1 + 2 every, ... are probed. Without, a step is probed

    - when the probes so far and one more are at most `budget` times the training time so far. What happens only once
      does not count: attaching, and what the first probe took more than the second (compilation, first calls);
    - in any case `at_least_every` steps after the last one, the second one at most ten steps after the first.

    Where the budget comes to less than one probe in ten steps, E is halved, down to `smallest`, before probes become
    rarer: a probe's time is taken as a quarter that is fixed and a rest in proportion to the responses.

    Attributes:
        every: steps from probe to probe; None chooses by `budget`.
        budget: largest share of probes in the training time, the probes' own left out.
        B_E: responses of a probe at full size.
        smallest: fewest responses of a probe; `B_E` where its size is to stay.
        at_least_every: with `every: None`, the largest number of steps from probe to probe; None sets no bound.
        probe_seconds: time spent in probes, and in attaching.
        attach_seconds: the latter alone.
        train_seconds: time of training without them, since the first step ended.
        probes: their number.
    """

    every: int | None
    budget: float
    B_E: int = 64
    smallest: int = 64
    at_least_every: int | None = None
    probe_seconds: float = 0.0
    attach_seconds: float = 0.0
    train_seconds: float = 0.0
    probes: int = 0
    _last: int = 0
    _first: float = 0.0
    _once: float = 0.0
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _cost: deque[float] = field(default_factory=lambda: deque(maxlen=3))

    def due(self, step: int, responses: int | None = None) -> bool:
        """Whether a step, counted from 1, is probed, with so many responses; by default with `self.responses`.

        >>> [step for step in range(1, 12) if Schedule(every=5, budget=0.05).due(step)]
        [1, 6, 11]
        """
        if self.every is not None:
            return (step - 1) % self.every == 0
        if self.probes == 0:
            return True
        if self.at_least_every is not None:
            # what the first one has cost says little of the second, which is soon made to know
            bound = min(self.at_least_every, WANTED) if self.probes == 1 else self.at_least_every
            if step - self._last >= bound:
                return True
        charged = self.probe_seconds - self.attach_seconds - self._once
        cost = self._full_cost * self._share_of(responses or self.responses)
        return charged + cost <= self.budget * self.train_seconds

    def add_step(self, seconds: float) -> None:
        """Note the time of one training step, probes left out."""
        self._steps.append(seconds)
        self.train_seconds += seconds

    def add_attaching(self, seconds: float) -> None:
        """Note the time that attaching took."""
        self.attach_seconds = seconds
        self.probe_seconds += seconds

    def add_probe(self, seconds: float, step: int = 0, responses: int | None = None) -> None:
        """Note the time of one probe.

        Args:
            seconds: that it took.
            step: that was probed, from 1.
            responses: in its E; `B_E` by default.
        """
        share = self._share_of(responses or self.B_E)
        if self.probes == 0:
            self._first = seconds / share
        else:
            if self.probes == 1:
                self._once = max(self._first - seconds / share, 0.0)
            self._cost.append(seconds / share)
        self.probe_seconds += seconds
        self.probes += 1
        self._last = step

    @property
    def responses(self) -> int:
        """Responses of the next probe."""
        size = self.B_E
        if self.every is None and self._steps and self.probes:
            affordable = self.budget * WANTED * (self.step_seconds or 0.0)
            while size // 2 >= self.smallest and self._full_cost * self._share_of(size) > affordable:
                size //= 2
        return size

    @property
    def expected_cost(self) -> float:
        """Seconds that the next probe will take, by the median of the last three; the first one counts while alone."""
        return self._full_cost * self._share_of(self.responses)

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a training step without probes, the median of the last 20; None before the second step."""
        return median(self._steps) if self._steps else None

    @property
    def interval(self) -> int | None:
        """Steps from probe to probe: `every`, or what the budget comes to now; None while that is not known."""
        if self.every is not None:
            return self.every
        if not self._steps or not self.probes:
            return None
        by_budget = max(
            1, math.ceil(self.expected_cost / (self.budget * max(self.step_seconds or 0.0, 1e-9)))
        )
        return by_budget if self.at_least_every is None else min(by_budget, self.at_least_every)

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

    @property
    def _full_cost(self) -> float:
        """Seconds of a probe of `B_E` responses."""
        return median(self._cost) if self._cost else self._first

    def _share_of(self, responses: int) -> float:
        """What a probe of so many responses costs, as a share of one of `B_E`."""
        return FIXED + (1 - FIXED) * responses / self.B_E
