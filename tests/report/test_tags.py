"""Names, groups and charts for loggers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from probe.config.schema import ProbeConfig
from probe.report.tags import hyperparameters, interval_charts, scalar_tags, training_step, varied_settings
from probe.verdict.words import WORDS
from tests.support.synthetic_run import (
    make_result,
)


def test_every_run_has_the_same_hyperparameters(state):
    result = make_result(state)
    other = replace(
        result, values={}, config=make_result(state, ProbeConfig()).config | {"seed_everything": None}
    )
    for settings in (hyperparameters, varied_settings):
        assert set(settings(result)) == set(settings(other))
    assert hyperparameters(other)["learning_rate"] == varied_settings(other)["LR"] == "null"


@pytest.mark.parametrize(("known", "step"), [(60, 60), (None, 0)])
def test_training_step(state, known, step):
    assert training_step(make_result(state, training_step=known)) == step


def test_tags_are_grouped_and_only_finite_numbers_are_tags(state):
    tags = scalar_tags(
        {
            "deltaH1_tok": 1.0,
            "deltaH_true_se": 2,
            "pathwise": 3.0,
            "B_E": 4,
            "H_orig": None,
            "H_upd": math.nan,
            "checkpoint_path": "x",
            "deltaH_true_ci95": [0.0, 1.0],
            "residual_tok_ci95": None,
            "deltaH1_ci95": [math.nan, 1.5],
            "deltaH1_tok_sd_U": 8.0,
            "eta_10": 9.0,
            "verdict": "unresolved",
            "verdict_reasons": ["x"],
            "estimates": [
                {"quantity": "deltaH_true", "estimand": "token", "estimator": "per_decision+cv"}
                | {"value": 10.0, "se": 11.0, "ci95": [1.0, 2.0], "variance_ratio": 12.0, "reported": True},
                {"quantity": "deltaH1", "estimand": "sequence", "estimator": "causal"}
                | {"value": None, "se": None, "ci95": None, "variance_ratio": None, "reported": False},
            ],
            "diagnostics": {"ESS": 5.0, "bias_flags": [], "flag": True, "nested": {"deep": 6}},
            "batch_statistics": {"E": {"length": {"mean": 7.0}}},
        }
    )
    assert tags == {
        "entropy_probe/deltaH1_tok": 1.0,
        "entropy_probe_ground_truth/deltaH_true_se": 2.0,
        "entropy_probe_prediction/pathwise": 3.0,
        "entropy_probe_ground_truth/deltaH_true_ci95_low": 0.0,
        "entropy_probe_ground_truth/deltaH_true_ci95_high": 1.0,
        "entropy_probe_prediction/deltaH1_ci95_high": 1.5,
        "entropy_probe_prediction/deltaH1_tok_sd_U": 8.0,
        "entropy_probe_prediction/eta_10": 9.0,
        "entropy_probe/verdict_code": 2.0,
        "entropy_probe_estimates/deltaH_true_tok/per_decision_cv": 10.0,
        "entropy_probe_estimates/deltaH_true_tok/per_decision_cv_se": 11.0,
        "entropy_probe_estimates/deltaH_true_tok/per_decision_cv_variance_ratio": 12.0,
        "entropy_probe_batch/B_E": 4.0,
        "entropy_probe_diagnostics/ESS": 5.0,
        "entropy_probe_diagnostics/nested/deep": 6.0,
        "entropy_probe_batch/E/length/mean": 7.0,
    }


@pytest.mark.parametrize("word", WORDS)
def test_the_verdict_as_a_number(word):
    assert scalar_tags({"verdict": word}) == {"entropy_probe/verdict_code": WORDS.index(word)}
    assert WORDS == ("trustworthy", "caution", "unresolved", "invalid")


def test_changes_have_charts_with_their_intervals(state):
    scalars = scalar_tags(make_result(state).values)
    layout = interval_charts(scalars)
    assert len(layout) == 2
    for charts in layout.values():
        assert len(charts) == 4
        for kind, (value, low, high) in charts.values():
            assert kind == "Margin"
            assert scalars[low] <= scalars[value] <= scalars[high]
    assert interval_charts(scalar_tags({"deltaH1": 1.0, "deltaH1_se": 2.0})) == {}
