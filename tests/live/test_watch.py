"""The handle: what a user reads of a whole run."""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from probe.forecast.forecast import Forecast
from probe.live import WatchSettings
from probe.live.attribution import CLASSES
from probe.live.lines import Outlook, alarm_line, cost_line, probe_line
from probe.live.names import (
    ALARMS,
    LIVE_KEYS,
    LIVE_NUMBERS,
    LIVE_TEXTS,
    MAIN,
    PREFIX,
    full_name,
    history_names,
    scalars,
)
from probe.live.outlets import LAYOUT, tensorboard_layout
from probe.live.reference import reference_page
from probe.live.schedule import Schedule
from tests.support.live_loops import (
    Loop,
    adamw,
    attach,
    full_model,
    gradients,
    lora_model,
    moved,
    seeded,
    sgd,
    small_loop,
    trainable,
    two_optimizers,
)


def documented() -> set[str]:
    """Every key that an entry may have."""
    names = {"step", "verdict", *LIVE_NUMBERS, *LIVE_TEXTS}
    for key in LIVE_KEYS:
        for suffix in ("", "_tok"):
            names |= {key + suffix + end for end in ("", "_se", "_df", "_ci95_low", "_ci95_high")}
    return names


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
            # the curve starts somewhere among what the levels say of the first one
            starts = [e[f"H_orig{suffix}"] - e[f"cumulative_{name}{suffix}"] for e in watch.history]
            assert min(starts) < last[f"{level}{suffix}"] - total < max(starts)
            assert first[f"{level}{suffix}"] == first[f"H_orig{suffix}"]
            assert first[f"{level}{suffix}_se"] == first[f"H_orig{suffix}_se"]
    hypotenuse = math.hypot(last["H_orig_tok_se"], first["H_orig_tok_se"])
    assert last["cumulative_H_tok_se"] == pytest.approx(hypotenuse)
    assert [e["steps_to_collapse"] is None for e in watch.history[:3]] == [True, True, False]
    assert [bool(e["outlook"]) for e in watch.history[:3]] == [False, False, True]
    # everything can be saved
    assert json.loads(json.dumps(watch.state_dict())) == json.loads(json.dumps(watch.state_dict()))


def test_every_documented_name_occurs():
    """A quantity whose table entry promises it to a training is really given by one."""
    with seeded():
        loop = small_loop(steps=4)
        watch = attach(loop.model, loop.optimizers[0], every=1, noise_floor="on", shares=True)
        loop.run()
    found = {name for entry in watch.history for name in entry}
    missing = {*LIVE_KEYS, *(f"{key}_tok" for key in LIVE_KEYS), *LIVE_NUMBERS} - found
    # shares only where the total is told from 0, alarms in logs alone, tokens where their batch is known
    of_tokens = {f"deltaH1_{name}_tok" for name in CLASSES} | {"attribution_scale"}
    assert missing <= {"momentum_share_tok", "decay_share_tok", *ALARMS.values(), *of_tokens}
    assert of_tokens <= set(LIVE_NUMBERS)


def test_all_charts_show_documented_names():
    names = {n for charts in LAYOUT.values() for _, chart in charts.values() for n in chart}
    assert names <= documented()
    layout = tensorboard_layout()
    shown = {n.strip("^$") for charts in layout.values() for _, chart in charts.values() for n in chart}
    assert shown == {full_name(n) for n in names}
    assert {kind for charts in layout.values() for kind, _ in charts.values()} == {"Multiline", "Margin"}


def test_the_errors_of_curves_are_logged_and_charted_behind_a_prefix_of_their_own():
    with seeded():
        loop = small_loop(steps=3)
        watch = attach(loop.model, loop.optimizers[0], every=1)
        loop.run()
    entry, logged = watch.last, scalars(watch.last)
    layout = tensorboard_layout()
    bands = [chart for charts in layout.values() for kind, chart in charts.values() if kind == "Margin"]
    for curve in ("H_predicted", "H_tracked", "cumulative_H", "cumulative_deltaH1", "cumulative_deltaH_true"):
        value, se = entry[f"{curve}_tok"], logged[f"{PREFIX}_curves/{curve}_tok_se"]
        ends = [f"{PREFIX}_curves/{curve}_tok_ci95_{end}" for end in ("low", "high")]
        assert [logged[end] for end in ends] == pytest.approx(
            [value - 1.96 * se, value + 1.96 * se], rel=1e-3
        )
        assert se == entry[f"{curve}_tok_se"] > 0
        assert [full_name(f"{curve}_tok"), *ends] in bands
    main = [name for name in logged if name.startswith(f"{PREFIX}/")]
    assert len(main) <= len(MAIN) == 12
    assert sorted(logged)[: len(main)] == sorted(main)  # before all others, wherever names are sorted
    assert len([name for name in logged if name.startswith(f"{PREFIX}_curves/")]) == 15
    former = {f"{PREFIX}/{name.partition('/')[2]}": x for name, x in logged.items()}
    assert history_names(former) == history_names(logged)  # an older log can be gone on from
    assert history_names({**logged, "loss": 1.0}) == {name: entry[name] for name in history_names(logged)}


