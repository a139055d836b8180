"""Whose doing the entropy change of a state is: an identity, and the case that published formulas are for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from probe.attribution.coupling import TERMS, TOKEN_TERMS, Row, coupling, split_row
from probe.attribution.predictors import PREDICTORS
from probe.estimators.loss_settings import LossSettings
from probe.estimators.losses import LossWeights
from probe.parameters import inner_product
from probe.phases.coupling import coupled, drawn_states, influence
from probe.scoring import score_tokens
from probe.scoring.scores import TokenTangents
from tests.support.attributed import attributed, batches
from tests.support.enumerable import naive_scores, tiny_policy


def no_progress(done, total):
    return None


def made_step(monkeypatch, **options):
    policy = tiny_policy(monkeypatch, **options)
    E, U = batches(policy, prompts=6, G=3)
    g = torch.Generator().manual_seed(4)
    scores = score_tokens(policy, U)
    U = replace(
        U, old_logprobs=scores.logprob + 0.2 * torch.randn(U.mask.shape, generator=g, dtype=torch.float64)
    )
    reference = scores.logprob + 0.3 * torch.randn(U.mask.shape, generator=g, dtype=torch.float64)
    settings = LossSettings(loss="grpo", kl_coef=0.3, entropy_coef=0.2)
    return attributed(policy, E, U, settings, reference=reference)


@pytest.mark.parametrize("lora", [True, False])
def test_the_terms_of_a_state_add_up_to_its_change(monkeypatch, lora):
    """Identity 9, against the gradient of that state's entropy by plain autograd."""
    made = made_step(monkeypatch, lora=lora)
    U, policy = made.U, made.policy
    places = drawn_states(made.U, 10, seed=1)
    found = coupled(made.taker, places, made.weights, no_progress)
    assert found is not None
    assert len(found.rows) == 10
    _, h = naive_scores(policy, U)
    parameters = list(policy.parameters.values())
    for row in found.rows:
        X = torch.autograd.grad(h[row.sequence, row.position], parameters, retain_graph=True)
        by_name = dict(zip(policy.parameters, X, strict=True))
        whole = inner_product(by_name.__getitem__, made.update.step)
        size = sum(map(abs, row.terms.values()))
        assert row.total == pytest.approx(whole, abs=1e-12 * size)
        assert sum(row.terms.values()) == pytest.approx(whole, abs=1e-12 * size)
        assert set(row.terms) == set(TERMS)
    for name in ("own", "response", "group", "others", "kl", "entropy_bonus", "momentum", "decay"):
        assert any(row.terms[name] != 0 for row in found.rows), name
    assert found.completeness < 1e-12


def test_terms_are_sums_over_the_tokens_they_are_named_after(monkeypatch):
    made = made_step(monkeypatch)
    g = torch.Generator().manual_seed(0)
    U, shape = made.U, made.U.mask.shape
    dl, dh = (torch.randn(shape, generator=g, dtype=torch.float64) * U.mask for _ in range(2))
    i, t = (int(x) for x in U.mask.nonzero()[7])
    row = split_row(i, t, TokenTangents(dl, dh), made.weights, U.group, {"momentum": 1.0, "decay": 2.0}, 3.0)
    c = made.weights.policy * dl
    sums = {"own": 0.0, "response": 0.0, "group": 0.0, "others": 0.0}
    for j, s in U.mask.nonzero().tolist():
        same = bool(U.group[j] == U.group[i])
        name = "own" if (j, s) == (i, t) else "response" if j == i else "group" if same else "others"
        sums[name] += float(c[j, s])
    for name, value in sums.items():
        assert row.terms[name] == pytest.approx(value, rel=1e-12, abs=1e-15)
    assert row.terms["entropy_bonus"] == pytest.approx(float((made.weights.bonus * dh).sum()), rel=1e-12)
    whole = split_row(
        i, None, TokenTangents(dl, dh), made.weights, U.group, {"momentum": 0.0, "decay": 0.0}, 0.0
    )
    assert whole.terms["own"] == pytest.approx(sums["own"] + sums["response"], rel=1e-12)
    assert whole.terms["response"] == 0.0
    assert torch.allclose(whole.by_response, c.sum(1))


def made_row(sequence, own, rest, momentum=0.0):
    terms = (
        dict.fromkeys(TERMS, 0.0) | dict(zip(TOKEN_TERMS, (own, *rest), strict=True)) | {"momentum": momentum}
    )
    return Row(sequence, 0, terms, sum(terms.values()), torch.zeros(3))


