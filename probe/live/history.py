"""What a watch has seen: one entry per probe, cumulative sums, and the readings that the forecast is made from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from probe.errors.exceptions import ConfigError
from probe.estimand import ESTIMANDS, SEQUENCE, TOKEN, Estimand
from probe.estimators.estimate import NORMAL_975
from probe.estimators.pooled_error import ErrorSize
from probe.forecast.curves import Anchor, CumulativeSum, level_change
from probe.forecast.mean_change import ProbedChange, mean_change
from probe.forecast.readings import (
    WINDOW_HORIZONS,
    EntropyReading,
    above_zero,
    recent_readings,
)
from probe.live.alarm import AlarmStates, ThresholdAlarm
from probe.live.lines import Outlook
from probe.live.names import ALARMS, STEPS, flat_values
from probe.live.outcome import Outcome
from probe.live.pooling import ErrorMemory
from probe.live.seen import Run, band_of, look_ahead, settle_band
from probe.live.settings import WatchSettings
from probe.results.quantity import Part
from probe.text import error_text
from probe.verdict.words import WORDS

STATE_FORMAT = "entropy-probe/watch/1"
KEPT_ENTRIES = 20
"""Entries of the history, beside the first one, that a state holds."""
READING = ("H_orig_tok", "H_orig_tok_se", "deltaH_true_tok", "deltaH_true_tok_se")
"""Names of what the forecast takes from a probe."""
SUMMED = {"deltaH1": "H_predicted", "deltaH_true": "H_tracked"}
"""What is summed up over the steps, and the level that the sum leads to."""


class History:
    """Takes in one probe after the other, and looks ahead.

    Attributes:
        run: what was seen so far.
    """

    def __init__(self, settings: WatchSettings, first_step: int = 0, most: float = math.inf) -> None:
        """Nothing is seen yet.

        Args:
            settings: of the forecast.
            first_step: optimizer steps taken before.
            most: the largest entropy that the policy can have, nats per token.

        Raises:
            ConfigError: `first_step` is no integer of at least 0.
        """
        check_first_step(first_step)
        self.run = Run(step=first_step)
        self._settings, self._most = settings, most

    def add(self, outcome: Outcome, momentum: float) -> tuple[dict[str, Any], Outlook]:
        """Take in what this step did.

        Args:
            outcome: of the probe.
            momentum: what correlates the updates of neighbouring steps, in [0, 1).

        Returns:
            The entry, which is in the history now, and what is forecast.
        """
        known = self.run.errors.pooled(outcome)
        entry = {"step": self.run.step, **flat_values(known.values), **self._cumulative(known, momentum)}
        self._read(known)
        ahead = self.look_ahead(momentum)
        down = ahead.collapse
        steps = (None, None, None) if down is None else (down.steps, down.low, down.high)
        entry |= {
            "collapse_entropy": self.run.threshold,
            **({} if self.run.ceiling is None else {"explosion_entropy": self.run.ceiling}),
            **dict(zip(STEPS, steps, strict=True)),
            "collapse_chance": None if down is None else down.chance,
            "explosion_chance": self._explosion_chance(ahead),
            "entropy_rate": None if down is None else down.rate,
            "outlook": ahead.in_words,
        }
        self.run.history.append(entry)
        return entry, ahead

    def _explosion_chance(self, ahead: Outlook) -> float | None:
        """See `explosion_chance`: 0 where no policy over this vocabulary has such an entropy."""
        if ahead.explosion is not None:
            return ahead.explosion.chance
        beyond = self.run.ceiling is not None and self.run.ceiling >= self._most
        return 0.0 if beyond and ahead.collapse is not None else None

    def note_logged(self, step: int, H: float) -> bool:
        """Take in an entropy that the training has logged itself.

        Args:
            step: the optimizer step before which the policy had it, from 1.
            H: nats per token.

        Returns:
            Whether it can be used: it is positive and finite.
        """
        if not (math.isfinite(H) and H > 0):
            return False
        oldest = max(step, self.run.step) - WINDOW_HORIZONS * self._settings.horizon
        self.run.logged = sorted(one for one in [*self.run.logged, (step, H)] if one[0] >= oldest)
        return True

    def look_ahead(self, momentum: float) -> Outlook:
        """What is forecast from all that was read so far; `momentum` correlates neighbouring steps."""
        return look_ahead(self.run, self._settings, momentum, self._most)

    def adopt(self, run: Run) -> None:
        """Go on from what another watch has seen; what the settings say of the band goes before what it had."""
        self.run = run
        settle_band(self.run, self._settings)

    def replay(self, entries: Iterable[Mapping[str, Any]], momentum: float) -> None:
        """Go on from what an earlier training has logged; see `Watch.replay`."""
        last = None
        for given in entries:
            entry = dict(given)
            if any(name in entry for name in ALARMS.values()) and "H_orig_tok" not in entry:
                if self.run.history:  # of the last probe before it
                    self.run.history[-1].setdefault("alarms", []).append(entry["step"])
                continue
            if last is not None and entry["step"] <= last:
                raise ConfigError(f"entries: expected increasing steps, found {entry['step']} after {last}")
            last = entry["step"]
            self.run.errors.replay(entry)
            if "verdict_code" in entry:
                entry.setdefault("verdict", WORDS[int(entry["verdict_code"])])
            for quantity, estimand in itertools.product(SUMMED, ESTIMANDS):
                change, se, df = (entry.get(estimand.key(quantity, part)) for part in ("", "_se", "_df"))
                H, H_se = (entry.get(estimand.key("H_orig", part)) for part in ("", "_se"))
                if change == 0 and se is None:
                    se = 0.0  # a step of exactly 0 has no error
                if change is not None and se is not None and math.isfinite(se) and H is not None:
                    # an older log may lack the error of a level, and degrees of freedom
                    probed = ProbedChange(entry["step"], change, se, df or math.inf)
                    self._add_change(quantity, estimand, probed, (H, H_se or 0.0), momentum)
            if entry.get("collapse_entropy") is not None:
                self.run.threshold = entry["collapse_entropy"]
            if entry.get("explosion_entropy") is not None:
                self.run.ceiling = entry["explosion_entropy"]
            needed = [entry[name] for name in READING if entry.get(name) is not None]
            if len(needed) == len(READING):
                believed = 4 if entry.get("verdict") != "invalid" else 2
                level, *others = needed[:believed]
                self._add_reading(EntropyReading(entry["step"], above_zero(level), *others))
            self.run.history.append(entry)
        self.run.step = max(self.run.step, last or 0)
        settle_band(self.run, self._settings)

    def _cumulative(self, outcome: Outcome, momentum: float) -> dict[str, float]:
        """Predicted and measured change since the first probe, and the change of the level, nats."""
        values: dict[str, float] = {}
        for estimand in (SEQUENCE, TOKEN):
            level = outcome.level(estimand)
            for quantity in SUMMED:
                probed = ProbedChange(self.run.step, *outcome.change(quantity, estimand))
                values |= self._add_change(quantity, estimand, probed, level, momentum)
            since_first = level_change(*level, self._first_level(estimand))
            values |= _with_error(estimand, "cumulative_H", *since_first)
        return values

    def _add_change(
        self,
        quantity: str,
        estimand: Estimand,
        probed: ProbedChange,
        level: tuple[float, float],
        momentum: float,
    ) -> dict[str, Any]:
        """Take one probed change into its sum, its curve and its mean.

        Args:
            quantity: what has changed.
            estimand: of it.
            probed: the change.
            level: entropy before the step with its error, nats.
            momentum: what correlates neighbouring steps.

        Returns:
            Sum, curve and mean by their names.
        """
        run, name = self.run, estimand.key(quantity)
        total, se = run.sums.setdefault(name, CumulativeSum()).advance(
            probed.step, probed.value, probed.se, momentum
        )
        curve = run.anchors.setdefault(name, Anchor()).take(*level, total, se)
        values: dict[str, Any] = {
            **_with_error(estimand, f"cumulative_{quantity}", total, se),
            **_with_error(estimand, SUMMED[quantity], *curve),
        }
        last = [*run.changes.get(name, []), probed][-self._settings.average_over :]
        run.changes[name] = last
        mean = mean_change(last, momentum)
        if mean is not None:
            for ending, number in (("", mean.value), ("_se", mean.se), ("_df", mean.df)):
                values[estimand.key(f"mean_{quantity}", ending)] = number
            interval = estimand.key(f"mean_{quantity}", "_ci95")
            values |= Part("_ci95", "", interval=True).flat(interval, mean.ci95)
        return values

    def _first_level(self, estimand: Estimand) -> tuple[float, float] | None:
        """Entropy at the first probe with its error, nats; None before it. An older log may lack the error."""
        if not self.run.history:
            return None
        first = self.run.history[0]
        return first[estimand.key("H_orig")], first.get(estimand.key("H_orig", "_se"), 0.0)

    def _read(self, outcome: Outcome) -> None:
        """Take in what a probe says for the forecast: of a change that is invalid, the level alone."""
        H, H_se = outcome.level(TOKEN)
        level, change = above_zero(H), outcome.changes.measurement["deltaH_true"].token
        if self.run.threshold is None:
            self.run.threshold, self.run.ceiling = band_of(self._settings, level)
        if not outcome.moved:
            return
        believed = outcome.verdict.word != "invalid"
        changed = (change.value, change.se) if believed and change is not None else (None, None)
        self._add_reading(EntropyReading(self.run.step, level, H_se, *changed))

    def _add_reading(self, reading: EntropyReading) -> None:
        """Keep what the forecast is made from."""
        readings = [*self.run.readings, reading]
        self.run.readings = recent_readings(readings, self._settings.horizon, self._settings.window)


def _with_error(estimand: Estimand, name: str, value: float, se: float) -> dict[str, float]:
    """A number of a curve, its standard error and the ends of its interval under their names."""
    # an error of 0 is that of the first probe's sum, which is 0 by definition
    half = NORMAL_975 * se
    ends = Part("_ci95", "", interval=True).flat(estimand.key(name, "_ci95"), (value - half, value + half))
    return {estimand.key(name): value, estimand.key(name, "_se"): se, **ends}


def check_first_step(value: Any) -> None:
    """Refuse what steps cannot be counted from.

    Raises:
        ConfigError: it is no integer of at least 0.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"first_step: expected an integer of at least 0, found {value!r}")


