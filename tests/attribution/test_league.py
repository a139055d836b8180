"""Ranks of predictors: numbers that can be worked out by hand, errors in distribution, and formulas one by one."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from probe.attribution.league import CEILING, TARGETS, _of_the_whole, _row, _scored, league, spearman
from probe.attribution.predictors import PREDICTORS, predictor
from probe.attribution.predictors.registry import Predictor
from probe.attribution.tokens import UpdateTokens
from probe.phases.coupling import coupled, drawn_states
from tests.support.attributed import attributed, batches
from tests.support.enumerable import tiny_policy


def draw(n, rho, g, ties=False):
    x = torch.randn(n, 2, generator=g, dtype=torch.float64)
    a, b = x[:, 0], rho * x[:, 0] + math.sqrt(1 - rho**2) * x[:, 1]
    return (a.round(decimals=1), b.round(decimals=1)) if ties else (a, b)


@pytest.mark.parametrize("ties", [False, True])
def test_it_is_the_rank_correlation_of_scipy(ties):
    a, b = draw(200, 0.6, torch.Generator().manual_seed(0), ties)
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, rel=1e-12)
    assert spearman(a, torch.ones_like(a)) == 0.0


def test_intervals_over_prompts_cover_the_correlation():
    """Tokens of a prompt share a part of their scores; Spearman's of normal variables is `6 / pi asin(rho / 2)`."""
    g, prompts, each, rho = torch.Generator().manual_seed(1), 24, 30, 0.5
    truth, covered, repetitions = 6 / math.pi * math.asin(rho / 2), 0, 300
    member = torch.arange(prompts).repeat_interleave(each)
    for _ in range(repetitions):
        a, b = draw(prompts * each, rho, g)
        shared_a, shared_b = draw(prompts, rho, g)
        a, b = a + 0.5 * shared_a[member], b + 0.5 * shared_b[member]
        found = _row("x", "deltaH1", a, b, True, member, ()).spearman
        covered += found.ci95[0] <= truth <= found.ci95[1]
    error = math.sqrt(0.95 * 0.05 / repetitions)
    assert 0.93 - 2 * error <= covered / repetitions <= 0.97 + 2 * error


