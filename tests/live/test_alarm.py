"""Alarms: when one starts, and what it can do."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from typing import Any

import pytest
import torch

from probe.forecast.forecast import Forecast
from probe.live import Alarm
from probe.live.alarm import CollapseAlarm
from tests.support.live_loops import Loop, attach, full_model, seeded, sgd, two_optimizers


def outlook(steps: float, resolved: bool = True, H: float = 1.0) -> Forecast:
    return Forecast(steps, 0.0, 1e6, -0.01, 0.001 if resolved else 0.01, H, 0.5, 10)


def test_alarm_starts_once_and_is_armed_again_after_three_calm_readings():
    alarm = CollapseAlarm(horizon=100)
    assert not alarm.update(None, 0)
    assert not alarm.update(outlook(101), 1)
    assert not alarm.update(outlook(50, resolved=False), 2)
    assert alarm.update(outlook(100), 3)
    assert (alarm.armed, alarm.last_alarm) == (False, 3)
    assert not alarm.update(outlook(10), 4)
    for step, steps in enumerate(
        [201, 201, 150, 201, 201], start=5
    ):  # the third is not calm: counted from the start
        assert not alarm.update(outlook(steps), step)
    assert not alarm.armed
    assert not alarm.update(None, 10)
    assert not alarm.update(outlook(50, resolved=False), 11)
    assert alarm.armed
    assert alarm.update(outlook(99), 12)


def test_alarm_at_or_below_the_threshold():
    alarm = CollapseAlarm(horizon=100)
    below = outlook(0.0, resolved=False, H=0.5)
    assert alarm.update(below, 1)
    # not resolved, so not expected, but no relief
    assert not any(alarm.update(below, step) for step in range(2, 10))
    assert alarm.calm_readings == 0


def test_alarm_state_survives_saving():
    alarm = CollapseAlarm(horizon=100)
    alarm.update(outlook(50), 1)
    alarm.update(outlook(500), 2)
    restored = CollapseAlarm(**json.loads(json.dumps(dataclasses.asdict(alarm))))
    assert restored == alarm
    assert (restored.armed, restored.calm_readings, restored.last_alarm) == (False, 1, 1)


def test_alarm_wants_a_positive_horizon():
    for horizon in (0, -1, math.nan):
        with pytest.raises(ValueError, match="horizon"):
            CollapseAlarm(horizon=horizon)


def falling_loop(steps: int = 12) -> Loop:
    """Training on one token only: entropy falls fast."""

    def step(loop: Loop, k: int) -> float:
        ids = torch.full((2, 8), 50)
        loss = loop.model(input_ids=ids, labels=ids).loss
        loss.backward()
        loop.optimizers[0].step()
        loop.zero_grad(k)
        return float(loss.detach())

    model = full_model(attention_dropout=0.0)
    return Loop(model, [sgd(model, lr=0.1)], step=step, steps=steps)


def run_falling(**settings: Any) -> tuple[Any, Loop]:
    with seeded():
        loop = falling_loop()
        watch = attach(loop.model, loop.optimizers[0], B_E=16, shares=False, **settings)
        loop.run()
    return watch, loop


def test_an_alarm_is_raised_before_the_collapse_and_stops(caplog):
    seen: list[Alarm] = []
    settings = {"collapse_fraction": 0.5, "horizon": 50}
    watch, loop = run_falling(on_alarm=seen.append, **settings)
    assert len(seen) == 1
    (alarm,) = seen
    entry = next(e for e in watch.history if e.get("alarm"))
    assert alarm.entry is entry
    assert alarm.step == entry["step"] < 12
    assert entry["H_orig_tok"] > entry["collapse_entropy"]
    assert alarm.forecast.expected
    assert alarm.forecast.steps <= 50
    assert alarm.model is loop.model
    assert alarm.optimizers == loop.optimizers
    assert sum(bool(e.get("alarm")) for e in watch.history) == 1
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [f"entropy probe: {alarm.message}"]
    assert not watch.should_stop
    alarm.stop()
    assert watch.should_stop
    # and what was forecast comes: the level after the last step lies within the interval of the level forecast
    assert watch.last["H_orig_tok"] < watch.history[0]["H_orig_tok"]

    stopped, _ = run_falling(on_alarm="stop", **settings)
    assert stopped.should_stop
    quiet, _ = run_falling(on_alarm="stop", collapse_entropy=1e-9, horizon=1)
    assert not quiet.should_stop


def test_scaling_the_learning_rate():
    model, optimizers = two_optimizers()
    optimizers[0].param_groups[0]["initial_lr"] = 0.5
    alarm = Alarm(1, "", None, {}, model, optimizers, lambda: None)  # type: ignore[arg-type]
    alarm.scale_learning_rate(0.1)
    assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([1e-3, 1e-3])
    assert optimizers[0].param_groups[0]["initial_lr"] == pytest.approx(0.05)
