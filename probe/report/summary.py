"""What a training did to the policy's entropy, seen from its end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from probe.digits import with_error
from probe.verdict.words import WORDS

WORTH_SAYING = 0.05
"""Chance of a collapse or explosion from which on it is said."""
WORST = 3
"""Steps that a summary names."""
LEAST_PROBES = 2
"""Probes from which on there is something to sum up."""


@dataclass(frozen=True)
class Collapse:
    """When the entropy was first found at its threshold, by what all readings said then.

    Attributes:
        by: the step of the probe that found it there: it was at the threshold after this step.
        above: the step of the probe before, which had not found it there yet; None where there was none.
    """

    by: int
    above: int | None

    @property
    def words(self) -> str:
        """The steps between which it came."""
        if self.above is None or self.above + 1 >= self.by:
            return f"at step {self.by}"
        return f"between steps {self.above} and {self.by}"


def alarms_of(history: Sequence[Mapping[str, Any]]) -> list[int]:
    """The steps after which alarms were raised."""
    return [step for entry in history for step in entry.get("alarms", ())]


def collapse_of(history: Sequence[Mapping[str, Any]]) -> Collapse | None:
    """When a training's entropy has collapsed; None where no probe has found it at the threshold.

    It is the definition of alarm and outlook: not a single reading, which scatters, but the forecast's level after the
    step, of which no steps are left to the threshold.

    Args:
        history: entries of a watch.
    """
    above = None
    for entry in history:
        if entry.get("steps_to_collapse") == 0:
            return Collapse(entry["step"], above)
        above = entry["step"]
    return None


@dataclass(frozen=True)
class Summary:
    """A training in a few numbers; entropies in nats per token.

    Attributes:
        steps: optimizer steps seen.
        probes: steps that were probed.
        H_first: entropy at the first probe, with its standard error.
        H_last: entropy at the last probe, likewise.
        last_step: step of the last probe.
        change: `H_last` minus `H_first`, likewise: of the levels, which are independent of the changes.
        predicted: sum of deltaH1 over all steps from the first probe to the last, likewise.
        measured: the same of deltaH_true.
        worst: step and measured change of the probed updates with the largest resolved falls, at most three.
        rises: the same of the largest resolved rises.
        alarms: steps after which an alarm was raised.
        verdicts: number of probes by the word of their verdict.
        cost_share: time in probes over training time without them; None where it was not timed.
        outlook: the last forecast, in words.
    """

    steps: int
    probes: int
    H_first: tuple[float, float]
    H_last: tuple[float, float]
    last_step: int
    change: tuple[float, float]
    predicted: tuple[float, float]
    measured: tuple[float, float]
    worst: tuple[tuple[int, float], ...]
    rises: tuple[tuple[int, float], ...]
    alarms: tuple[int, ...]
    verdicts: Mapping[str, int]
    cost_share: float | None
    outlook: str

    def as_mapping(self) -> dict[str, Any]:
        """Its attributes by their names."""
        return asdict(self)

    def __str__(self) -> str:
        relative = 100 * (self.H_last[0] / self.H_first[0] - 1) if self.H_first[0] > 0 else math.nan
        lines = [
            f"{self.probes} of {self.steps} steps probed; entropy in nats per token",
            f"  first probe       {with_error(*self.H_first)}",
            f"  last probe        {with_error(*self.H_last)} ({relative:+.0f} %), step {self.last_step}",
            f"  change of levels  {with_error(*self.change)}",
            f"  predicted         {with_error(*self.predicted)}",
            f"  measured          {with_error(*self.measured)}",
            f"  largest falls     {_updates(self.worst)}",
        ]
        if self.rises:
            lines.append(f"  largest rises     {_updates(self.rises)}")
        lines.append(f"  alarms            {', '.join(f'step {step}' for step in self.alarms) or 'none'}")
        lines.append(
            f"  verdicts          {', '.join(f'{count} {word}' for word, count in self.verdicts.items())}"
        )
        if self.outlook:
            past = f" (as of step {self.last_step})" if self.last_step < self.steps else ""
            lines.append(f"  outlook           {self.outlook}{past}")
        if self.cost_share is not None:
            lines.append(
                f"  cost              {100 * self.cost_share:.1f} % of the training time, first probes included"
            )
        return "\n".join(lines)


def summary_of(history: Sequence[Mapping[str, Any]], steps: int, cost_share: float | None) -> Summary | None:
    """What a history comes to; None with fewer than two probes.

    Args:
        history: entries of a watch, in the order of their steps.
        steps: optimizer steps seen.
        cost_share: time in probes over training time without them.
    """
    if len(history) < LEAST_PROBES:
        return None
    first, last = history[0], history[-1]
    changes = [
        (entry["step"], entry["deltaH_true_tok"])
        for entry in history
        if is_resolved(entry, "deltaH_true_tok")
    ]
    falls = sorted((one for one in changes if one[1] < 0), key=lambda one: one[1])
    rises = sorted((one for one in changes if one[1] > 0), key=lambda one: -one[1])
    counted = Counter(entry["verdict"] for entry in history if "verdict" in entry)
    return Summary(
        steps=steps,
        probes=len(history),
        H_first=_pair(first, "H_orig_tok"),
        H_last=_pair(last, "H_orig_tok"),
        last_step=last["step"],
        change=_pair(last, "cumulative_H_tok"),
        predicted=_pair(last, "cumulative_deltaH1_tok"),
        measured=_pair(last, "cumulative_deltaH_true_tok"),
        worst=tuple(falls[:WORST]),
        rises=tuple(rises[:WORST]),
        alarms=tuple(alarms_of(history)),
        verdicts={word: counted[word] for word in WORDS if counted[word]},
        cost_share=cost_share,
        outlook=last.get("outlook", ""),
    )


def _pair(entry: Mapping[str, Any], name: str) -> tuple[float, float]:
    """A number of an entry with its standard error; not a number where an older log lacks it."""
    return entry.get(name, math.nan), entry.get(f"{name}_se", math.nan)


def is_resolved(entry: Mapping[str, Any], name: str) -> bool:
    """Whether a change of an entry can be told from 0, by weights that can be believed."""
    low, high = entry.get(f"{name}_ci95_low"), entry.get(f"{name}_ci95_high")
    if entry.get(name) is None:  # below the noise floor the value is null, and its interval is not
        return False
    if low is None or high is None or entry.get("verdict") == "invalid":
        return False
    return bool(low * high > 0)


def _updates(changes: Sequence[tuple[int, float]]) -> str:
    return ", ".join(f"step {step} ({change:+.2g})" for step, change in changes) or "none resolved"
