"""The handle: which steps are probed, cumulative sums, history, logs, alarms, and going on after a checkpoint."""

from __future__ import annotations

import csv
import json
import logging
import math
import random
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from probe.forecast.forecast import Forecast
from probe.live import Alarm, WatchSettings
from probe.live.lines import alarm_line, cost_line, outlook, probe_line
from probe.live.names import LIVE_KEYS, LIVE_NUMBERS, LIVE_TEXTS, PREFIX, scalars
from probe.live.outlets import LAYOUT, tensorboard_layout
from probe.live.schedule import Schedule
from tests.support.live_loops import Loop, adamw, attach, full_model, lora_model, seeded, sgd, trainable

TIMES = {"seconds", "cost_share", "every"}


def documented() -> set[str]:
    """Every key that an entry may have."""
    names = {"step", "verdict", "alarm", *LIVE_NUMBERS, *LIVE_TEXTS}
    for key in LIVE_KEYS:
        for suffix in ("", "_tok"):
            names |= {key + suffix + end for end in ("", "_se", "_ci95_low", "_ci95_high")}
    return names


def small_loop(**options: Any) -> Loop:
    model = lora_model()
    return Loop(model, [adamw(model)], **options)


# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize(("budget", "cost", "step"), [(0.05, 3.0, 1.0), (0.5, 0.1, 1.0), (0.01, 2.0, 0.3)])
def test_probes_stay_within_the_budget(budget, cost, step):
    """With costs that vary as little as the expected one knows; the first probe is the exception."""
    schedule, probed = Schedule(None, budget), []
    for k in range(1, 20001):
        if k > 1:
            schedule.add_step(step)
        if schedule.due(k):
            schedule.add_probe(cost)
            probed.append(k)
            if len(probed) > 1:
                assert schedule.probe_seconds <= budget * schedule.train_seconds * (1 + 1e-12)
                assert schedule.share <= budget * (1 + 1e-12)
    assert probed[0] == 1
    expected = cost / (budget * step)
    assert len(probed) == pytest.approx(20000 / max(expected, 1.0), abs=2.0)  # and the budget is used
    assert schedule.interval == math.ceil(round(expected, 9)) or schedule.interval == math.ceil(expected)
    assert schedule.share_ahead <= budget * (1 + 1e-12)
    assert schedule.share_ahead == pytest.approx(cost / (schedule.interval * step))
    gaps = [b - a for a, b in pairwise(probed[2:])]
    assert max(gaps) - min(gaps) <= 1


def test_a_budget_adapts_to_costs_that_grow():
    g, schedule = random.Random(1), Schedule(None, 0.1)
    last = 0.0
    for k in range(1, 5001):
        if k > 1:
            schedule.add_step(0.5 + g.random())
        if schedule.due(k):
            last = (1.0 if k < 2500 else 4.0) * (0.8 + 0.4 * g.random())
            schedule.add_probe(last)
    # a probe can cost more than the median of the last three: by no more than one probe's worth
    assert schedule.probe_seconds <= 0.1 * schedule.train_seconds + last
    assert schedule.share == pytest.approx(0.1, abs=0.005)
    assert schedule.last_probe == last


def test_a_fixed_interval_and_what_is_not_known_yet():
    schedule = Schedule(3, 0.05)
    assert [k for k in range(1, 12) if schedule.due(k)] == [1, 4, 7, 10]
    assert (schedule.interval, schedule.share, schedule.share_ahead, schedule.step_seconds) == (
        3,
        None,
        None,
        None,
    )
    assert schedule.expected_cost == 0.0
    for seconds in (9.0, 1.0, 2.0):
        schedule.add_probe(seconds)
        schedule.add_step(seconds)
    assert schedule.expected_cost == 2.0
    assert schedule.share_ahead == pytest.approx(1 / 3)
    assert Schedule(None, 0.05).interval is None


def test_one_watch_with_a_budget_probes_the_first_step_and_few_others():
    with seeded():
        loop = small_loop(steps=12)
        watch = attach(loop.model, loop.optimizers[0], every=None, budget=1e-6)
        loop.run()
    assert [entry["step"] for entry in watch.history] == [1]
    assert watch.step == 12
    assert watch.schedule.train_seconds > 0
    assert watch.schedule.probes == 1


