"""What a pilot recommends, and the page that says it."""

from __future__ import annotations

import json
import math

import pytest

from probe.estimand import Number, PerEstimand
from probe.estimators.control_variates import SMALLEST_SAMPLE
from probe.plan.page import NO_PLAN, page
from probe.plan.passes import Pass
from probe.plan.settings import PlanConfig
from probe.plan.sizes import plan_of
from probe.results.changes import Changes
from probe.results.result import BatchSizes, ProbeResult

PASSES = [Pass("sample E", "sample", 2.0, 64), Pass("gradient on U", "update", 1.0, 256)]


def pilot(value, se=1e-3, sd_U=2e-4, controls="off: 64 prompts in E", truth=True):
    """A result with one change, the same for all quantities and estimands but for its size."""

    def pair(**more):
        return PerEstimand.of(
            [
                Number(
                    None if value is None else scale * value,
                    scale * se,
                    df=40.0,
                    **{k: scale * v for k, v in more.items()},
                )
                for scale in (10.0, 1.0)
            ]
        )

    return ProbeResult(
        changes=Changes({"deltaH1": pair(sd_U=sd_U)}, {"deltaH_true": pair()} if truth else {}),
        sizes=BatchSizes(128, 16, 8),
        diagnostics={"prompts_E": 64, "control_variates": controls},
        learning_rate=1e-3,
        timing={"load": 4.0, "sample": 2.0, "update": 1.5, "total": 7.5},
        batch_statistics={},
        settings={},
        training_step=60,
        checkpoint_path=None,
        checkpoint_name="step_60",
        config={},
        throughput={},
        started_at="",
    )


def test_a_pilot_that_resolves():
    plan = plan_of(pilot(-4e-3), PASSES, PlanConfig())
    one = plan.changes["deltaH_true"].token
    assert plan.headline is one
    assert one.resolved
    assert one.resolves.low <= one.resolves.size <= one.resolves.high
    assert one.precise.size > one.resolves.size
    assert plan.second_pilot is None
    assert plan.changes["deltaH1"].sequence.resolves == one.resolves  # the same in other units
    text = page(plan)
    assert "The pilot itself resolves the change." in text
    assert f"batch_config.B_E = {one.resolves.size} " in text
    assert "No upper end" not in text


def test_a_pilot_that_does_not_resolve():
    plan = plan_of(pilot(-1.5e-3), PASSES, PlanConfig())
    one = plan.headline
    assert one.resolves.high is None
    assert one.resolves.size > 64
    text = page(plan)
    assert f"{one.resolves.size} [{one.resolves.low} to any]" in text
    assert "No upper end: the pilot's interval contains 0" in text
    assert f"B_E = {one.of_one_se} resolves a change of 0.001" in " ".join(text.split())


def test_a_pilot_that_is_too_noisy_asks_for_another_one():
    plan = plan_of(pilot(-3e-4), PASSES, PlanConfig())
    assert plan.headline.resolves.size is None
    assert plan.second_pilot == plan.headline.of_one_se
    assert [run.what for run in plan.costs] == ["pilot", "second pilot"]
    text = " ".join(page(plan).split())
    assert (
        f"It is too noisy to recommend a size: run a second pilot of --pilot_B_E {plan.second_pilot}" in text
    )
    assert "? [" in text


def test_what_is_recommended_costs_in_proportion():
    """Passes and seconds: E's with B_E, U's with B_U, the rest as it is."""
    plan = plan_of(pilot(-4e-3), PASSES, PlanConfig())
    by_name = {run.what: run for run in plan.costs}
    assert by_name["pilot"].seconds == pytest.approx(7.5)
    assert by_name["pilot"].responses == 128 + 16 * 8
    times = by_name["precise"].B_E / 64
    assert by_name["precise"].seconds == pytest.approx(4.5 + 2.0 * times + 1.0)
    assert by_name["precise"].responses == round(128 * times) + 16 * 8


def test_a_change_that_is_mostly_this_draw_asks_for_a_larger_update_batch():
    plan = plan_of(pilot(-8e-3, sd_U=8e-3), PASSES, PlanConfig())
    spread = plan.updates.token
    assert spread.share == "100 %"
    assert 16 < spread.B_U.low < spread.B_U.size < spread.B_U.high
    (steadier,) = (run for run in plan.costs if run.what == "steadier U")
    assert spread.B_U.size == steadier.B_U


@pytest.mark.parametrize("sd_U", [math.nan, math.inf, 0.0])
def test_an_unknown_spread_over_updates_is_said_and_recommends_nothing(sd_U):
    plan = plan_of(pilot(-4e-3, sd_U=sd_U), PASSES, PlanConfig())
    assert plan.updates == PerEstimand(None, None)
    assert "No B_U: how much deltaH1 owes to this draw of U (deltaH1_sd_U) is not known" in " ".join(
        page(plan).split()
    )
    assert "No B_U" not in page(plan_of(pilot(-4e-3), PASSES, PlanConfig()))


@pytest.mark.parametrize("value", [None, 0.0])
def test_a_pilot_without_a_change_has_a_page_all_the_same(value):
    """Null is below the noise floor; 0 with an error is a change that is too noisy."""
    plan = plan_of(pilot(value), PASSES, PlanConfig())
    assert (plan.headline is None) is (value is None)
    assert (" ".join(NO_PLAN.split()) in " ".join(page(plan).split())) is (value is None)


@pytest.mark.parametrize("value", [-4e-3, -1.5e-3, -3e-7, 0.0, None])
@pytest.mark.parametrize("controls", ["on: fitted on other prompts", "off: 64 prompts in E"])
def test_every_page_keeps_to_its_columns_and_every_mapping_is_json(value, controls):
    plan = plan_of(pilot(value, sd_U=2e-3, controls=controls), PASSES, PlanConfig(power=0.9))
    assert all(len(line) <= 80 for line in page(plan).splitlines())
    assert ("Without control variates" in page(plan)) is (value is not None and controls.startswith("off"))
    mapping = json.loads(json.dumps(plan.as_mapping()))
    assert mapping["power"] == 0.9
    assert set(mapping) >= {"deltaH_true_tok", "deltaH1", "deltaH1_tok_sd_U", "runs", "second_pilot_B_E"}


def test_a_run_may_be_too_small_for_the_control_variates_of_its_pilot():
    """What made the pilot's errors small is not there in a run of the recommended size."""
    plan = plan_of(pilot(-2e-2, controls="on: fitted on other prompts"), PASSES, PlanConfig())
    assert plan.headline.resolves.size < SMALLEST_SAMPLE
    assert (
        f"runs below {SMALLEST_SAMPLE} prompts have only with probe_rework.control_variates: on."
        in " ".join(page(plan).split())
    )


def test_a_pilot_without_a_measurement_plans_for_the_prediction():
    plan = plan_of(pilot(-4e-3, truth=False), PASSES, PlanConfig())
    assert plan.headline is plan.changes["deltaH1"].token
    assert plan.changes["deltaH_true"].token is None
    assert math.isfinite(plan.costs[-1].seconds)
