"""Alarms: when one starts, and what it can do."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from typing import Any

import pytest
import torch

from probe.forecast.forecast import ALARM_CHANCE, Forecast
from probe.live import Alarm
from probe.live.alarm import ThresholdAlarm
from probe.live.names import PREFIX, history_names
from tests.support.live_loops import Loop, attach, full_model, seeded, sgd, two_optimizers


def ahead(chance: float, H: float = 1.0, threshold: float = 0.5, rising: bool = False) -> Forecast:
    return Forecast(
        30.0,
        0.0,
        math.inf,
        -0.01,
        0.001,
        H,
        threshold,
        10,
        horizon=50,
        chance=chance,
        ever=chance,
        rising=rising,
    )


def test_alarm_starts_once_and_is_armed_again_after_three_calm_readings():
    alarm = ThresholdAlarm()
    assert not alarm.update(None, 0)
    assert not alarm.update(ahead(ALARM_CHANCE - 0.01), 1)
    assert alarm.update(ahead(ALARM_CHANCE), 3)
    assert (alarm.armed, alarm.last_alarm) == (False, 3)
    assert not alarm.update(ahead(0.9), 4)
    for step, chance in enumerate(
        [0.1, 0.1, 0.2, 0.1, 0.1], start=5
    ):  # the third is not calm: counted from the start
        assert not alarm.update(ahead(chance), step)
    assert not alarm.armed
    assert not alarm.update(None, 10)
    assert not alarm.update(ahead(0.0), 11)
    assert alarm.armed
    assert alarm.update(ahead(0.4), 12)


@pytest.mark.parametrize("rising", [False, True])
def test_alarm_at_the_threshold_or_beyond(rising):
    alarm = ThresholdAlarm()
    beyond = ahead(0.0, H=1.5 if rising else 0.5, threshold=1.5 if rising else 0.5, rising=rising)
    assert alarm.update(beyond, 1)
    # no relief where it stays there
    assert not any(alarm.update(beyond, step) for step in range(2, 10))
    assert alarm.calm_readings == 0


@pytest.mark.parametrize("H", [1.0, 0.5, 0.4])
@pytest.mark.parametrize("chance", [0.0, ALARM_CHANCE - 1e-9, ALARM_CHANCE, 1.0])
def test_an_alarm_starts_where_the_forecast_expects_the_threshold(H, chance):
    """The benchmark's rule, the log's replay and the watch's alarm are one."""
    found = ahead(chance, H=H)
    assert ThresholdAlarm().update(found, 1) is found.expected
    replayed = ThresholdAlarm()
    replayed.replay(found.reached, chance, 1)
    assert replayed.armed is not found.expected


def test_alarm_state_survives_saving():
    alarm = ThresholdAlarm()
    alarm.update(ahead(0.5), 1)
    alarm.update(ahead(0.0), 2)
    restored = ThresholdAlarm(**json.loads(json.dumps(dataclasses.asdict(alarm))))
    assert restored == alarm
    assert (restored.armed, restored.calm_readings, restored.last_alarm) == (False, 1, 1)


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
    entry = next(e for e in watch.history if e.get("alarms"))
    assert alarm.entry is entry
    assert alarm.step == entry["step"] < 12
    assert entry["H_orig_tok"] > entry["collapse_entropy"]
    assert alarm.forecast.chance >= ALARM_CHANCE
    assert not alarm.forecast.rising
    assert alarm.model is loop.model
    assert alarm.optimizers == loop.optimizers
    assert sum(len(e.get("alarms", ())) for e in watch.history) == 1
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


def test_an_entropy_that_explodes_raises_an_alarm_of_its_own(caplog):
    """Trained away from one token, the policy that knew nothing else becomes uniform."""
    seen: list[Alarm] = []

    def step(loop: Loop, k: int) -> float:
        ids = torch.full((2, 8), 50)
        loss = -loop.model(input_ids=ids, labels=ids).loss
        loss.backward()
        loop.optimizers[0].step()
        loop.zero_grad(k)
        return float(loss.detach())

    with seeded():
        loop = falling_loop(30)
        loop.run()  # now it is sure of that token
        optimizer = sgd(loop.model, lr=0.02)
        rising = Loop(loop.model, [optimizer], step=step, steps=12)
        watch = attach(
            loop.model, optimizer, B_E=16, shares=False, explosion_factor=1.5, on_alarm=seen.append, every=1
        )
        rising.run()
    assert watch.last["H_orig_tok"] > watch.history[0]["H_orig_tok"]
    assert [alarm.forecast.rising for alarm in seen] == [True]
    assert seen[0].step < 12
    assert "entropy explosion forecast" in seen[0].message or "has exploded" in seen[0].message
    assert watch.last["explosion_entropy"] == pytest.approx(1.5 * watch.history[0]["H_orig_tok"])


def test_a_band_takes_the_place_of_fractions():
    with seeded():
        loop = falling_loop(3)
        watch = attach(loop.model, loop.optimizers[0], B_E=16, entropy_band=(0.5, 9.0), every=1)
        loop.run()
    assert (watch.last["collapse_entropy"], watch.last["explosion_entropy"]) == (0.5, 9.0)


def logged_loop(**settings: Any) -> tuple[Any, Loop]:
    """24 steps that change next to nothing, of which 1, 9 and 17 are probed."""
    with seeded():
        loop = falling_loop(24)
        loop.optimizers[0].param_groups[0]["lr"] = 1e-6
        watch = attach(loop.model, loop.optimizers[0], B_E=16, shares=False, every=8, **settings)
        loop.run()
    return watch, loop