def test_the_probes_time_is_no_training_time(monkeypatch):
    import time

    from probe.live.step import UpdateProbe

    own = UpdateProbe.before

    def slow(self: Any, number: int) -> Any:
        time.sleep(0.2)
        return own(self, number)

    monkeypatch.setattr(UpdateProbe, "before", slow)
    with seeded():
        loop = small_loop(steps=4)
        start = time.perf_counter()
        watch = attach(loop.model, loop.optimizers[0])
        attaching = watch.schedule.probe_seconds
        assert 0 < attaching <= time.perf_counter() - start
        loop.run()
        total = time.perf_counter() - start
    probes = sum(e["seconds"] for e in watch.history)
    assert probes > 4 * 0.2
    assert watch.schedule.train_seconds + watch.schedule.probe_seconds <= total
    assert watch.schedule.probe_seconds == pytest.approx(attaching + probes)


# ---------------------------------------------------------------- history


@pytest.mark.parametrize("every", [1, 3])
def test_history(every):
    with seeded():
        loop = small_loop(steps=8)
        watch = attach(loop.model, loop.optimizers[0], every=every, noise_floor="on", collapse_entropy=4.45)
        assert watch.last is None
        loop.run()
    steps = list(range(1, 9, every))
    assert [entry["step"] for entry in watch.history] == steps
    assert watch.last is watch.history[-1]
    assert watch.step == 8
    for entry in watch.history:
        assert set(entry) <= documented(), set(entry) - documented()
        assert entry["verdict_reasons"]  # three responses are too few to be trusted
        assert entry["collapse_entropy"] == 4.45
        assert entry["every"] == every
        for suffix in ("", "_tok"):
            low, high = entry[f"deltaH1{suffix}_ci95_low"], entry[f"deltaH1{suffix}_ci95_high"]
            assert low < entry[f"deltaH1{suffix}"] < high
    first, last = watch.history[0], watch.history[-1]
    for name in ("deltaH1", "deltaH_true", "H"):
        assert first[f"cumulative_{name}_tok"] == first[f"cumulative_{name}_tok_se"] == 0.0
    assert last["cumulative_H_tok"] == pytest.approx(last["H_orig_tok"] - first["H_orig_tok"])
    for name, level in (("deltaH1", "H_predicted"), ("deltaH_true", "H_tracked")):
        for suffix in ("", "_tok"):
            changes = [entry[f"{name}{suffix}"] for entry in watch.history]
            total = 0.0
            for a, b in pairwise(changes):
                total += sum(a + (b - a) * i / every for i in range(every))
            assert last[f"cumulative_{name}{suffix}"] == pytest.approx(total, rel=1e-9, abs=1e-15)
            assert last[f"{level}{suffix}"] == pytest.approx(first[f"H_orig{suffix}"] + total)
    hypotenuse = math.hypot(last["H_orig_tok_se"], first["H_orig_tok_se"])
    assert last["cumulative_H_tok_se"] == pytest.approx(hypotenuse)
    assert [e["steps_to_collapse"] is None for e in watch.history[:3]] == [True, True, False]
    assert [bool(e["outlook"]) for e in watch.history[:3]] == [False, False, True]
    # everything can be saved
    assert json.loads(json.dumps(watch.state_dict())) == json.loads(json.dumps(watch.state_dict()))


def test_all_charts_show_documented_names():
    names = {n for charts in LAYOUT.values() for _, chart in charts.values() for n in chart}
    assert names <= documented()
    layout = tensorboard_layout("train/")
    shown = {n.strip("^$") for charts in layout.values() for _, chart in charts.values() for n in chart}
    assert shown == {f"train/{PREFIX}/{n}" for n in names}
    assert {kind for charts in layout.values() for kind, _ in charts.values()} == {"Multiline", "Margin"}


def test_only_finite_numbers_are_logged():
    entry = {
        "step": 3,
        "verdict": "caution",
        "alarm": True,
        "verdict_reasons": ["x"],
        "every": 1,
        "H_orig_tok": 0.5,
        "ESS": math.nan,
        "steps_to_collapse_high": math.inf,
        "pareto_k": None,
        "outlook": "text",
        "not_documented": 1.0,
    }
    found = scalars(entry)
    assert found == {f"{PREFIX}/every": 1.0, f"{PREFIX}/H_orig_tok": 0.5}
    assert all(type(x) is float for x in found.values())


