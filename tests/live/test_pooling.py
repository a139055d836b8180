"""Errors of a training's probes: pooled in units of step and sample, and kept in its state."""

from __future__ import annotations

import math

import pytest

from probe.estimand import SEQUENCE, TOKEN, Number, PerEstimand
from probe.estimators.pooled_error import ErrorSize
from probe.estimators.student import student_quantile
from probe.live.pooling import ErrorMemory
from tests.live.test_history import attach, seeded, small_loop


def pooled(memory, se, length, B_E, name="deltaH1", df=40.0):
    """The error per token after a probe whose own was `se`."""
    number = Number(1.0, se, (0.0, 2.0), df=df)
    found = memory.numbers({name: PerEstimand(None, number)}, B_E, length)[name]
    assert found[SEQUENCE] is None
    return found[TOKEN]


@pytest.mark.parametrize(("name", "power"), [("H_orig", 0), ("deltaH1", 1), ("deltaH_true", 1)])
def test_errors_of_steps_and_samples_of_other_sizes_are_of_one_kind(name, power):
    """Four times the step with a quarter of the responses: the same size in units, so that nothing changes."""
    memory, se = ErrorMemory(), 0.3
    assert pooled(memory, se, 1.0, 64, name).se == pytest.approx(se)
    larger = se * 4**power * 2
    found = pooled(memory, larger, 4.0, 16, name)
    assert found.se == pytest.approx(larger)
    assert found.df == pytest.approx(80.0)
    assert found.ci95 == pytest.approx(
        (1 - student_quantile(80.0) * larger, 1 + student_quantile(80.0) * larger)
    )


def test_what_has_no_error_stays_as_it_is():
    memory = ErrorMemory()
    without = Number(0.0)
    assert memory.numbers({"deltaH1": PerEstimand(without, without)}, 64, 0.0)["deltaH1"][TOKEN] is without
    assert memory.sizes == {}


def test_an_unknown_error_is_not_remembered():
    memory = ErrorMemory()
    assert pooled(memory, math.inf, 1.0, 1, df=1.0).se == math.inf
    assert pooled(memory, 0.5, 1.0, 64).se == pytest.approx(0.5)


def test_a_null_value_keeps_no_interval():
    number = Number(None, 0.1, None, df=9.0)
    found = ErrorMemory().numbers({"deltaH_true": PerEstimand(number, number)}, 64, 1.0)["deltaH_true"].token
    assert found is not None
    assert (found.value, found.ci95, found.se) == (None, None, pytest.approx(0.1))


def test_the_history_has_pooled_errors_and_the_state_their_memory():
    with seeded():
        loop = small_loop(steps=4)
        watch = attach(loop.model, loop.optimizers[0], control_variates=False)
        loop.run(3)
        state = watch.state_dict()
        sizes = [ErrorSize(**one) for one in state["run"]["errors"]["sizes"]["deltaH1_tok"]]
        assert len(sizes) == 3
        unit = watch.last["step_norm"] ** 2 / watch.last["B_E"]
        variances = [one.variance for one in sizes]
        expected = unit * max(sum(variances) / 3, variances[-1])
        assert watch.last["deltaH1_tok_se"] ** 2 == pytest.approx(expected)
        assert "residual_tok" not in state["run"]["errors"]["sizes"]
        watch.detach()
        again = attach(loop.model, loop.optimizers[0], control_variates=False)
        again.load_state_dict(state)
        assert again.state_dict()["run"]["errors"] == state["run"]["errors"]


def test_a_state_with_a_broken_memory_is_refused():
    with seeded():
        loop = small_loop(steps=2)
        watch = attach(loop.model, loop.optimizers[0])
        loop.run()
        state = watch.state_dict()
    state["run"]["errors"]["sizes"]["deltaH1_tok"][0]["variance"] = "large"
    with pytest.raises(ValueError, match="expected what `state_dict` returned"):
        watch.load_state_dict(state)