def check_no_second_alarm(watch: Any, logged: list[tuple[dict[str, float], int]]) -> None:
    """A training that goes on from the log knows of the alarm, though no probe raised it."""
    model = full_model()
    again = attach(model, sgd(model, lr=0.1), first_step=24)
    again.replay({"step": step, **history_names(numbers)} for numbers, step in logged)
    assert again._alarms.state == watch._alarms.state
    assert not again._alarms.state.collapse.armed
    assert [entry["step"] for entry in again.history] == [1, 9, 17]
    assert again.last["alarms"] == [24]
    again.detach()


def test_logged_entropies_enter_the_forecast_and_may_raise_an_alarm():
    seen: list[Alarm] = []
    logged: list[tuple[dict[str, float], int]] = []
    watch, _ = logged_loop(
        collapse_fraction=0.1,
        horizon=20,
        on_alarm=seen.append,
        log=lambda numbers, step: logged.append((numbers, step)),
    )
    assert watch.last["collapse_chance"] < ALARM_CHANCE
    H = watch.last["H_orig_tok"]
    for step in range(1, 15):
        watch.note_entropy(H * (1 + 0.01 * (step % 3)), step)
    assert not seen
    for step in range(15, 25):  # not probed any more, and falling fast
        H *= 0.85
        watch.note_entropy(H, step)
    watch.detach()
    watch.note_entropy(1e-9)  # nobody listens
    assert len(seen) == 1
    assert seen[0].step == watch.step == 24
    assert watch.last["H_orig_tok"] > seen[0].forecast.H
    assert watch.last["alarms"] == [24]  # the entry is that of step 17
    assert (watch.last["step"], watch.summary().alarms) == (17, (24,))
    assert [(step, numbers) for numbers, step in logged if numbers.get(f"{PREFIX}/collapse_alarm")] == [
        (24, {f"{PREFIX}/collapse_alarm": 1.0})
    ]
    assert [step for _, step in logged] == [1, 9, 17, 24]
    check_no_second_alarm(watch, logged)


def test_a_forecast_counts_from_the_current_step_whatever_step_was_noted():
    """A steady fall of 10 % per step, noted up to step 22 of 24, and up to 24: the entropy now is the same in both."""
    found = []
    for last in (22, 24):
        seen: list[Alarm] = []
        watch, _ = logged_loop(collapse_fraction=0.1, horizon=50, on_alarm=seen.append)
        H = watch.last["H_orig_tok"]
        for step in range(1, last + 1):
            watch.note_entropy(H * math.exp(-0.1 * max(step - 14, 0)) * (1 + 0.005 * (-1) ** step), step)
        watch.detach()
        (alarm,) = seen
        assert alarm.step == alarm.forecast.step == 24
        assert "after step 24" in alarm.message
        found.append(watch._history.look_ahead(0.9).collapse)
    late, fresh = found
    assert (late.step, fresh.step) == (24, 24)
    assert pytest.approx(fresh.H, rel=0.05) == late.H
    assert late.steps == pytest.approx(fresh.steps, rel=0.15)


@pytest.mark.parametrize("outlier", [0.3, 0.1, 0.01, 1e-6, 20.0])
def test_one_odd_log_raises_no_alarm(outlier):
    seen: list[Alarm] = []
    watch, _ = logged_loop(on_alarm=seen.append)
    H = watch.last["H_orig_tok"]
    for step in range(1, 24):
        watch.note_entropy(H * (1 + 0.01 * (step % 3)), step)
    watch.note_entropy(outlier * H, 24)
    watch.note_entropy(H, 24)
    watch.detach()
    assert not seen


def test_what_cannot_be_a_log_is_left_out_or_refused():
    watch, _ = logged_loop()
    alarm = watch._alarms.state.collapse
    alarm.armed = False
    for H in (math.nan, math.inf, 0.0, -1.0):
        for _ in range(4):
            watch.note_entropy(H)
    assert watch.state_dict()["run"]["logged"] == []
    for step in (20, 5, 11):
        watch.note_entropy(1.0, step)
    assert [step for step, _ in watch.state_dict()["run"]["logged"]] == [5, 11, 20]
    assert not alarm.armed  # logs calm nobody
    for step in (25, 10**6, -1):
        with pytest.raises(ValueError, match="step: expected an optimizer step of the 24 seen so far"):
            watch.note_entropy(1.0, step)
    watch.detach()


def test_an_alarm_that_was_raised_before_a_resume_is_not_raised_again():
    """From a log, as transformers' Trainer resumes: the learning rate was lowered then, and is not lowered again."""
    seen: list[Alarm] = []
    settings: dict[str, Any] = {"collapse_fraction": 0.5, "horizon": 50}
    first, _ = run_falling(on_alarm=seen.append, **settings)
    assert len(seen) == 1
    logged = [{k: v for k, v in entry.items() if k != "alarms"} for entry in first.history]
    with seeded():
        loop = falling_loop(2)
        again = attach(
            loop.model,
            loop.optimizers[0],
            B_E=16,
            shares=False,
            on_alarm=seen.append,
            first_step=12,
            **settings,
        )
        again.replay(logged)
        assert again._alarms.state.collapse == first._alarms.state.collapse
        again.detach()


def test_scaling_the_learning_rate():
    model, optimizers = two_optimizers()
    optimizers[0].param_groups[0]["initial_lr"] = 0.5
    alarm = Alarm(1, "", None, {}, model, optimizers, lambda: None)  # type: ignore[arg-type]
    alarm.scale_learning_rate(0.1)
    assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([1e-3, 1e-3])
    assert optimizers[0].param_groups[0]["initial_lr"] == pytest.approx(0.05)