def saved_state(run: Run, alarms: AlarmStates) -> dict[str, Any]:
    """What a resumed training needs to go on with curves and forecast; see `Watch.state_dict`."""
    kept = [*run.history[:1], *run.history[1:][-KEPT_ENTRIES:]]
    return {
        "format": STATE_FORMAT,
        "run": asdict(replace(run, history=kept)),
        "alarm": asdict(alarms.collapse),
        "explosion_alarm": asdict(alarms.explosion),
    }


def read_state(state: Any) -> tuple[Run, AlarmStates]:
    """What `saved_state` was given.

    Raises:
        ConfigError: it is no such state.
    """
    if not isinstance(state, Mapping) or state.get("format") != STATE_FORMAT:
        other = state.get("format") if isinstance(state, Mapping) else type(state).__name__
        raise ConfigError(f"state: expected one of the format {STATE_FORMAT}, found {other!r}")
    try:
        # states of older versions hold the alarm's horizon, and none of an explosion
        collapse = {name: value for name, value in state["alarm"].items() if name != "horizon"}
        alarms = AlarmStates(ThresholdAlarm(**collapse), ThresholdAlarm(**state.get("explosion_alarm", {})))
        return _read_run(state["run"]), alarms
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"state: expected what `state_dict` returned, found something else ({error_text(error)})"
        ) from error