def test_parts_of_a_momentum_that_is_not_linear_are_explained_in_the_history():
    model = lora_model()
    loop = Loop(model, [torch.optim.RMSprop(trainable(model), lr=1e-3)], steps=1)
    watch = attach(model, loop.optimizers[0])
    loop.run()
    assert watch.last["shares_reason"] == "RMSprop is not linear in the gradient"
    assert not [name for name in watch.last if "momentum" in name]


def test_a_learning_rate_of_0_is_no_error(caplog):
    """A warm-up's first steps."""
    caplog.set_level(logging.INFO, "probe.live")
    with seeded():
        loop = small_loop()
        group = loop.optimizers[0].param_groups[0]
        group["lr"] = 0.0
        watch = attach(loop.model, loop.optimizers[0])
        loop.run(2)
        group["lr"] = 1e-2
        loop.run(4)
    assert [e["verdict"] for e in watch.history[:2]] == ["unresolved", "unresolved"]
    assert watch.history[0]["verdict_reasons"][0].startswith("The optimizer's step was exactly 0")
    assert [e["step_norm"] == 0 for e in watch.history] == [True, True, False, False, False, False]
    assert watch.history[2]["cumulative_deltaH1_tok"] == 0.0
    assert watch.history[3]["steps_to_collapse"] is None  # a step of 0 is no reading of how entropy changes
    assert "steps_to_collapse" in watch.history[4]
    for entry in watch.history:
        assert set(entry) <= documented()
        probe_line(entry)
    assert sum("nats/token" in r.getMessage() for r in caplog.records) == 6


def test_lines():
    entry = {
        "step": 12, "verdict": "trustworthy", "H_orig_tok": 1.25, "H_orig_tok_se": 0.01, "deltaH1_tok": -0.02,
        "deltaH1_tok_se": 0.003, "deltaH_true_tok": None, "steps_to_collapse": 31.4, "steps_to_collapse_low": 22.0,
        "steps_to_collapse_high": math.inf, "momentum_share_tok": 0.8, "outlook": "no collapse in sight",
    }  # fmt: skip
    assert probe_line(entry) == (
        "step 12: H 1.250 +/- 0.010 nats/token; this step -0.0200 +/- 0.0030 predicted, not resolved measured "
        "(trustworthy); no collapse in sight"
    )
    falling = Forecast(31.4, 22.0, math.inf, -0.05, 0.01, 1.25, 0.125, 9)
    assert outlook(falling, 50) == "collapse in about 31 steps (95 %: at least 22)"
    assert outlook(replace(falling, rate_se=0.05), 50) == "no collapse in sight"
    assert outlook(replace(falling, steps=501.0), 50) == "no collapse in sight"
    assert outlook(replace(falling, H=0.1), 50) == "collapsed"
    assert outlook(None, 50) == ""
    text = alarm_line(entry, 0.125, 50)
    assert "from 1.25 to 0.125 nats/token in about 31 steps" in text
    assert "within the horizon of 50" in text
    assert "80 % of the change is momentum" in text
    assert "has collapsed: 1.25 nats/token, at or below 2" in alarm_line(entry, 2.0, 50)
    schedule = Schedule(10, 0.05)
    schedule.add_probe(3.0)
    assert "takes 3 s (sample 1, noise floor 2)" in cost_line(
        schedule, 64, 20.0, {"sample": 1.0, "noise_floor": 2.0}
    )
    schedule.add_step(6.0)
    assert cost_line(schedule, 64, 20.0, {}).endswith(
        "a training step 6 s: every 10 steps, 5 % of the training time"
    )
    chosen = Schedule(None, 0.05)
    chosen.add_probe(3.0)
    chosen.add_step(0.5)
    assert cost_line(chosen, 64, 20.0, {}).endswith(
        ": one every 120 steps, 5 % of the training time, keeps the budget of 5 % (set every=... for more)"
    )


def test_the_cost_is_said_with_the_first_step_after_the_first_probe(caplog):
    caplog.set_level(logging.INFO, "probe.live")
    loop = small_loop(steps=3)
    attach(loop.model, loop.optimizers[0], every=100)
    loop.run()
    assert sum("a training step" in record.message for record in caplog.records) == 1