def test_only_finite_numbers_are_logged():
    entry = {
        "step": 3,
        "verdict": "caution",
        "alarms": [3],
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
    assert found == {f"{PREFIX}_details/every": 1.0, f"{PREFIX}/H_orig_tok": 0.5}
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
    falling = Forecast(
        31.4, 22.0, math.inf, -0.05, 0.01, 1.25, 0.125, 9, horizon=50, chance=0.7, ever=0.9, step=40
    )
    far = replace(falling, steps=501.0, chance=0.01)
    rising = replace(far, rising=True, threshold=3.0)

    def words(*both: Forecast | None) -> str:
        return Outlook(*both).in_words

    assert words(falling) == "collapse in about 31 steps (within 50: 70 %)"
    assert words(replace(falling, high=55.0)) == "collapse in about 31 steps (95 %: 22 to 55)"
    assert words(far, rising) == "no collapse in sight"
    assert words(replace(far, chance=0.12), rising) == "collapse within 50 steps: 12 %"
    assert words(replace(far, steps=math.inf, ever=0.3), rising) == "flattening"
    assert words(replace(far, steps=math.inf, ever=0.3, rate_se=0.05), rising) == "no collapse in sight"
    assert words(replace(falling, H=0.1)) == "collapsed"
    assert words(far, replace(rising, H=3.0)) == "exploded"
    assert words(far, replace(rising, steps=40.0)) == "explosion in about 40 steps (within 50: under 5 %)"
    assert words(None, None) == ""
    text = alarm_line(falling, 0.8)
    assert "forecast after step 40: from 1.25 to 0.125 nats/token in about 31 steps" in text
    assert "80 % of the change is momentum" in text
    assert "has collapsed after step 40: 0.1 nats/token, at or below 0.125" in alarm_line(
        replace(falling, H=0.1), None
    )
    assert (
        "explosion forecast after step 40: from 1.25 to 3 nats/token within 50 steps with a chance of 40 %"
        in alarm_line(replace(rising, steps=math.inf, chance=0.4), None)
    )
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


# ---------------------------------------------------------------- a policy without entropy


@pytest.mark.parametrize("works", [True])
def test_a_policy_without_any_entropy_does_not_end_training(monkeypatch, works):
    """Every response is EOS with certainty: levels of exactly 0 have no logarithm."""
    from probe.estimators.forward_mode_check import ForwardModeCheck

    monkeypatch.setattr("probe.phases.passes.forward_mode_check", lambda *_: ForwardModeCheck(works, ""))
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


# ---------------------------------------------------------------- the guide


def test_the_page_of_names_is_up_to_date():
    """To write it: make docs."""
    page = Path(__file__).parents[2] / "docs" / "training_names.md"
    assert page.read_text(encoding="utf-8") == reference_page()


def test_the_guide_has_every_setting_and_names_that_exist():
    guide = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    names = guide[guide.index("## What is logged") : guide.index("**Momentum's part.**")]
    for name in re.findall(r"`(\w+_tok|steps_to_collapse|verdict_code)`", names):
        assert name.removesuffix("_tok") in {*LIVE_KEYS, *LIVE_NUMBERS}, name
    for field in fields(WatchSettings):
        assert f"`{field.name}`" in guide, field.name
    table = guide[guide.index("## Settings") : guide.index("## What is logged")]
    for name, default in (
        ("every", "None"),
        ("budget", "0.05"),
        ("window", "60"),
        ("horizon", "50"),
        ("B_E", "64"),
    ):
        assert str(getattr(WatchSettings(), name)) == default
        assert f"| `{name}` | {default} |" in table