def test_shares_are_ratios_of_means():
    rows = [made_row(0, 1.0, (0.0, 0.0, 1.0)), made_row(1, -2.0, (1.0, 0.0, 3.0), momentum=8.0)]
    found = coupling(rows, torch.tensor([0, 1]))
    assert found.size_share["own"].value == pytest.approx(3 / 8)
    assert sum(one.value for one in found.size_share.values()) == pytest.approx(1.0)
    assert found.mean_share["own"].value == pytest.approx((1 / 2 + 2 / 6) / 2)
    assert sum(one.value for one in found.mean_share.values()) == pytest.approx(1.0)
    assert found.share["own"].value == pytest.approx(-1 / 4)
    assert sum(one.value for one in found.share.values()) == pytest.approx(1.0)
    assert found.size["momentum"].value == pytest.approx(4.0)
    assert found.mean["total"].value == pytest.approx((2 + 10) / 2)
    assert found.sign_agreement.value == pytest.approx(0.5)
    assert 0 < found.size_share["own"].se < math.inf


def test_states_of_one_prompt_have_no_error():
    found = coupling(
        [made_row(0, 1.0, (0.0, 0.0, 1.0)), made_row(1, 1.0, (0.0, 0.0, 2.0))], torch.tensor([4, 4])
    )
    assert found.size_share["own"].se == math.inf


def test_states_without_a_token_that_acts_have_no_shares():
    rows = [made_row(k, 0.0, (0.0, 0.0, 0.0), momentum=1.0) for k in range(2)]
    found = coupling(rows, torch.tensor([0, 1]))
    assert math.isnan(found.size_share["own"].value)
    assert found.sign_agreement is None
    assert found.size["momentum"].value == 1.0
    # one prompt alone has them: a value without an error
    rows = [made_row(0, 1.0, (1.0, 0.0, 0.0)), made_row(1, 0.0, (0.0, 0.0, 0.0))]
    found = coupling(rows, torch.tensor([0, 1]))
    assert found.size_share["own"].value == pytest.approx(0.5)
    assert found.size_share["own"].se == math.inf


def test_without_states_there_is_nothing(monkeypatch):
    made = made_step(monkeypatch)
    assert coupled(made.taker, [], made.weights, no_progress) is None
    with pytest.raises(ValueError, match="expected at least one sampled state"):
        coupling([], torch.zeros(0))


def test_in_a_table_the_own_token_does_it_all():
    """A softmax whose states share nothing: the formula of the literature is the own term, up to a positive factor.

    Of one policy-gradient step in the logits themselves, `dz = A (1_y - p)`.
    """
    g = torch.Generator().manual_seed(2)
    z = torch.randn(40, 9, generator=g, dtype=torch.float64).mul(2).requires_grad_()
    y = torch.randint(0, 9, (40,), generator=g)
    A = torch.randn(40, generator=g, dtype=torch.float64)
    logp = z.log_softmax(-1)
    l, h = logp.gather(1, y.unsqueeze(1)).squeeze(1), -(logp.exp() * logp).sum(1)
    (of_h,) = torch.autograd.grad(h.sum(), z, retain_graph=True)
    (of_l,) = torch.autograd.grad((A * l).sum(), z)
    exact = (of_h * of_l).sum(1).detach()
    p = logp.exp().detach()
    S = p * (h.detach().unsqueeze(1) + logp.detach())

    class Tokens:
        pass

    tokens = Tokens()
    tokens.A, tokens.discriminator = A, S.gather(1, y.unsqueeze(1)).squeeze(1)
    tokens.expected_discriminator = (p * S).sum(1)
    assert torch.allclose(PREDICTORS["discriminator_centred"].score(tokens), exact, rtol=1e-10, atol=1e-14)


def test_influence_has_a_row_for_each_response_of_the_evaluation_batch(monkeypatch):
    made = made_step(monkeypatch)
    matrix, rows = influence(made.taker, 5, 3, made.weights, no_progress)
    assert matrix.shape == (5, len(made.U))
    assert len(set(rows.tolist())) == 5
    i = int(rows[0])
    _, h = naive_scores(made.policy, made.E.subset(torch.tensor([i])))
    X = torch.autograd.grad(h.sum(), list(made.policy.parameters.values()))
    by_name = dict(zip(made.policy.parameters, X, strict=True))
    tangents = made.taker.along(by_name)
    assert torch.allclose(matrix[0], (made.weights.policy * tangents.logprob).sum(1), rtol=1e-9, atol=1e-15)
    assert influence(made.taker, 0, 3, made.weights, no_progress) == (None, None)


def test_the_weights_are_those_of_the_loss(monkeypatch):
    made = made_step(monkeypatch)
    assert isinstance(made.weights, LossWeights)
    assert torch.allclose(
        made.weights.policy + made.weights.kl, made.update.loss_weights, rtol=1e-12, atol=1e-15
    )
    assert torch.equal(made.weights.bonus, made.update.entropy_weights)
