"""The ground truth: its parts, what is reported, and in distribution."""

from __future__ import annotations

import math

import pytest
import torch

from probe.errors.exceptions import NumericalError
from probe.estimand import SEQUENCE, TOKEN
from probe.estimators.entropy_change import reweighted_entropy
from probe.estimators.ground_truth import resampled_change, reweighted_change
from probe.estimators.noise_floor import noise_floor
from probe.scoring import TokenScores, score_tokens
from probe.snapshot import parameters_at
from tests.support.enumerable import all_sequences, exact_entropies, tiny_policy
from tests.support.exact import random_step, take_scores

NAMES = ("snis", "per_decision")


def before_and_after(monkeypatch, eta):
    """Exact entropies and scores of every sequence at two sets of weights."""
    policy, batch = tiny_policy(monkeypatch), all_sequences()
    after = {
        n: p.detach() + d
        for (n, p), d in zip(policy.parameters.items(), random_step(policy, eta).values(), strict=True)
    }
    with torch.no_grad():
        exact_old, old = exact_entropies(policy, batch), score_tokens(policy, batch)
        with parameters_at(policy.parameters, after):
            exact_new = exact_entropies(policy, batch)
    return exact_old, exact_new, old, score_tokens(policy.at(after), batch)


def test_sampled_estimates_centre_on_the_exact_change(monkeypatch):
    """500 repetitions of 256 sequences: both estimators and estimands, mean within 4 standard errors."""
    exact_old, exact_new, old, new = before_and_after(monkeypatch, 0.02)
    g = torch.Generator().manual_seed(1)
    found = {(name, k): [] for name in NAMES for k in (SEQUENCE, TOKEN)}
    for _ in range(500):
        index = torch.multinomial(exact_old[2], 256, replacement=True, generator=g)
        truth = reweighted_change(take_scores(old, index), take_scores(new, index))
        for name, k in found:
            found[name, k].append(truth.estimates[name][k])
    for (_, estimand), estimates in found.items():
        k = (SEQUENCE, TOKEN).index(estimand)
        exact = float(exact_new[k] - exact_old[k])
        values = torch.tensor([e.value for e in estimates], dtype=torch.float64)
        assert abs(exact) > 0.01
        assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 500**0.5
        mean_se = sum(e.se for e in estimates) / 500
        assert mean_se == pytest.approx(float(values.std()), rel=0.15)


def test_several_responses_of_a_prompt_are_not_independent(monkeypatch):
    """Doubling every sequence, as one group each, must not shrink the standard error; without groups it does."""
    _, _, old, new = before_and_after(monkeypatch, 0.02)
    index = torch.arange(len(old.mask))
    twice = torch.cat([index, index])
    once = reweighted_change(old, new)
    grouped = reweighted_change(take_scores(old, twice), take_scores(new, twice), group=twice)
    naive = reweighted_change(take_scores(old, twice), take_scores(new, twice))
    for name in NAMES:
        for k in (SEQUENCE, TOKEN):
            one = once.estimates[name][k]
            assert grouped.estimates[name][k].value == pytest.approx(one.value, rel=1e-9)
            assert grouped.estimates[name][k].se == pytest.approx(one.se, rel=1e-9)
            assert naive.estimates[name][k].se == pytest.approx(one.se / 2**0.5, rel=0.02)


