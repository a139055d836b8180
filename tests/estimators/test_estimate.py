"""Errors of estimates: jackknife, influence function, grouping by prompt, paired differences."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from probe.estimators.entropy_change import entropy_change
from probe.estimators.estimate import (
    JACKKNIFE_PROMPTS,
    Estimate,
    error_method,
    estimate,
    mean_by_prompt,
)
from probe.estimators.ground_truth import resampled_change, reweighted_change
from probe.estimators.prediction import token_first_order
from probe.scoring import TokenScores
from probe.scoring.scores import TokenTangents


def draw(B=12, T=5, seed=0, last=1):
    """Random scores before and after; `last` sequences reach the last position."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T, (B,), generator=g)
    lengths[:last] = T
    mask = torch.arange(T) < lengths.unsqueeze(1)
    l, h, dl, dh = (torch.randn(B, T, generator=g, dtype=torch.float64) * mask for _ in range(4))
    old = TokenScores(l, h.abs(), mask)
    return old, TokenScores(l + 0.1 * dl, (h + 0.1 * dh).abs(), mask), TokenTangents(dl, dh)


def without(old, new, tangents, keep):
    """The batch without some sequences, its empty positions included."""
    parts = [TokenScores(s.logprob[keep], s.entropy[keep], s.mask[keep]) for s in (old, new)]
    return *parts, TokenTangents(tangents.logprob[keep], tangents.entropy[keep])


def estimators(old, new, tangents, group):
    """Every estimator of one batch, each with both estimands."""
    truth = reweighted_change(old, new, group, clip=0.2)
    out = {name: list(both) for name, both in truth.estimates.items()}
    for weighting in ("causal", "matched"):
        parts = token_first_order(old, tangents, group, weighting)
        out[weighting], out[f"{weighting} score"] = list(parts.total), list(parts.score)
    return out


@pytest.mark.parametrize("responses", [1, 2])
def test_the_jackknife_is_that_of_smaller_batches(responses):
    """Leaving a prompt out by its weight equals estimating from a batch without its sequences, in every estimator.

    A single sequence reaches the last position: without it nobody does, and with one other it has no one to learn from.
    """
    old, new, tangents = draw()
    group = torch.arange(12) // responses
    P = 12 // responses
    whole = estimators(old, new, tangents, group)
    smaller = [estimators(*without(old, new, tangents, group != p), group[group != p]) for p in range(P)]
    assert set(whole) == {
        "snis", "per_decision", "snis_clipped", "causal", "matched", "causal score", "matched score"
    }  # fmt: skip
    for name, both in whole.items():
        for k, found in enumerate(both):
            left = torch.tensor([s[name][k].value for s in smaller], dtype=torch.float64)
            expected = math.sqrt((P - 1) / P * float((left - left.mean()).square().sum()))
            assert expected > 1e-3
            assert found.se == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize("prompts", [100, 400])
