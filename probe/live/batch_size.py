"""How many responses the next probe draws, where a standard error is asked for instead of a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from statistics import median
from typing import Any

from probe.live.history import History
from probe.live.say import say
from probe.live.schedule import Schedule
from probe.live.settings import SMALLEST_E, WatchSettings
from probe.verdict.sentences import round_up

RECENT = 5
"""Probes whose median is taken for the spread of a response."""
LEAST, MOST = SMALLEST_E, 16
"""Fewest responses of a probe; and most, in times the configured `B_E`."""
NOTABLE = 1.5
"""Factor by which `B_E` changes before it is worth a line."""


def next_size(settings: WatchSettings, entries: Sequence[Mapping[str, Any]]) -> int:
    """`B_E` of the next probe: for a standard error of about `target_se` of deltaH_true_tok.

    Standard errors shrink like `1 / sqrt(B_E)`, so `B_E * (se / target_se)^2`, of which the median over the last
    `RECENT` probes is taken, rounded up to two digits and kept between `LEAST` and `MOST * B_E`. Without `target_se`,
    and before the first probe that moved, it is the configured `B_E`.

    Args:
        settings: of the watch.
        entries: of its history.

    >>> next_size(WatchSettings(target_se=0.001), [{"B_E": 64, "deltaH_true_tok_se": 0.002}])
    260
    >>> next_size(WatchSettings(), [{"B_E": 64, "deltaH_true_tok_se": 0.002}])
    64
    """
    if settings.target_se is None:
        return settings.B_E
    target = settings.target_se
    sizes = (size for entry in reversed(entries) if (size := _size_of(entry, target)) is not None)
    wanted = list(islice(sizes, RECENT))
    if not wanted:
        return settings.B_E
    most = MOST * settings.B_E
    return min(max(round_up(min(max(median(wanted), 1.0), most)), LEAST), most)


def _size_of(entry: Mapping[str, Any], target: float) -> float | None:
    """What one probe says of the size; None where its step was 0, or its error is not known."""
    size, se = entry.get("B_E"), entry.get("deltaH_true_tok_se")
    if size is None or se is None or not 0 < se < math.inf:
        return None
    return float(size * (se / target) ** 2)


def size_line(settings: WatchSettings, before: int, now: int) -> str | None:
    """What is said of another size; None where it is about the same.

    Args:
        settings: of the watch.
        before: the size that was said last.
        now: the next one.

    >>> print(size_line(WatchSettings(target_se=0.001), 64, 260))
    B_E 260 from here on (64 before), for a standard error of 0.001 nats per token (target_se)
    """
    if settings.target_se is None or 1 / NOTABLE < now / before < NOTABLE:
        return None
    line = f"B_E {now} from here on ({before} before), for a standard error of {settings.target_se:g} nats per token"
    return f"{line} (target_se){', the most there is' if now == MOST * settings.B_E else ''}"


class ProbeSizes:
    """How many responses the probes of a training draw."""

    def __init__(self, settings: WatchSettings, schedule: Schedule, history: History) -> None:
        """Args: `settings`, the `schedule` whose budget bounds the size, the `history` that errors are read from."""
        self._settings, self._schedule, self._history = settings, schedule, history
        self._said = settings.B_E

    @property
    def wanted(self) -> int:
        """Responses of the next probe: for a standard error where one is asked for, else for the budget."""
        if self._settings.target_se is None:
            return self._schedule.responses
        return next_size(self._settings, self._history.run.history)

    def chosen(self) -> int:
        """Those of the probe that begins; another size for the sake of `target_se` is said."""
        size = self.wanted
        line = size_line(self._settings, self._said, size)
        if line is not None:
            self._said = size
            say(line)
        return size
