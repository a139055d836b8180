"""A collapse or explosion that is forecast: when an alarm starts, what a user's function gets, and what it can do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from probe.errors.exceptions import ConfigError
from probe.forecast.forecast import ALARM_CHANCE, Forecast, calls_for_alarm
from probe.live.lines import Outlook, alarm_line
from probe.live.names import ALARMS
from probe.live.say import say

GROUP_RATES, SCHEDULER_RATES = {"lr", "initial_lr", "max_lr", "min_lr"}, {"base_lrs", "max_lrs"}
"""Learning rates in an optimizer's groups, and lists of them in a scheduler."""


@dataclass(frozen=True, repr=False)
class Alarm:
    """A forecast collapse or explosion, as `on_alarm` gets it.

    Attributes:
        step: optimizer step after which it was raised, from 1.
        message: the warning that was printed.
        forecast: steps left, with interval and chance; `forecast.rising` tells an explosion from a collapse.
        entry: the history entry of the last probe.
        model: the policy.
        optimizers: those that are watched.
        stop: asks the host to end training after this step; a plain loop reads `watch.should_stop`.
        schedulers: the learning-rate schedulers, where the host is a trainer.
    """

    step: int
    message: str
    forecast: Forecast
    entry: Mapping[str, Any]
    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    stop: Callable[[], None]
    schedulers: Sequence[Any] = ()

    def __repr__(self) -> str:
        return f"Alarm(step={self.step}, {self.message!r})"

    def scale_learning_rate(self, factor: float, *schedulers: Any) -> None:
        """Multiply the learning rate of every group, now and in what schedulers make of it later.

        Args:
            factor: what the rate is multiplied by.
            schedulers: those of a plain loop. Many (LambdaLR, say) work every rate out from base rates of their own,
                and would undo the change. Those of Lightning's and transformers' trainers are known.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for key in GROUP_RATES & set(group):
                    if group[key] is not None:
                        group[key] = group[key] * factor
        for scheduler in single_schedulers([*self.schedulers, *schedulers]):
            for key in SCHEDULER_RATES & set(vars(scheduler)):
                setattr(scheduler, key, [rate * factor for rate in getattr(scheduler, key)])


def single_schedulers(schedulers: Iterable[Any]) -> list[Any]:
    """Learning-rate schedulers, those inside of SequentialLR, ChainedScheduler and Accelerate's wrapper, each once."""
    singles: dict[int, Any] = {}
    for one in schedulers:
        inside = getattr(one, "_schedulers", None) or [getattr(one, "scheduler", None)]
        parts = [one, *single_schedulers(part for part in inside if part is not None)]
        singles |= {id(part): part for part in parts}
    return list(singles.values())


OnAlarm = Callable[[Alarm], None]
"""What a user wants done."""


def check_on_alarm(value: Any) -> None:
    """Refuse what cannot be called when there is an alarm.

    Raises:
        ConfigError: it is no function, `"stop"` or None.
    """
    if not (value is None or callable(value) or value == "stop"):
        raise ConfigError(f"on_alarm: expected a function, 'stop' or None, found {value!r}")


CALM_READINGS = 3
"""Readings in a row without danger after which the alarm is armed again."""
CALM_CHANCE = ALARM_CHANCE / 2
"""A threshold that is reached within the horizon with less than this chance is without danger."""


@dataclass
class ThresholdAlarm:
    """Says when a new alarm starts at one threshold, and then stays silent until the danger has passed.

    An alarm starts if the threshold is reached within the horizon with a chance of at least `ALARM_CHANCE`, or is
    reached already. It can start again after three readings in a row without danger.

    The attributes are plain numbers: `dataclasses.asdict` saves the state, `ThresholdAlarm(**state)` restores it.

    Attributes:
        armed: whether an alarm can start.
        calm_readings: readings in a row without danger since the last alarm.
        last_alarm: step at which the last alarm started, or None.
    """

    armed: bool = True
    calm_readings: int = 0
    last_alarm: int | None = None

    def update(self, forecast: Forecast | None, step: int, probed: bool = True) -> bool:
        """Takes in the forecast of one reading.

        Args:
            forecast: None while there are too few readings; nothing changes then.
            step: the reading's optimizer step.
            probed: whether the reading is a probe's; others can start an alarm, and calm nobody.

        Returns:
            Whether a new alarm starts here.
        """
        if forecast is None or not (self.armed or probed):
            return False
        return self._take(forecast.reached, forecast.chance, step)

    def _take(self, reached: bool, chance: float, step: int) -> bool:
        """Whether an alarm starts, with what a forecast says of the threshold."""
        if self.armed:
            if calls_for_alarm(reached, chance):
                self.raised(step)
                return True
            return False
        calm = not reached and chance < CALM_CHANCE
        self.calm_readings = self.calm_readings + 1 if calm else 0
        self.armed = self.calm_readings >= CALM_READINGS
        return False

    def replay(self, reached: bool, chance: float | None, step: int) -> None:
        """Be as after a reading of an earlier training, without a word.

        Args:
            reached: whether the entropy was at the threshold or beyond.
            chance: of reaching it within the horizon; None where nothing was forecast.
            step: the reading's.
        """
        if chance is not None:
            self._take(reached, chance, step)

    def raised(self, step: int) -> None:
        """Be as after an alarm of an earlier training at `step`."""
        self.armed, self.calm_readings, self.last_alarm = False, 0, step


