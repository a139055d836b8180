"""The ground truth against exact values and in distribution."""

from __future__ import annotations

import pytest
import torch

from probe.errors import NumericalError
from probe.estimators.snis import snis
from probe.scoring import TokenScores, score_tokens
from probe.snapshot import parameters_at
from tests.enumerable import all_sequences, exact_entropies, tiny_policy


def shifted(policy, eta, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        n: p.detach() + eta * torch.randn(p.shape, generator=g, dtype=p.dtype)
        for n, p in policy.parameters.items()
    }


def before_and_after(monkeypatch, eta):
    """Exact entropies and scores of every sequence at two sets of weights."""
    policy, batch = tiny_policy(monkeypatch), all_sequences()
    exact_old, old = exact_entropies(policy, batch), score_tokens(policy, batch)
    with parameters_at(policy.parameters, shifted(policy, eta)):
        exact_new, new = exact_entropies(policy, batch), score_tokens(policy, batch)
    return exact_old, exact_new, old, new


def take(scores, index):
    return TokenScores(scores.logprob[index], scores.entropy[index], scores.mask[index])


def test_sampled_estimates_centre_on_the_exact_change_and_their_intervals_cover_it(monkeypatch):
    """1,000 repetitions of 256 sequences: both estimands, mean within 4 standard errors, coverage 93 to 97 %."""
    exact_old, exact_new, old, new = before_and_after(monkeypatch, 0.02)
    probability = exact_old[2].detach()
    g = torch.Generator().manual_seed(1)
    found = {"sequence": [], "token": []}
    for _ in range(1000):
        index = torch.multinomial(probability, 256, replacement=True, generator=g)
        truth = snis(take(old, index), take(new, index))
        for name in found:
            found[name].append(getattr(truth, name))
    for k, name in enumerate(found):
        exact = float((exact_new[k] - exact_old[k]).detach())
        deltas = torch.tensor([c.delta for c in found[name]], dtype=torch.float64)
        assert abs(exact) > 0.01
        assert abs(float(deltas.mean()) - exact) < 4 * float(deltas.std()) / 1000**0.5
        covered = sum(c.ci95[0] <= exact <= c.ci95[1] for c in found[name]) / 1000
        assert 0.93 <= covered <= 0.97
        mean_se = sum(c.se for c in found[name]) / 1000
        assert mean_se == pytest.approx(float(deltas.std()), rel=0.15)


def test_several_responses_of_a_prompt_are_not_independent(monkeypatch):
    """Doubling every sequence, as one group each, must not shrink the standard error; without groups it does."""
    _, _, old, new = before_and_after(monkeypatch, 0.02)
    index = torch.arange(len(old.mask))
    twice = torch.cat([index, index])
    once = snis(old, new)
    grouped = snis(take(old, twice), take(new, twice), group=twice)
    naive = snis(take(old, twice), take(new, twice))
    for name in ("sequence", "token"):
        assert getattr(grouped, name).se == pytest.approx(getattr(once, name).se, rel=1e-9)
        assert getattr(naive, name).se == pytest.approx(getattr(once, name).se / 2**0.5, rel=0.01)


def test_diagnostics_are_those_of_mean_one_weights():
    l = torch.tensor([[0.0], [0.0], [0.0], [0.0]], dtype=torch.float64)
    h, mask = torch.ones_like(l), torch.ones(4, 1, dtype=torch.bool)
    new = (
        torch.log(torch.tensor([[1.0], [1.0], [2.0], [4.0]], dtype=torch.float64)) + 500.0
    )  # any shift cancels
    truth = snis(TokenScores(l, h, mask), TokenScores(new, h, mask))
    assert truth.w_max == pytest.approx(2.0)
    assert truth.w_min == pytest.approx(0.5)
    assert truth.ess == pytest.approx(64 / 22)
    assert float(truth.weights.mean()) == pytest.approx(1.0)


def test_no_update_gives_exactly_zero(monkeypatch):
    _, _, old, _ = before_and_after(monkeypatch, 0.02)
    truth = snis(old, old)
    assert truth.sequence.delta == 0.0
    assert truth.token.delta == 0.0
    assert truth.ess == pytest.approx(len(old.mask))


def test_refusals():
    one = TokenScores(
        torch.zeros(2, 1).double(), torch.ones(2, 1).double(), torch.ones(2, 1, dtype=torch.bool)
    )
    with pytest.raises(ValueError, match="same batch"):
        snis(one, TokenScores(one.logprob[:1], one.entropy[:1], one.mask[:1]))
    bad = TokenScores(one.logprob - float("inf"), one.entropy, one.mask)
    with pytest.raises(NumericalError, match="finite log-weights"):
        snis(one, bad)