def test_the_first_reason_is_said_when_the_verdict_changes(caplog):
    caplog.set_level(logging.INFO, "probe.live")
    loop = small_loop(steps=4)
    group = loop.optimizers[0].param_groups[0]
    group["lr"] = 0.0
    watch = attach(loop.model, loop.optimizers[0])
    loop.run()
    lines = [r.message for r in caplog.records if "entropy probe: step" in r.message]
    assert [watch.history[0]["verdict_reasons"][0] in line for line in lines] == [True, False, False, False]


def test_a_second_watch_is_pointed_out(caplog):
    loop = small_loop(steps=1)
    attach(loop.model, loop.optimizers[0])
    attach(loop.model, loop.optimizers[0])
    assert sum("watched already" in record.message for record in caplog.records) == 1


# ---------------------------------------------------------------- going on from a checkpoint


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k not in TIMES} for entry in history]


@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_watch_gives_the_history_of_an_uninterrupted_one(every):
    settings = {"every": every, "collapse_fraction": 0.99, "horizon": 5}
    with seeded():
        loop = small_loop(steps=10)
        whole = attach(loop.model, loop.optimizers[0], **settings)
        loop.run()
    with seeded():
        loop = small_loop(steps=10)
        first = attach(loop.model, loop.optimizers[0], **settings)
        loop.run(4)
        saved = json.loads(json.dumps(first.state_dict()))
        first.detach()
        second = attach(loop.model, loop.optimizers[0], **settings)
        second.load_state_dict(saved)
        assert second.step == 4
        assert second.history == first.history
        assert second.history[0] is not saved["run"]["history"][0]
        loop.run()
    assert without_times(second.history) == without_times(whole.history)
    again, uninterrupted = second.state_dict(), whole.state_dict()
    for name in ("readings", "threshold", "sums", "step"):
        assert again["run"][name] == uninterrupted["run"][name]
    assert again["alarm"] == uninterrupted["alarm"]


def test_a_state_of_something_else_is_refused():
    model = full_model()
    watch = attach(model, adamw(model))
    with pytest.raises(
        ValueError, match="state: expected one of the format entropy-probe/watch/1, found None"
    ):
        watch.load_state_dict({"run": {}})


def test_a_first_step_that_is_not_1():
    with seeded():
        loop = small_loop(steps=5)
        watch = attach(loop.model, loop.optimizers[0], every=2, first_step=100)
        loop.run()
    assert [entry["step"] for entry in watch.history] == [101, 103, 105]
    assert watch.step == 105


# ---------------------------------------------------------------- several optimizers


def two_optimizers() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    model = lora_model()
    A = [p for n, p in model.named_parameters() if "lora_A" in n]
    B = [p for n, p in model.named_parameters() if "lora_B" in n]
    return model, [torch.optim.AdamW(A, lr=1e-2), torch.optim.AdamW(B, lr=1e-2)]


def gradients(model: nn.Module, k: int) -> None:
    ids = torch.randint(4, 100, (2, 6), generator=torch.Generator().manual_seed(k))
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()


def moved(values: dict[str, torch.Tensor], model: nn.Module) -> float:
    return math.sqrt(sum(float((p.detach() - values[n]).double().square().sum()) for n, p in named(model)))


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def test_two_optimizers_make_one_update():
    with seeded():
        model, (first, second) = two_optimizers()
        watch = attach(model, [first, second])
        for k in range(3):
            old = {n: p.detach().clone() for n, p in named(model)}
            gradients(model, k)
            for optimizer in (first, second) if k % 2 == 0 else (second, first):
                optimizer.step()
            assert watch.last["step"] == watch.step == k + 1
            assert watch.last["step_norm"] == pytest.approx(moved(old, model), rel=1e-5)
            assert "momentum_share_tok" in watch.last