def outside_band(entry: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the entropy of a history entry counts as collapsed, and as exploded; an end it lacks is never reached."""
    H, low, high = entry["H_orig_tok"], entry.get("collapse_entropy"), entry.get("explosion_entropy")
    return low is not None and low >= H, high is not None and high <= H


@dataclass
class AlarmStates:
    """The alarms at both ends of the band; see `ThresholdAlarm`."""

    collapse: ThresholdAlarm = field(default_factory=ThresholdAlarm)
    explosion: ThresholdAlarm = field(default_factory=ThresholdAlarm)

    def replay(self, entry: Mapping[str, Any]) -> None:
        """Be as after an entry of an earlier training's history, or an alarm in its log."""
        for rising, state in ((False, self.collapse), (True, self.explosion)):
            if entry.get(ALARMS[rising]):
                state.raised(entry["step"])
        if entry.get("H_orig_tok") is None:
            return
        collapsed, exploded = outside_band(entry)
        self.collapse.replay(collapsed, entry.get("collapse_chance"), entry["step"])
        self.explosion.replay(exploded, entry.get("explosion_chance"), entry["step"])


class Alarms:
    """The alarms of one training, and what is done when one is raised.

    Attributes:
        state: whether one can start.
        should_stop: whether an alarm asked for the end of training.
        schedulers: learning-rate schedulers that an alarm is told of.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        on_alarm: OnAlarm | str | None,
    ) -> None:
        """Check what is to be done.

        Args:
            model: the policy.
            optimizers: those that are watched.
            on_alarm: a function of the alarm, or `"stop"`.

        Raises:
            ConfigError: `on_alarm` cannot be called.
        """
        check_on_alarm(on_alarm)
        self.state = AlarmStates()
        self.should_stop = False
        self.schedulers: Sequence[Any] = ()
        self._model, self._optimizers, self._on_alarm = model, optimizers, on_alarm

    def raised(self, ahead: Outlook, entry: dict[str, Any], step: int, probed: bool = True) -> list[Alarm]:
        """New alarms, each with its warning; its step is noted in the history's `entry`.

        Args:
            ahead: what is forecast.
            entry: of the last probe.
            step: optimizer steps seen.
            probed: whether a probe has just been made.
        """
        new = [
            forecast
            for state, forecast in (
                (self.state.collapse, ahead.collapse),
                (self.state.explosion, ahead.explosion),
            )
            if forecast is not None and state.update(forecast, step, probed)
        ]
        alarms = []
        for forecast in new:
            message = alarm_line(forecast, entry.get("momentum_share_tok"))
            entry["alarms"] = [*entry.get("alarms", ()), step]
            say(message, warn=True)
            alarms.append(
                Alarm(
                    step,
                    message,
                    forecast,
                    entry,
                    self._model,
                    self._optimizers,
                    self._request_stop,
                    self.schedulers,
                )
            )
        return alarms

    def begin(self, entry: Mapping[str, Any]) -> None:
        """Take in the first probe: say if the entropy starts outside its band, where an alarm says nothing new."""
        ends = (("below", "collapse_entropy"), ("above", "explosion_entropy"))
        for outside, (side, end) in zip(outside_band(entry), ends, strict=True):
            if outside:
                say(
                    f"entropy starts at {entry['H_orig_tok']:.3g} nats/token, at or {side} {end} = {entry[end]:.3g}: "
                    "an alarm of that will say no more than this; give thresholds on both sides of it",
                    warn=True,
                )

    def act_on(self, alarm: Alarm) -> None:
        """Do what the user wants done; exceptions of a user's function are the user's."""
        if self._on_alarm == "stop":
            alarm.stop()
        elif callable(self._on_alarm):
            self._on_alarm(alarm)

    def _request_stop(self) -> None:
        self.should_stop = True
