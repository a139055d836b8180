"""What a user's function gets when a collapse is forecast, and what it can do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from probe.errors.exceptions import ConfigError
from probe.forecast.forecast import Forecast

GROUP_RATES, SCHEDULER_RATES = {"lr", "initial_lr", "max_lr", "min_lr"}, {"base_lrs", "max_lrs"}
"""Learning rates in an optimizer's groups, and lists of them in a scheduler."""


@dataclass(frozen=True, repr=False)
class Alarm:
    """A forecast collapse, as `on_alarm` gets it.

    Attributes:
        step: optimizer step after which it was raised, from 1.
        message: the warning that was printed.
        forecast: steps left, with interval.
        entry: the history entry of this probe.
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
    found: dict[int, Any] = {}
    for one in schedulers:
        inside = getattr(one, "_schedulers", None) or [getattr(one, "scheduler", None)]
        parts = [one, *single_schedulers(part for part in inside if part is not None)]
        found |= {id(part): part for part in parts}
    return list(found.values())


OnAlarm = Callable[[Alarm], None]


def check_on_alarm(value: Any) -> None:
    """Refuse what cannot be called when there is an alarm.

    Raises:
        ConfigError: it is no function, `"stop"` or None.
    """
    if not (value is None or callable(value) or value == "stop"):
        raise ConfigError(f"on_alarm: expected a function, 'stop' or None, found {value!r}")


CALM_READINGS = 3
"""Readings in a row without danger after which the alarm is armed again."""
CALM_HORIZONS = 2.0
"""A forecast of more than this many horizons is without danger."""


@dataclass
class CollapseAlarm:
    """Says when a new collapse alarm starts, and then stays silent until the danger has passed.

    An alarm starts if the collapse is expected within `horizon` steps or the entropy is at the threshold or below.
    It can start again after three readings in a row without danger: not expected, or farther than two horizons.

    The attributes are plain numbers: `dataclasses.asdict` saves the state, `CollapseAlarm(**state)` restores it.

    Attributes:
        horizon: optimizer steps.
        armed: whether an alarm can start.
        calm_readings: readings in a row without danger since the last alarm.
        last_alarm: step at which the last alarm started, or None.

    Raises:
        ValueError: if `horizon` is not positive.
    """

    horizon: float
    armed: bool = True
    calm_readings: int = 0
    last_alarm: int | None = None

    def __post_init__(self) -> None:
        if not self.horizon > 0:
            raise ValueError(f"horizon must be a positive number of optimizer steps, not {self.horizon}")

    def update(self, forecast: Forecast | None, step: int) -> bool:
        """Takes in the forecast of one reading.

        Args:
            forecast: None while there are too few readings; nothing changes then.
            step: the reading's optimizer step.

        Returns:
            Whether a new alarm starts here.
        """
        if forecast is None:
            return False
        collapsed = forecast.threshold >= forecast.H
        if self.armed:
            if collapsed or (forecast.expected and forecast.steps <= self.horizon):
                self.armed, self.calm_readings, self.last_alarm = False, 0, step
                return True
            return False
        far = not forecast.expected or forecast.steps > CALM_HORIZONS * self.horizon
        self.calm_readings = self.calm_readings + 1 if far and not collapsed else 0
        self.armed = self.calm_readings >= CALM_READINGS
        return False