def test_an_optimizer_that_steps_twice_ends_the_update():
    """Its gradients are those of the next step by then, so that nothing is said about its parts."""
    with seeded():
        model, (first, second) = two_optimizers()
        watch = attach(model, [first, second])
        old = {n: p.detach().clone() for n, p in named(model)}
        gradients(model, 0)
        first.step()
        assert watch.history == []  # the second one may still come
        distance = moved(old, model)
        gradients(model, 1)
        middle = {n: p.detach().clone() for n, p in named(model)}
        first.step()
        assert [e["step"] for e in watch.history] == [1]
        assert watch.last["step_norm"] == pytest.approx(distance, rel=1e-5)
        assert "only when the next one began" in watch.last["shares_reason"]
        second.step()
        assert [e["step"] for e in watch.history] == [1, 2]
        assert watch.last["step_norm"] == pytest.approx(moved(middle, model), rel=1e-5)
        assert "shares_reason" not in watch.last


# ---------------------------------------------------------------- detaching


def test_detaching_and_the_context_manager():
    with seeded():
        loop = small_loop()
        optimizer = loop.optimizers[0]
        with attach(loop.model, optimizer) as watch:
            assert watch.active
            loop.run(2)
        assert not watch.active
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        loop.run(2)
        assert len(watch.history) == watch.step == 2
        watch.detach()  # again
        with pytest.raises(LookupError), attach(loop.model, optimizer) as other:
            raise LookupError
        assert not other.active
        assert not optimizer._optimizer_step_pre_hooks


def test_two_watches_on_one_optimizer():
    with seeded():
        loop = small_loop()
        one = attach(loop.model, loop.optimizers[0])
        two = attach(loop.model, loop.optimizers[0], every=2)
        loop.run(3)
        one.detach()
        loop.run()
    assert [e["step"] for e in one.history] == [1, 2, 3]
    assert [e["step"] for e in two.history] == [1, 3, 5]
    assert one.history[0]["deltaH_true_tok"] == two.history[0]["deltaH_true_tok"]


# ---------------------------------------------------------------- logs


class WithLog:
    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, float], int]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.seen.append((metrics, step))


def run_logged(log: Any, steps: int = 2) -> Any:
    with seeded():
        loop = small_loop(steps=steps)
        watch = attach(loop.model, loop.optimizers[0], log=log)
        loop.run()
    return watch


def test_logs_to_a_function_and_to_an_object():
    target, calls = WithLog(), []
    watch = run_logged(target)
    run_logged(lambda metrics, step: calls.append((metrics, step)))
    assert [step for _, step in target.seen] == [1, 2]
    for seen in (target.seen, calls):
        for (metrics, _), entry in zip(seen, watch.history, strict=True):
            assert {k: v for k, v in metrics.items() if k.split("/")[1] not in TIMES} == {
                k: v for k, v in scalars(entry).items() if k.split("/")[1] not in TIMES
            }
            assert all(isinstance(x, float) and math.isfinite(x) for x in metrics.values())
            assert type(metrics) is dict


