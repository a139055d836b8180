"""What prediction and measurement come to in a result."""

from __future__ import annotations

from dataclasses import replace

import pytest

from probe.estimand import SEQUENCE, TOKEN, PerEstimand
from probe.estimators.noise_floor import NoiseFloor
from probe.results.changes import Changes, changes, reported
from tests.support.synthetic_run import make_state


@pytest.fixture(scope="module")
def state():
    return make_state(B_E=6, B_U=3, G=4, lengths=(2, 8), layers=2, shape=(2, 3))


def test_every_number_is_there_for_both_estimands(state):
    found = changes(state.prediction, state.ground_truth)
    assert list(found.prediction) == ["bars_dot", "deltaH1", "pathwise", "score", "deltaH2", "eta_10"]
    assert list(found.measurement) == ["deltaH_true", "H_orig", "H_upd"]
    assert list(found.difference) == ["residual"]
    assert all(number is not None for both in found.numbers.values() for number in both)
    values, prediction, truth = found.as_mapping(), state.prediction, state.ground_truth
    for estimand in (SEQUENCE, TOKEN):
        assert values[estimand.key("deltaH1")] == prediction.deltaH1[estimand]
        assert values[estimand.key("deltaH1", "_se")] == prediction.estimates["causal"][estimand].se
        assert values[estimand.key("deltaH1", "_sd_U")] == prediction.sd_U[estimand]
        assert values[estimand.key("deltaH2", "_se")] == prediction.deltaH2[estimand].se
        assert estimand.key("deltaH2", "_ci95") not in values
        measured = truth.estimates["per_decision"][estimand]
        assert values[estimand.key("deltaH_true")] == measured.value
        assert values[estimand.key("deltaH_true", "_ci95")] == list(measured.ci95)
        assert values[estimand.key("H_upd")] == truth.H_orig[estimand].value + measured.value
        residual = prediction.estimates["matched"][estimand] - truth.estimates["snis"][estimand]
        assert values[estimand.key("residual")] == residual.value
        assert values[estimand.key("residual", "_se")] == residual.se


def test_a_change_below_the_noise_floor_is_null_and_keeps_its_error(state):
    deep = replace(state.ground_truth, noise_floor=NoiseFloor(PerEstimand(1e9, 0.0), 64))
    found = changes(None, deep).measurement
    assert found["deltaH_true"].sequence.value is found["H_upd"].sequence.value is None
    assert found["deltaH_true"].sequence.se == deep.change.sequence.se
    assert found["deltaH_true"].token.value == deep.change.token.value
    assert found["H_orig"].sequence == reported(deep.H_orig.sequence)
    assert (
        changes(None, deep, rounded=True).measurement["deltaH_true"].sequence.value
        == deep.change.sequence.value
    )


def test_the_measurement_without_the_estimand_per_token(state):
    found = changes(state.prediction, state.ground_truth, per_token=False)
    assert found.measurement["deltaH_true"].token is found.difference["residual"].token is None
    assert found.prediction["deltaH1"].token is not None
    assert {row["estimand"] for row in found.estimates} == {"sequence"}
    assert not {"deltaH_true_tok", "H_orig_tok", "residual_tok"} & set(found.as_mapping())


def test_steps_that_differ_have_no_difference(state):
    assert changes(state.prediction, state.ground_truth, same_step=False).difference == {}
    assert changes(state.prediction, None).difference == {}
    assert changes(None, None) == Changes()


def test_a_prediction_without_errors(state):
    bare = replace(state.prediction, estimates={}, deltaH2=None, sd_U=None)
    found = changes(bare, state.ground_truth)
    assert found.prediction["deltaH1"].token.se is None
    assert "deltaH2" not in found.prediction
    assert found.difference == {}


def test_eta_10_is_null_where_the_first_order_is_not_resolved(state):
    wide = {
        name: found.map(lambda one: replace(one, influence=20 * one.influence))
        for name, found in state.prediction.estimates.items()
    }
    known, vague = (
        changes(one, None) for one in (state.prediction, replace(state.prediction, estimates=wide))
    )
    assert all(number.value > 0 for number in known.prediction["eta_10"])
    assert all(number.value is None for number in vague.prediction["eta_10"])