def test_influence_function_and_jackknife_differ_by_one_over_the_number_of_prompts(prompts):
    old, new, _ = draw(B=2 * prompts, last=2 * prompts // 4)
    group = torch.arange(2 * prompts) // 2
    for name in ("snis", "per_decision"):
        both = [
            estimate(lambda q, name=name: entropy_change(q, old, new, name), group, method)
            for method in ("jackknife", "influence")
        ]
        for jackknife, influence in zip(*both, strict=True):
            assert jackknife.value == influence.value
            gap = (jackknife.influence - influence.influence).norm() / influence.influence.norm()
            assert 0 < float(gap) < 10 / prompts
            assert jackknife.se == pytest.approx(influence.se, rel=10 / prompts)


def test_the_method_goes_by_the_number_of_prompts():
    assert error_method(torch.arange(JACKKNIFE_PROMPTS)) == "jackknife"
    assert error_method(torch.arange(JACKKNIFE_PROMPTS + 1)) == "influence"
    assert error_method(torch.arange(4 * JACKKNIFE_PROMPTS) // 4) == "jackknife"


@pytest.mark.parametrize("method", ["jackknife", "influence"])
def test_the_error_of_a_mean_is_that_of_its_prompts_means(method):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(20, 1, generator=g, dtype=torch.float64) + 0.3 * torch.randn(
        20, 2, generator=g, dtype=torch.float64
    )
    group = 7 + 3 * torch.arange(20).repeat_interleave(2)  # any numbers will do
    shuffled = torch.randperm(40, generator=g)
    flat, group = x.flatten()[shuffled], group[shuffled]
    expected = float(x.mean(1).std() / 20**0.5)
    (found,) = estimate(lambda q: ((q * flat).sum() / q.sum()).reshape(1), group, method)
    direct = mean_by_prompt(flat, group)
    for one in (found, direct):
        assert one.value == pytest.approx(float(x.mean()), abs=1e-14)
        assert one.se == pytest.approx(expected, rel=1e-12)
        half = float(stats.t.ppf(0.975, one.df)) * expected
        assert one.ci95 == pytest.approx((one.value - half, one.value + half), rel=1e-4)
        assert len(one.influence) == 20
    torch.testing.assert_close(found.influence, direct.influence)
    naive = mean_by_prompt(flat, torch.arange(40))
    assert naive.se < 0.8 * expected


def test_degrees_of_freedom_are_those_of_the_estimated_variance():
    """Twice the squared mean over the variance of the variance, for light tails and heavy ones."""
    g = torch.Generator().manual_seed(3)
    P = 200
    for power, kappa in ((1, 3.0), (3, 46.2)):  # a normal variable, and its cube
        x = torch.randn(4000, P, generator=g, dtype=torch.float64) ** power
        expected = 2 / ((kappa - 3) / P + 2 / (P - 1))
        variance = x.var(1)
        assert float(2 * variance.mean() ** 2 / variance.var()) == pytest.approx(expected, rel=0.35)
        dfs = torch.tensor([Estimate(0.0, (row - row.mean()) / P).df for row in x[:500]])
        # a sample's kurtosis falls short of a heavy tail's, so that its degrees of freedom are rather too many
        assert expected * 0.9 < float(dfs.median()) < (1.01 if power == 1 else 4.0) * max(expected, P / 12)
        assert float(dfs.min()) >= 1.0
        assert float(dfs.max()) <= P - 1


def test_one_prompt_that_carries_the_error_leaves_two_degrees_of_freedom():
    influence = torch.full((64,), -1 / 63, dtype=torch.float64)
    influence[5] = 1.0
    one = Estimate(0.5, influence)
    assert one.df == pytest.approx(2.0, rel=0.1)
    assert one.ci95[1] - one.value == pytest.approx(4.3 * one.se, rel=0.1)
    assert Estimate(0.5, torch.zeros(64, dtype=torch.float64)).ci95 == (0.5, 0.5)
    assert math.isinf(Estimate(0.5, torch.zeros(1, dtype=torch.float64)).ci95[1])


@pytest.mark.parametrize("method", ["jackknife", "influence"])
def test_a_paired_difference_has_the_error_of_the_difference(method):
    g = torch.Generator().manual_seed(2)
    common = torch.randn(30, generator=g, dtype=torch.float64)
    x, y = (common + 0.1 * torch.randn(30, generator=g, dtype=torch.float64) for _ in range(2))

    def means(q):
        return torch.stack([(q * x).sum(), (q * y).sum()]) / q.sum()

    a, b = estimate(means, torch.arange(30), method)
    assert (a - b).value == pytest.approx(float((x - y).mean()), abs=1e-14)
    assert (a - b).se == pytest.approx(float((x - y).std() / 30**0.5), rel=1e-12)
    assert (a + b).value == pytest.approx(float((x + y).mean()), abs=1e-14)
    assert (a + b).se == pytest.approx(float((x + y).std() / 30**0.5), rel=1e-12)
    assert (a - b).se < 0.3 * a.se
    assert a.scaled(-3.0).value == -3.0 * a.value
    assert a.scaled(-3.0).se == pytest.approx(3.0 * a.se)


def test_a_single_prompt_has_no_error():
    (found,) = estimate(lambda q: q.sum().reshape(1) / q.sum(), torch.zeros(4, dtype=torch.int64))
    assert found.se == math.inf
    assert Estimate(1.0, torch.zeros(1)).se == math.inf


@pytest.mark.parametrize("method", ["jackknife", "influence"])
def test_nothing_is_nan_where_a_position_is_reached_once_or_never(method, monkeypatch):
    """One sequence at the last position, two at the one before, an empty response, a prompt with one position."""
    monkeypatch.setattr("probe.estimators.estimate.error_method", lambda group: method)
    old, new, tangents = draw(B=6, T=5, last=1)
    lengths = torch.tensor([5, 4, 0, 1, 2, 2])
    mask = torch.arange(5) < lengths.unsqueeze(1)
    old, new = (TokenScores(s.logprob * mask, s.entropy * mask, mask) for s in (old, new))
    tangents = TokenTangents(tangents.logprob * mask, tangents.entropy * mask)
    for group in (torch.arange(6), torch.tensor([0, 0, 1, 1, 2, 2])):
        for name, both in estimators(old, new, tangents, group).items():
            for found in both:
                assert math.isfinite(found.value), name
                assert math.isfinite(found.se), name
                assert found.se > 0, name


@pytest.mark.parametrize("estimator", ["snis", "per_decision"])
@pytest.mark.parametrize("method", ["jackknife", "influence"])
def test_a_sequence_with_nearly_all_the_weight_can_be_left_out(estimator, method):
    """Log-weights hundreds of nats apart: what is left is finite, and is what the rest gives by itself."""
    old, new, _ = draw(B=8, T=4, last=8)
    shift = torch.zeros(8, 1, dtype=torch.float64)
    shift[3] = 900.0
    new = TokenScores(old.logprob + shift * torch.tensor([1.0, 0, 0, 0]), new.entropy, new.mask)
    found = estimate(lambda q: entropy_change(q, old, new, estimator), torch.arange(8), method)
    for k, one in enumerate(found):
        assert math.isfinite(one.value)
        assert math.isfinite(one.se), (estimator, method)
        if method == "jackknife":
            keep = torch.arange(8) != 3
            ones = torch.ones(7, dtype=torch.float64)
            alone = entropy_change(
                ones, *without(old, new, TokenTangents(old.logprob, old.entropy), keep)[:2], estimator
            )
            others = torch.stack(
                [
                    entropy_change((torch.arange(8) != p).double(), old, new, estimator)
                    for p in range(8)
                    if p != 3
                ]
            )
            values = torch.cat([others, alone.unsqueeze(0)])[:, k]
            assert one.se == pytest.approx(math.sqrt(7 / 8 * float((values - values.mean()).square().sum())))


def test_a_fresh_sample_is_paired_by_prompt():
    """The part of the entropy that a prompt fixes cancels between the two samples."""
    g = torch.Generator().manual_seed(3)
    of_prompt = torch.rand(40, 1, generator=g, dtype=torch.float64)

    def sample(shift, T):
        h = of_prompt + shift + 0.01 * torch.rand(40, 1, generator=g, dtype=torch.float64)
        h = torch.cat([h, torch.zeros(40, T - 1)], dim=1)
        mask = torch.zeros(40, T, dtype=torch.bool)
        mask[:, 0] = True
        return TokenScores(-h, h, mask)

    old, fresh, group = sample(0.0, 3), sample(0.2, 2), torch.arange(40)
    paired = resampled_change(old, group, fresh, group)
    unpaired = resampled_change(old, group, fresh, group + 40)
    for one, other in zip(paired, unpaired, strict=True):
        assert one.value == pytest.approx(0.2, abs=0.01)
        assert one.value == pytest.approx(other.value, abs=1e-14)
        assert other.se > 10 * one.se
    expected = float((fresh.sequence_entropy - old.sequence_entropy).std() / 40**0.5)
    assert paired.sequence.se == pytest.approx(expected, rel=1e-9)