def test_logs_to_a_lightning_logger(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="", version="")
    watch = run_logged(logger)
    logger.save()
    with open(tmp_path / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2]
    for row, entry in zip(rows, watch.history, strict=True):
        assert float(row[f"{PREFIX}/deltaH_true_tok"]) == entry["deltaH_true_tok"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_logs_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        watch = run_logged(writer)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert set(scalars(watch.last)) <= tags
    for tag in (f"{PREFIX}/deltaH1_tok", f"{PREFIX}/H_orig_tok", f"{PREFIX}/verdict_code"):
        found = [(e.step, e.value) for e in events.Scalars(tag)]
        expected = [(e["step"], e[tag.split("/")[1]]) for e in watch.history]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


# ---------------------------------------------------------------- alarms


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


@pytest.mark.parametrize("works", [True])
def test_a_policy_without_any_entropy_does_not_end_training(monkeypatch, works):
    """Every response is EOS with certainty: levels of exactly 0 have no logarithm."""
    from probe.estimators.forward_mode_check import ForwardModeCheck

    monkeypatch.setattr("probe.live.step.forward_mode_check", lambda *_: ForwardModeCheck(works, ""))
    with seeded():
        model = full_model(tied=False)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        head = nn.Linear(16, 104)
        with torch.no_grad():
            head.weight.zero_()
            head.bias.zero_()
            head.bias[1] = 1e4
        model.lm_head = head
        loop = Loop(model, [sgd(model, lr=1e-6)])
        watch = attach(model, loop.optimizers[0], derivative="jvp" if works else "auto", strict=False)
        loop.run()
    assert len(loop.losses) == 6
    assert (watch.error is None) == works
    assert len(watch.history) == (6 if works else 0)
    assert all(entry["H_orig_tok"] == 0.0 for entry in watch.history)


# ---------------------------------------------------------------- parameters that change, steps that do not


@pytest.mark.parametrize("how", ["unfrozen", "replaced"])
def test_parameters_that_join_or_are_replaced_later_are_watched(how, caplog):
    caplog.set_level("INFO")
    model = full_model()
    late = model.lm_head.weight
    late.requires_grad_(how == "replaced")
    optimizer = adamw(model)
    watch = attach(model, optimizer)
    gradients(model, 0)
    optimizer.step()
    if how == "unfrozen":
        late.requires_grad_()
        optimizer.add_param_group({"params": [late], "lr": 0.05})
    else:
        fresh = nn.Parameter(late.detach().clone())
        model.lm_head.weight = model.model.embed_tokens.weight = fresh
        for group in optimizer.param_groups:
            group["params"] = [fresh if p is late else p for p in group["params"]]
    gradients(model, 1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    assert watch.last["step_norm"] == pytest.approx(moved(before, model), rel=1e-6)
    assert sum("the trained parameters have changed" in record.message for record in caplog.records) == 1
    if how == "unfrozen":
        assert watch.history[1]["step_norm"] > watch.history[0]["step_norm"]


def test_parameters_that_are_frozen_for_a_while_stay_watched():
    model, optimizers = two_optimizers()
    watch = attach(model, optimizers)
    names = set(watch._probe.parameters)
    frozen = list(optimizers[1].param_groups[0]["params"])
    gradients(model, 0)
    for p in frozen:
        p.requires_grad_(False)
    optimizers[0].step()
    for p in frozen:
        p.requires_grad_(True)
    optimizers[1].step()
    assert set(watch._probe.parameters) == names
    assert len(watch.history) == 1


def test_steps_that_change_nothing_are_pointed_out(caplog):
    loop = small_loop()
    for group in loop.optimizers[0].param_groups:
        group["lr"] = 0.0
    attach(loop.model, loop.optimizers[0])
    loop.run(5)
    assert sum("3 probed steps in a row have changed nothing" in r.message for r in caplog.records) == 1


def test_replaying_a_log_goes_on_as_if_nothing_had_happened():
    settings = {"control_variates": False}  # what they learned is not in the log
    with seeded():
        one = small_loop(steps=6)
        whole = attach(one.model, one.optimizers[0], **settings)
        one.run()
    with seeded():
        two = small_loop(steps=6)
        first = attach(two.model, two.optimizers[0], **settings)
        two.run(4)
        first.detach()
        names = [{k.partition("/")[2]: v for k, v in scalars(e).items()} for e in first.history]
        second = attach(two.model, two.optimizers[0], first_step=4, **settings)
        second.replay({"step": e["step"], **own} for e, own in zip(first.history, names, strict=True))
        two.run()
    assert [e["step"] for e in second.history] == [1, 2, 3, 4, 5, 6]
    for name in (
        "cumulative_deltaH1_tok",
        "cumulative_deltaH_true_se",
        "cumulative_H_tok",
        "H_predicted_tok",
    ):
        assert second.last[name] == pytest.approx(whole.last[name], rel=1e-9), name
    assert second.last["steps_to_collapse"] == pytest.approx(whole.last["steps_to_collapse"], rel=1e-9)
    assert second.last["collapse_entropy"] == whole.last["collapse_entropy"]


# ---------------------------------------------------------------- the guide


def test_the_guide_has_every_name_and_setting():
    guide = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    short = {"steps_to_collapse_low": "..._low", "steps_to_collapse_high": "..._high"}
    for name in [*LIVE_KEYS, *LIVE_NUMBERS]:
        assert f"`{short.get(name, name)}`" in guide, name
    for field in fields(WatchSettings):
        assert f"`{field.name}`" in guide, field.name
    table = guide[guide.index("## Settings") : guide.index("## What is logged")]
    for name, default in (
        ("every", "None"),
        ("budget", "0.05"),
        ("window", "20"),
        ("horizon", "50"),
        ("B_E", "64"),
    ):
        assert str(getattr(WatchSettings(), name)) == default
        assert f"| `{name}` | {default} |" in table