def test_per_decision_follows_the_definition():
    """Against a loop over positions, in which finished sequences keep their final weight."""
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(4) < torch.tensor([1, 4, 2, 3, 1]).unsqueeze(1)
    lr, h = (torch.randn(5, 4, generator=g, dtype=torch.float64) * mask for _ in range(2))
    N = T = 0.0
    for t in range(4):
        rho = [math.exp(float(lr[i, :t].sum())) for i in range(5)]
        N += sum(r * float(h[i, t]) for i, r in enumerate(rho)) / sum(rho)
        T += sum(r * float(mask[i, t]) for i, r in enumerate(rho)) / sum(rho)
    found = reweighted_entropy(torch.ones(5, dtype=torch.float64), lr, h, mask, "per_decision")
    assert found.tolist() == pytest.approx([N, N / T], rel=1e-12)
    w = lr.sum(1).exp()
    N, T = float((w * h.sum(1)).sum() / w.sum()), float((w * mask.sum(1)).sum() / w.sum())
    found = reweighted_entropy(torch.ones(5, dtype=torch.float64), lr, h, mask, "snis")
    assert found.tolist() == pytest.approx([N, N / T], rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_shift_of_all_weights_cancels(name):
    """Also one that would overflow."""
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(6, 3, dtype=torch.bool)
    lr, h = (torch.randn(6, 3, generator=g, dtype=torch.float64) for _ in range(2))
    q = torch.rand(6, generator=g, dtype=torch.float64)
    expected = reweighted_entropy(q, lr, h, mask, name)
    for shift in (1000.0, -1000.0):
        found = reweighted_entropy(3 * q, lr + shift, h, mask, name)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_what_is_reported(monkeypatch):
    _, _, old, new = before_and_after(monkeypatch, 0.02)
    default, snis = reweighted_change(old, new), reweighted_change(old, new, reported="snis")
    assert default.reported == "per_decision"
    assert default.change.sequence.value == default.estimates["per_decision"].sequence.value
    assert snis.change.token.value == snis.estimates["snis"].token.value
    assert default.change.sequence.value != snis.change.sequence.value
    assert [one.value for one in default.H_orig] == pytest.approx(
        (float(old.entropy.sum()) / len(old.mask), float(old.entropy.sum() / old.mask.sum()))
    )
    other = snis.estimates["snis"]
    more = default.with_estimate("per_decision+cv", other, reported=False)
    assert (more.reported, more.change.token) == ("per_decision", default.change.token)
    more = default.with_estimate("resample", other, reported=True)
    assert (more.reported, more.change.token.value) == ("resample", other.token.value)
    assert set(more.estimates) == {"snis", "per_decision", "resample"}
    assert default.scores_new is new


def test_clipping_is_a_row_of_its_own(monkeypatch):
    _, _, old, new = before_and_after(monkeypatch, 0.02)
    plain = reweighted_change(old, new)
    assert plain.clipped_fraction is None
    assert "snis_clipped" not in plain.estimates
    logw = plain.weights.log_weights
    limit = float(logw.abs().median())
    clipped = reweighted_change(old, new, clip=limit)
    assert clipped.clipped_fraction == pytest.approx(float((logw.abs() > limit).double().mean()))
    assert 0.3 < clipped.clipped_fraction < 0.6
    w = logw.clamp(-limit, limit).exp()
    expected = float((w * new.sequence_entropy).sum() / w.sum() - old.sequence_entropy.mean())
    assert clipped.estimates["snis_clipped"].sequence.value == pytest.approx(expected, rel=1e-12)
    for name in NAMES:
        assert clipped.estimates[name].sequence.value == plain.estimates[name].sequence.value
    loose = reweighted_change(old, new, clip=100.0)
    assert loose.clipped_fraction == 0.0
    assert loose.estimates["snis_clipped"].token.value == plain.estimates["snis"].token.value


def test_no_update_gives_exactly_zero(monkeypatch):
    _, _, old, _ = before_and_after(monkeypatch, 0.02)
    truth = reweighted_change(old, old)
    for both in truth.estimates.values():
        assert [e.value for e in both] == pytest.approx([0.0, 0.0], abs=1e-13)
        assert [e.se for e in both] == pytest.approx([0.0, 0.0], abs=1e-13)
    assert truth.weights.ess == pytest.approx(len(old.mask))
    assert truth.weights.pareto_k is None


def test_the_noise_floor_bounds_what_rounding_makes_of_no_change(monkeypatch):
    _, _, old, _ = before_and_after(monkeypatch, 0.02)
    group = torch.arange(len(old.mask))
    assert max(noise_floor(old, old, old, group)) < 1e-13
    g = torch.Generator().manual_seed(0)

    def rounded(size):
        l, h = (
            x + size * torch.randn(x.shape, generator=g, dtype=x.dtype) * old.mask
            for x in (old.logprob, old.entropy)
        )
        return TokenScores(l, h, old.mask)

    floors = [noise_floor(old, rounded(1e-6), rounded(1e-6), group) for _ in range(40)]
    changes = [reweighted_change(old, rounded(1e-6)) for _ in range(40)]
    for estimand in (SEQUENCE, TOKEN):
        inside = sum(
            abs(c.estimates["per_decision"][estimand].value) <= f[estimand]
            for c, f in zip(changes, floors, strict=True)
        )
        assert inside >= 35
    larger = noise_floor(old, rounded(1e-3), rounded(1e-3), group)
    assert larger.sequence > 100 * floors[0].sequence


def test_refusals():
    one = TokenScores(
        torch.zeros(2, 1).double(), torch.ones(2, 1).double(), torch.ones(2, 1, dtype=torch.bool)
    )
    with pytest.raises(ValueError, match="same batch"):
        reweighted_change(one, TokenScores(one.logprob[:1], one.entropy[:1], one.mask[:1]))
    bad = TokenScores(one.logprob - float("inf"), one.entropy, one.mask)
    with pytest.raises(NumericalError, match="finite log-weights"):
        reweighted_change(one, bad)
    q = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected 'snis' or 'per_decision'"):
        reweighted_entropy(q, one.logprob, one.entropy, one.mask, "other")
    with pytest.raises(ValueError, match="clipping with 'snis' only"):
        reweighted_entropy(q, one.logprob, one.entropy, one.mask, "per_decision", clip=1.0)


def test_a_fresh_sample_may_be_of_another_width_and_size():
    def scores(rows):
        T = max(map(len, rows))
        h = torch.tensor([[*row, *[0.0] * (T - len(row))] for row in rows], dtype=torch.float64)
        return TokenScores(-h, h, h > 0)

    old, fresh = scores([[1.0, 2.0], [3.0]]), scores([[1.0], [2.0, 2.0, 2.0], [4.0]])
    sequence, token = resampled_change(old, torch.tensor([0, 1]), fresh, torch.tensor([0, 1, 1]))
    assert sequence.value == pytest.approx(11 / 3 - 6 / 2)
    assert token.value == pytest.approx(11 / 5 - 6 / 3)
