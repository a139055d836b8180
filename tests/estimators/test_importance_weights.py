"""Diagnostics of importance weights against known tails."""

from __future__ import annotations

import pytest
import torch

from probe.errors.exceptions import NumericalError
from probe.estimators.importance_weights import SMALLEST_TAIL_SAMPLE, weight_diagnostics


def pareto(k, B, seed=0):
    """Log-weights whose tail is a Pareto distribution of shape `k`: `P(w > x) = x^(-1 / k)`."""
    u = torch.rand(B, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return -k * torch.log(u)


@pytest.mark.parametrize("k", [0.3, 0.7, 1.2])
def test_pareto_k_is_that_of_the_tail(k):
    found = [weight_diagnostics(pareto(k, 20_000, seed)) for seed in range(4)]
    assert sum(d.pareto_k for d in found) / 4 == pytest.approx(k, abs=0.1)
    assert [d.pareto_k_good for d in found] == [d.pareto_k < 0.7 for d in found]
    assert found[0].pareto_k_limit == 0.7
    if k != 0.7:
        assert all(d.pareto_k_good is (k < 0.7) for d in found)


def test_pareto_k_equals_that_of_the_library():
    from arviz_stats.base import array_stats

    logw = pareto(0.6, 500) - 1234.5  # any shift cancels
    before = logw.clone()
    found = weight_diagnostics(logw)
    assert found.pareto_k == pytest.approx(float(array_stats.psislw(-before.numpy())[1]), rel=1e-6)
    assert found.pareto_k == pytest.approx(weight_diagnostics(before + 1234.5).pareto_k, rel=1e-6)
    assert torch.equal(logw, before)
    assert torch.equal(found.log_weights, before)


def test_the_limit_is_smaller_for_small_samples():
    assert weight_diagnostics(pareto(0.5, 100)).pareto_k_limit == pytest.approx(0.5)
    assert weight_diagnostics(pareto(0.5, 1000)).pareto_k_limit == pytest.approx(2 / 3)
    assert weight_diagnostics(torch.zeros(1, dtype=torch.float64)).pareto_k_limit == -float("inf")


def test_no_k_where_there_is_no_tail():
    few = weight_diagnostics(pareto(0.5, SMALLEST_TAIL_SAMPLE - 1))
    assert few.pareto_k is None
    assert few.pareto_k_good is None
    assert weight_diagnostics(pareto(0.5, SMALLEST_TAIL_SAMPLE)).pareto_k is not None
    for constant in (0.0, -700.0):
        assert weight_diagnostics(torch.full((200,), constant, dtype=torch.float64)).pareto_k is None
    # equal but for the last digits: no error, and a k or none
    noise = 1e-15 * torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = weight_diagnostics(noise)
    assert found.ess == pytest.approx(200.0)
    # most weights equal, a few not
    mixed = torch.cat([torch.zeros(190, dtype=torch.float64), torch.rand(10, dtype=torch.float64)])
    assert weight_diagnostics(mixed).w_max > 1.0


@pytest.mark.parametrize("B", [1, 2, 24, 25, 30])
@pytest.mark.parametrize("size", [1e-300, 1e-17, 1e-9, 1.0, 300.0, 1e5])
def test_any_finite_weights_are_described(B, size):
    logw = size * torch.randn(B, generator=torch.Generator().manual_seed(B), dtype=torch.float64)
    found = weight_diagnostics(logw)
    assert float(found.weights.mean()) == pytest.approx(1.0)
    assert 1.0 - 1e-9 <= found.ess <= B + 1e-9
    assert found.w_min <= 1.0 + 1e-12 <= found.w_max + 1e-9
    assert found.pareto_k is None or abs(found.pareto_k) < 1e6


def test_weights_have_mean_one():
    logw = torch.log(torch.tensor([1.0, 1.0, 2.0, 4.0], dtype=torch.float64)) + 500.0
    found = weight_diagnostics(logw)
    assert found.weights.tolist() == pytest.approx([0.5, 0.5, 1.0, 2.0])
    assert (found.w_min, found.w_max) == pytest.approx((0.5, 2.0))
    assert found.ess == pytest.approx(64 / 22)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_weights_that_are_not_finite_are_refused(bad):
    logw = torch.zeros(30, dtype=torch.float64)
    logw[[3, 4]] = bad
    with pytest.raises(NumericalError, match="finite log-weights, found 2 that are not"):
        weight_diagnostics(logw)
