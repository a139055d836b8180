"""What the passes over E and U cost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from probe.callbacks.base import ProbeCallback
from probe.phases.costs import goes_over

if TYPE_CHECKING:
    from probe.module import EntropyProbe
    from probe.runner import ProbeRunner

REST_OF_U = ("sample",)
"""Phases whose time outside of passes goes with U: rewards are computed."""
REST_OF_E = ("prediction", "ground_truth")
"""Phases whose time outside of passes goes with E: checks by forwards, errors over prompts."""
ONCE = ("demo_policy", "total")
"""Entries of `timing` that are no part of a run's own time."""


@dataclass(frozen=True)
class Pass:
    """One pass over E or U, sampling included.

    Attributes:
        what: its name, such as `score E`.
        phase: that it belongs to.
        seconds: that it took.
        responses: that it went over.
    """

    what: str
    phase: str
    seconds: float
    responses: int

    @property
    def is_of_update(self) -> bool:
        """Whether it went over U."""
        return goes_over(self.what, "U")


@dataclass(frozen=True)
class Cost:
    """Seconds of a run, by what they grow with.

    Attributes:
        passes_E: over all of E, sampling included; those over a part of it do not grow with it.
        passes_U: over U.
        E: seconds that grow with `B_E`.
        U: seconds that grow with `B_U`.
        fixed: seconds that do not: loading, the optimizer's step, checks on a few responses.
    """

    passes_E: int
    passes_U: int
    E: float
    U: float
    fixed: float

    def seconds(self, times_E: float, times_U: float) -> float:
        """Of a run whose batches are so many times as large.

        >>> Cost(7, 3, E=2.0, U=1.0, fixed=4.0).seconds(10, 1)
        25.0
        """
        return self.fixed + times_E * self.E + times_U * self.U


class PassClock(ProbeCallback):
    """Times every pass of a run.

    Attributes:
        passes: in their order.
    """

    def __init__(self) -> None:
        """Nothing has run yet."""
        self.passes: list[Pass] = []
        self._last = 0.0
        self._first: tuple[float, int] | None = None

    def _phase_starts(self, runner: ProbeRunner, module: EntropyProbe) -> None:
        """A pass that begins a phase begins now."""
        self._last = time.perf_counter()

    on_sample_start = on_entropy_gradient_start = on_update_start = _phase_starts
    on_prediction_start = on_ground_truth_start = _phase_starts

    def on_progress(self, runner: ProbeRunner, phase: str, done: int, total: int, what: str) -> None:
        """A microbatch is done; the last one ends the pass."""
        now = time.perf_counter()
        if self._first is None:
            self._first = now, done
        if done < total:
            return
        began, first = self._first
        # what ran before the first microbatch may be no part of this pass: its time is taken for that of the others
        seconds = now - self._last if first >= total else (now - began) * total / (total - first)
        self.passes.append(Pass(what, phase, min(seconds, now - self._last), total))
        self._last, self._first = now, None


def cost_of(passes: Sequence[Pass], timing: Mapping[str, float]) -> Cost:
    """What the time of a run grows with.

    Passes over a part of E take as many responses as the precision asks for that they are needed to: X as many as U has
    prompts for (`spread_responses`), the noise floor a fixed number.

    Args:
        passes: of the run.
        timing: its seconds per phase.

    >>> made = [Pass("sample E", "sample", 2.0, 64), Pass("sample U", "sample", 1.0, 16)]
    >>> cost_of(made, {"load": 4.0, "sample": 3.5})
    Cost(passes_E=1, passes_U=1, E=2.0, U=1.5, fixed=4.0)
    """
    over_U = [one for one in passes if one.is_of_update]
    size = max((one.responses for one in passes if not one.is_of_update), default=0)
    over_E = [one for one in passes if not one.is_of_update and one.responses == size]
    parts = [one for one in passes if not one.is_of_update and one.responses < size]
    E, U, fixed = (sum(one.seconds for one in over) for over in (over_E, over_U, ()))
    for one in parts:
        if one.what == "gradient on E":
            U += one.seconds
        else:
            fixed += one.seconds
    for phase, seconds in timing.items():
        rest = max(seconds - sum(one.seconds for one in passes if one.phase == phase), 0.0)
        if phase in REST_OF_E:
            E += rest
        elif phase in REST_OF_U:
            U += rest
        elif phase not in ONCE:
            fixed += rest
    return Cost(len(over_E), len(over_U), E, U, fixed)
