"""The policies of known tails as a model: its probabilities, the enumerated change of a step, and a probed training."""

from __future__ import annotations

import pytest
import torch

from benchmarks.live_coverage import exact_values, interval, train, wrong
from probe.estimand import TOKEN
from tests.support.intervals import Interval, bias, coverage, spread, verdict_cells
from tests.support.tabular import FAMILIES, enumeration, tabular
from tests.support.tabular_model import TabularModel, as_inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_has_the_table_s_probabilities(family):
    """By its forward, which knows nothing of the enumeration, for every response."""
    space, every = tabular(*FAMILIES[family]), enumeration()
    with torch.no_grad():
        logp = TabularModel(space).double()(input_ids=as_inputs(every, torch.arange(len(every.mask)))).logits
    l = logp.log_softmax(-1).gather(-1, every.token.unsqueeze(-1)).squeeze(-1)
    probability = torch.where(every.mask, l, 0.0).sum(1).exp()
    torch.testing.assert_close(probability, space.probability, rtol=1e-5, atol=0.0)  # its base is in float32


@pytest.mark.parametrize("family", ["low", "branch 1/50"])
def test_the_enumerated_change_is_the_table_s(family):
    space = tabular(*FAMILIES[family])
    model = TabularModel(space).double()
    old = model.table()
    with torch.no_grad():
        model.own.weight.copy_(space.step)
    found = exact_values(old, model.table())
    expected = {name: space.exact[of] for name, of in (("deltaH1", "causal"), ("deltaH_true", "snis"))}
    for name, (sequence, token) in expected.items():
        assert found[name] == pytest.approx(sequence, rel=1e-4)
        assert found[TOKEN.key(name)] == pytest.approx(token, rel=1e-4)


def test_shared_weights_move_states_that_were_never_sampled():
    model = TabularModel(tabular(*FAMILIES["branch 1/2000"]))
    old = model.table()
    with torch.no_grad():
        model.shared.weight.fill_(0.01)
    assert bool((model.table() != old).any(1).all())


def test_a_probed_training_logs_what_is_compared():
    rows = train("light", size=64, steps=3)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        for name in ("deltaH1", "deltaH_true", "H_orig"):
            one = interval(row, name, TOKEN)
            assert one.se > 0
            assert abs(one.error) < 6 * one.se
        assert isinstance(wrong(row), bool)
        assert 0 < row["exact"]["kl"] < 0.01


def test_sums_of_intervals():
    found = [Interval(1.0, 0.5, (0.0, 2.0), 0.5), Interval(1.0, 0.5, (-0.5, 2.5), -0.2)]
    assert coverage(found) == (0.5, 1.0)
    assert spread(found) == pytest.approx((2.4 - 1.0) / 2**0.5)
    assert bias(found) == pytest.approx(0.85 / (0.7 / 2**0.5) * 2**0.5)
    assert verdict_cells(["trustworthy", "caution"], [True, False]).endswith("| 50.0 | 50.0")