def _read_run(state: Mapping[str, Any]) -> Run:
    """What a watch had seen.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is not what was saved.
    """
    run = Run(
        **{
            **state,
            "history": [dict(entry) for entry in state["history"]],
            "logged": [(step, H) for step, H in state.get("logged", [])],
            "readings": [EntropyReading(**reading) for reading in state["readings"]],
            "sums": {name: CumulativeSum(**values) for name, values in state["sums"].items()},
            "anchors": {name: Anchor(**values) for name, values in state.get("anchors", {}).items()},
            "changes": {
                name: [ProbedChange(**one) for one in probed]
                for name, probed in state.get("changes", {}).items()
            },
            "errors": ErrorMemory(
                {
                    name: [ErrorSize(**one) for one in sizes]
                    for name, sizes in state.get("errors", {}).get("sizes", {}).items()
                }
            ),
        }
    )
    for entry in run.history:
        _require_numbers(entry["step"], entry["H_orig"], entry["H_orig_tok"])
    for sizes in run.errors.sizes.values():
        _require_numbers(*(x for one in sizes for x in (one.variance, one.df)))
    for reading in run.readings:
        _require_numbers(reading.step, reading.H, reading.H_se)
        _require_numbers(*(x for x in (reading.change, reading.change_se) if x is not None))
    check_first_step(run.step)
    _require_numbers(*(x for x in (run.threshold, run.ceiling) if x is not None))
    for one in run.logged:
        _require_numbers(*one)
    return run


def _require_numbers(*values: Any) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"expected a number, found {value!r}")