def test_recall_sign_and_what_is_captured():
    truth = torch.tensor([10.0, -8.0, 1.0, 1.0, -1.0, 1.0, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64)
    score = torch.tensor([-9.0, -7.0, 0.1, 0.1, 0.1, 0.1, 0.0, 0.1, 0.1, 0.1], dtype=torch.float64)
    found = _row("x", "deltaH1", score, truth, True, torch.arange(10), ())
    assert found.sign_agreement == pytest.approx(7 / 9)  # the first and the fifth are wrong, one says nothing
    assert found.recall == (1.0, 1.0)
    assert found.captured == pytest.approx(10 / float(truth.abs().sum()))
    unsigned = _row("x", "deltaH1", score.abs(), truth, False, torch.arange(10), ())
    assert unsigned.sign_agreement is None
    assert unsigned.spearman.value == pytest.approx(spearman(score.abs(), truth.abs()))


@pytest.mark.parametrize("signed", [True, False])
def test_equal_scores_rank_nothing(signed):
    truth, member = torch.arange(1.0, 11.0, dtype=torch.float64), torch.arange(10)
    assert _row("x", "own_state", torch.full_like(truth, -1.0), truth, signed, member, ()).spearman is None
    signs = torch.ones_like(truth)
    signs[::2] = -1.0
    found = _row("x", "own_state", signs, truth, signed, member, ()).spearman
    assert (found is not None) == signed  # sizes that are all 1 rank nothing either


def test_errors_of_both_sources_add_up():
    a, b, both = (
        _scored(0.5, *left) for left in (([0.4, 0.6],), ([0.45, 0.55],), ([0.4, 0.6], [0.45, 0.55]))
    )
    assert both.se == pytest.approx(math.hypot(a.se, b.se), rel=1e-9)
    assert _scored(0.5).se == math.inf
    # a source of which one value is there says nothing about its error
    assert _scored(0.5, [0.4, 0.6], [0.5]).ci95 == (-1.0, 1.0)


def test_the_ceiling_is_what_a_perfect_predictor_reaches():
    """Contributions with the error of E in them: the true ones rank them as the two halves say."""
    g, n, P = torch.Generator().manual_seed(3), 20_000, 8
    truth = torch.randn(n, generator=g, dtype=torch.float64)
    parts = truth / P + 0.5 * torch.randn(P, n, generator=g, dtype=torch.float64) / math.sqrt(P)
    halves = spearman(parts[::2].sum(0), parts[1::2].sum(0))
    assert _of_the_whole(halves) == pytest.approx(spearman(truth, parts.sum(0)), abs=0.02)


def made(monkeypatch):
    policy = tiny_policy(monkeypatch, layers=2)
    E, U = batches(policy, prompts=16, G=4, E=200)
    step = attributed(policy, E, U)
    places = drawn_states(step.U, 30, seed=1)
    return step, coupled(step.taker, places, step.weights, lambda done, total: None)


def test_the_table_has_every_predictor_against_every_target(monkeypatch):
    step, states = made(monkeypatch)
    rows = league(step.found, step.tokens, states, PREDICTORS)
    for target in TARGETS:
        of_target = {(row.name, row.signed) for row in rows if row.target == target}
        expected = {(name, one.signed) for name, one in PREDICTORS.items()}
        ceiling = set() if target == "own_state" else {(CEILING, True), (CEILING, False)}
        assert of_target == expected | ceiling
    assert all(-1 <= row.spearman.ci95[0] <= row.spearman.value <= row.spearman.ci95[1] <= 1 for row in rows)


def test_the_exact_contributions_win(monkeypatch):
    """A predictor that is the truth has correlation 1 with it and captures what there is to capture."""
    step, states = made(monkeypatch)
    exact = step.found.by_token()
    scale = step.weights.policy.abs() / step.tokens.A.abs().clamp_min(1e-300)
    oracle = Predictor("oracle", "here", lambda tokens: exact[1] / scale.clamp_min(1e-300), "the truth")
    row = next(
        row for row in league(step.found, step.tokens, states, {"oracle": oracle}) if row.name == "oracle"
    )
    assert row.spearman.value == pytest.approx(1.0)
    assert row.sign_agreement == 1.0
    assert row.recall == (1.0, 1.0)
    largest = exact[1][step.weights.policy != 0].abs().sort(descending=True).values
    count = max(1, round(0.1 * len(largest)))
    assert row.captured == pytest.approx(float(largest[:count].sum() / largest.sum()))


def test_formulas_for_a_softmax_rank_the_change_of_the_own_state(monkeypatch):
    """And are worse at what tokens do to all states."""
    step, states = made(monkeypatch)
    rows = {(row.name, row.target): row for row in league(step.found, step.tokens, states, PREDICTORS)}
    own = rows["discriminator_centred", "own_state"]
    assert own.spearman.value > 0.6
    assert own.spearman.value > rows["discriminator_centred", "deltaH1"].spearman.value


def test_the_last_layer_is_exact_where_only_it_is_trained(monkeypatch):
    """With nothing but the output layer trainable and P constant its kernel ranks state-fixed changes perfectly."""
    policy = tiny_policy(monkeypatch, lora=False)
    for name, p in policy.model.named_parameters():
        p.requires_grad_(name == "lm_head.weight")
    E, U = batches(policy, prompts=16, G=4, E=100)
    optimizer = torch.optim.Adam(list(policy.parameters.values()), lr=1e-3, betas=(0.0, 1 - 1e-9), eps=1e4)
    step = attributed(policy, E, U, optimizer=optimizer, max_grad_norm=None)
    rows = league(step.found, step.tokens, None, {"last_layer": PREDICTORS["last_layer"]})
    row = next(row for row in rows if (row.name, row.target) == ("last_layer", "state_fixed"))
    assert row.spearman.value > 0.9999
    assert row.sign_agreement == 1.0


def test_few_tokens_are_not_ranked(monkeypatch):
    policy = tiny_policy(monkeypatch)
    E, U = batches(policy, prompts=1, G=2)
    step = attributed(policy, E, U.subset(torch.tensor([0])))
    assert league(step.found, step.tokens, None, PREDICTORS) == []


def test_a_new_predictor_is_a_function_with_a_decorator():
    @predictor("made_up", "here")
    def made_up(tokens):
        """It claims something."""
        return tokens.A

    try:
        assert PREDICTORS["made_up"].claim == "It claims something."
        with pytest.raises(ValueError, match="expected a new name"):
            predictor("made_up", "here")(made_up)
        with pytest.raises(ValueError, match="expected a docstring"):
            predictor("silent", "here")(lambda tokens: tokens.A)
    finally:
        del PREDICTORS["made_up"]


def tokens_of(l, h, A, group=None, old=None):
    logprob, entropy = (torch.tensor([x], dtype=torch.float64).T for x in (l, h))
    B = len(l)
    return UpdateTokens(
        mask=torch.ones(B, 1, dtype=torch.bool),
        logprob=logprob,
        entropy=entropy,
        old_logprob=logprob if old is None else torch.tensor([old], dtype=torch.float64).T,
        advantages=torch.tensor(A, dtype=torch.float64),
        expected_discriminator=torch.zeros(B, 1, dtype=torch.float64),
        group=torch.arange(B) if group is None else torch.tensor(group),
    )


def test_formulas_by_hand():
    tokens = tokens_of([math.log(0.5), math.log(0.25)], [0.6, 0.9], [1.0, -2.0])
    cov = PREDICTORS["cov"].score(tokens).flatten()
    half = math.log(2) / 2
    assert cov.tolist() == pytest.approx([-1.5 * half, -1.5 * half])
    S = [0.5 * (0.6 + math.log(0.5)), 0.25 * (0.9 + math.log(0.25))]
    assert PREDICTORS["discriminator"].score(tokens).flatten().tolist() == pytest.approx([-S[0], 2 * S[1]])
    omega = [0.5 * (math.log(0.5) + 0.6), -2 * 0.75 * (math.log(0.25) + 0.9)]  # times the ratio, which is 1
    assert PREDICTORS["steer"].score(tokens).flatten().tolist() == pytest.approx([-x for x in omega])
    assert PREDICTORS["positive_advantage"].score(tokens).flatten().tolist() == [-1.0, 0.0]
    assert PREDICTORS["proxy_gradient"].score(tokens).flatten().tolist() == pytest.approx([0.5, 1.5])
    assert PREDICTORS["stare"].score(tokens).flatten().tolist() == [1.0, -2.0]
    assert PREDICTORS["sure_tokens"].score(tokens_of([-0.01], [0.1], [3.0])).item() == -3.0
    with pytest.raises(ValueError, match="expected derivatives along"):
        PREDICTORS["last_layer"].score(tokens)
