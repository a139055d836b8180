"""Control variates: mean exactly zero, less variance, and nothing learnt from the sequences they are used on."""

from __future__ import annotations

import itertools
import math
import operator
from dataclasses import replace

import pytest
import torch
from transformers.models.qwen2 import modeling_qwen2

import probe.estimators.control_variates as module
from probe.estimators.control_variates import control_variates
from probe.estimators.prediction import token_first_order
from probe.scoring import Policy
from tests.support.enumerable import float64_norm, tiny_model
from tests.support.exact import (
    enumerate_prompts,
    enumeration,
    random_step,
    sample_rows,
    take_scores,
    take_tangents,
)


def make(cap, prompts, size=0.006):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", float64_norm)
        policy = Policy(tiny_model(0), temperature=0.8, microbatch_size=256, head_chunk_tokens=5000)
        batch = enumerate_prompts(prompts, cap)
        U = torch.randint(len(batch), (64,), generator=torch.Generator().manual_seed(17))
        return enumeration(policy, batch, random_step(policy, size), basis_from=U)


@pytest.fixture(scope="module")
def space():
    return make(4, [(0, 1), (1, 2), (2, 2)])


@pytest.fixture(scope="module")
def small():
    return make(2, [(0, 1)])


def of_rows(space, rows, group, earlier=()):
    return control_variates(
        take_scores(space.old, rows),
        take_tangents(space.first, rows),
        space.sampled_features[rows],
        group,
        earlier,
    )


def statistics(space, prompts, seed):
    """What an earlier batch leaves behind."""
    g = torch.Generator().manual_seed(seed)
    return of_rows(space, *sample_rows(space.probability, prompts, 1, space.batch.group, g)).statistics


def test_with_coefficients_from_elsewhere_the_mean_is_exactly_zero(space, monkeypatch):
    """Over the whole space, weighted by probabilities, for any coefficients and any trust in states."""

    def anything(sums, earlier, states, tokens):
        g = torch.Generator().manual_seed(1)
        root = torch.randn(states, states, generator=g, dtype=torch.float64)
        coefficients = torch.randn(states * tokens, 2, generator=g, dtype=torch.float64)
        return module._Fit(coefficients, root @ root.T)

    monkeypatch.setattr(module, "_solve", anything)
    rows = torch.arange(len(space.batch))
    found = of_rows(space, rows, rows)
    for Z in (found.own[:, 0], found.own[:, 1]):
        assert float((space.probability * Z.abs()).sum()) > 0.01
        assert abs(float((space.probability * Z).sum())) < 1e-12


@pytest.mark.parametrize(("prompts", "carried"), [(2, True), (3, False)])
def test_the_estimate_is_unbiased_over_all_samples(small, prompts, carried):
    """Every sample of two or three responses, each one's coefficients from the others (and from earlier batches).

    The order of a sample does not matter. From a single other response there is nothing to learn: it is the baseline.
    """
    earlier = [statistics(small, 30, seed) for seed in (1, 2)] if carried else []
    mean_Z, mean, size, weight = torch.zeros(2).double(), 0.0, 0.0, 0.0
    for chosen in itertools.combinations_with_replacement(range(len(small.batch)), prompts):
        rows, group = torch.tensor(chosen), torch.arange(prompts)
        orders = math.factorial(prompts) / math.prod(math.factorial(chosen.count(i)) for i in set(chosen))
        p = orders * float(small.probability[rows].prod())
        found = of_rows(small, rows, group, earlier)
        Z = torch.stack([found.own[:, 0].mean(), found.own[:, 1].mean()])
        old, first = take_scores(small.old, rows), take_tangents(small.first, rows)
        causal = token_first_order(old, first, group).total.sequence.value
        mean_Z, mean = mean_Z + p * Z, mean + p * (causal - float(Z[0]))
        size, weight = size + p * float(Z[0].abs()), weight + p
    assert weight == pytest.approx(1.0, abs=1e-12)
    assert size > 1e-4
    assert float(mean_Z.abs().max()) < 1e-10
    assert mean == pytest.approx(float(small.slope[0]), abs=1e-10)


def shrunk(space, rows, group, earlier=()):
    """What is subtracted from deltaH1 of some rows."""
    old, first = take_scores(space.old, rows), take_tangents(space.first, rows)

    def on(some):
        return token_first_order(old.rows(some), first.rows(some), group[some]).total

    return of_rows(space, rows, group, earlier).shrunk(old, group, on)


@pytest.mark.parametrize("prompts", [3, 4])
def test_the_shrunk_estimate_is_unbiased_over_all_samples(small, prompts):
    """How much is subtracted of a sequence's control is worked out on other prompts, with functions that know neither.

    Of three prompts two are left to compare estimate and control on, of two only one: then nothing is subtracted.
    """
    earlier = [statistics(small, 30, seed) for seed in (1, 2)]
    mean_Z, size, weight, partly = 0.0, 0.0, 0.0, 0
    for chosen in itertools.combinations_with_replacement(range(len(small.batch)), prompts):
        rows, group = torch.tensor(chosen), torch.arange(prompts)
        orders = math.factorial(prompts) / math.prod(math.factorial(chosen.count(i)) for i in set(chosen))
        p = orders * float(small.probability[rows].prod())
        Z = shrunk(small, rows, group, earlier).sequence.value
        whole = float(of_rows(small, rows, group, earlier).own[:, 0].mean())
        partly += abs(Z) > 1e-9 and abs(Z - whole) > 1e-9
        mean_Z, size, weight = mean_Z + p * Z, size + p * abs(Z), weight + p
    assert weight == pytest.approx(1.0, abs=1e-12)
    assert size > 1e-5
    assert partly > 10
    assert abs(mean_Z) < 1e-10
    two = torch.tensor([0, 1])
    assert [z.value for z in shrunk(small, two, torch.arange(2), earlier)] == [0.0, 0.0]


def test_the_fit_s_part_of_the_error_is_what_influences_lack(small, monkeypatch):
    """Over all samples, controls of different folds covary by the mean of `S_kl S_lk`; the squares are no less."""
    monkeypatch.setattr(module, "shrinkage", lambda estimate, control: 1.0)
    covariance, crossed, squared = 0.0, 0.0, 0.0
    for chosen in itertools.combinations_with_replacement(range(len(small.batch)), 4):
        rows, group = torch.tensor(chosen), torch.arange(4)
        orders = math.factorial(4) / math.prod(math.factorial(chosen.count(i)) for i in set(chosen))
        p = orders * float(small.probability[rows].prod())
        own = of_rows(small, rows, group).own[:, 0] / 4
        S = shrunk(small, rows, group).sequence.fit.reshape(4, 4)
        assert float(S.diagonal().abs().max()) == 0.0
        covariance += p * float(own.sum().square() - own.square().sum())
        crossed += p * float((S * S.T).sum())
        squared += p * float(S.square().sum())
    assert crossed == pytest.approx(covariance, rel=1e-8, abs=1e-18)
    assert squared > 1e-12
    assert squared >= crossed


def test_a_control_that_fits_badly_is_left_out(space):
    """With functions that predict nothing the error stays what it is; subtracted whole they would multiply it."""
    g = torch.Generator().manual_seed(5)
    rows, group = sample_rows(space.probability, 64, 1, space.batch.group, g)
    old, first = take_scores(space.old, rows), take_tangents(space.first, rows)
    bad = of_rows(space, rows, group)
    noise = torch.randn(bad.values.shape[1:], generator=g, dtype=torch.float64)
    bad = replace(bad, values=(10 * noise).expand_as(bad.values))
    causal = token_first_order(old, first, group).total

    def on(some):
        return token_first_order(old.rows(some), first.rows(some), group[some]).total

    whole = module._means(module._by_estimand(bad.own, old), group)
    for c, z, w in zip(causal, bad.shrunk(old, group, on), whole, strict=True):
        assert (c - z).se < 1.1 * c.se
        assert (c - w).se > 2 * c.se


def test_a_large_sample_has_less_variance(space):
    g = torch.Generator().manual_seed(0)
    rows, group = sample_rows(space.probability, 2000, 1, space.batch.group, g)
    old, first = take_scores(space.old, rows), take_tangents(space.first, rows)
    causal = token_first_order(old, first, group).total
    Z = shrunk(space, rows, group)
    better = causal.with_other(operator.sub, Z)
    assert (better.sequence.se / causal.sequence.se) ** 2 < 0.6
    assert better.token.se < 1.01 * causal.token.se
    for one, exact in zip(better, space.slope.tolist(), strict=True):
        assert abs(one.value - exact) < 4 * one.se


def test_earlier_batches_help_a_small_one(space):
    """The spread of estimates from 24 prompts, over 100 of them."""
    earlier = [statistics(space, 400, seed) for seed in range(100, 105)]
    g = torch.Generator().manual_seed(0)
    found = {"causal": [], "own": [], "carried": []}
    for _ in range(100):
        rows, group = sample_rows(space.probability, 24, 1, space.batch.group, g)
        old, first = take_scores(space.old, rows), take_tangents(space.first, rows)
        causal = token_first_order(old, first, group).total.sequence.value
        found["causal"].append(causal)
        found["own"].append(causal - float(of_rows(space, rows, group).own[:, 0].mean()))
        found["carried"].append(causal - float(of_rows(space, rows, group, earlier).own[:, 0].mean()))
    spread = {name: float(torch.tensor(x).std()) for name, x in found.items()}
    assert spread["carried"] < 0.85 * spread["causal"]
    assert spread["carried"] < 0.95 * spread["own"]


def test_a_prompt_never_learns_from_itself(space):
    """Neither from a sequence's own score, nor from other responses to the prompt; other prompts do learn."""
    g = torch.Generator().manual_seed(3)
    rows, group = sample_rows(space.probability, 8, 3, space.batch.group, g)
    first, old = take_tangents(space.first, rows), take_scores(space.old, rows)
    psi = space.sampled_features[rows]

    def of(tangents, scores=old):
        return control_variates(scores, tangents, psi, group).own[:, 0]

    dl = first.logprob.clone()
    dl[1] *= 3.0  # the second response of prompt 0
    other = of(replace(first, logprob=dl))
    before = of(first)
    assert float(before.abs().min()) > 0
    fold = group % module.FOLDS
    same = (fold == fold[1]) & (torch.arange(24) != 1)
    assert int(same.sum()) == 5
    assert torch.equal(other[same], before[same])
    assert bool((other[fold != fold[1]] != before[fold != fold[1]]).all())
    # its own entropy still to come does not enter: only what the prefix knows
    h = old.entropy.clone()
    last = int(old.mask[1].sum()) - 1
    h[1, last] += 5.0
    changed = of(first, replace(old, entropy=h))
    assert torch.equal(changed[same], before[same])


def test_statistics_add_up_and_do_not_depend_on_the_size_of_the_step(space):
    g = torch.Generator().manual_seed(5)
    rows, group = sample_rows(space.probability, 60, 1, space.batch.group, g)
    found = of_rows(space, rows, group).statistics
    assert found.tokens == int(space.batch.mask[rows].sum())
    F = len(found.cross)
    assert found.gram.shape == (F, F)
    assert found.cross.shape == (F, 2)
    torch.testing.assert_close(found.gram, found.gram.T)
    first = take_tangents(space.first, rows)
    larger = replace(
        first,
        logprob=100 * first.logprob,
        entropy=100 * first.entropy,
        expected_features=100 * first.expected_features,
    )
    scaled = control_variates(take_scores(space.old, rows), larger, space.sampled_features[rows], group)
    torch.testing.assert_close(scaled.statistics.gram, found.gram)
    torch.testing.assert_close(scaled.statistics.cross, found.cross)
    torch.testing.assert_close(scaled.own[:, 0], 100 * of_rows(space, rows, group).own[:, 0])


def test_statistics_are_made_where_they_are_asked_for(space, monkeypatch):
    """The parts of a step have control variates of their own, which nobody learns from."""
    made: list[int] = []

    def counted(sums):
        made.append(len(sums))
        return statistics_of(sums)

    statistics_of = module._statistics
    monkeypatch.setattr(module, "_statistics", counted)
    g = torch.Generator().manual_seed(5)
    found = of_rows(space, *sample_rows(space.probability, 60, 1, space.batch.group, g))
    assert module.FOLDS not in made  # fits leave out one fold or two
    assert found.statistics is found.statistics
    assert made.count(module.FOLDS) == 1


def test_more_sequences_than_a_chunk_holds_are_the_same(space, monkeypatch):
    g = torch.Generator().manual_seed(6)
    rows, group = sample_rows(space.probability, 50, 2, space.batch.group, g)
    whole = of_rows(space, rows, group)
    monkeypatch.setattr(module, "CHUNK", 7)
    parts = of_rows(space, rows, group)
    torch.testing.assert_close(parts.own[:, 0], whole.own[:, 0], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(parts.statistics.gram, whole.statistics.gram)


def test_no_step_gives_zero(space):
    rows = torch.arange(20)
    first = take_tangents(space.first, rows)
    zero = replace(
        first,
        logprob=0 * first.logprob,
        entropy=0 * first.entropy,
        expected_features=0 * first.expected_features,
    )
    found = control_variates(take_scores(space.old, rows), zero, space.sampled_features[rows], rows)
    assert float(found.own[:, 0].abs().max()) == 0.0
    assert bool(torch.isfinite(found.statistics.gram).all())


def test_empty_responses_are_no_trouble(space):
    """One among many, and one of two prompts: nothing to learn from is no control variate, not an error."""
    for rows in (torch.arange(12), torch.arange(2)):
        old, first = take_scores(space.old, rows), take_tangents(space.first, rows)
        mask = old.mask.clone()
        mask[1] = False
        on = mask.double()
        old = replace(old, mask=mask, entropy=old.entropy * on, logprob=old.logprob * on)
        first = replace(
            first,
            logprob=first.logprob * on,
            entropy=first.entropy * on,
            expected_features=first.expected_features * on.unsqueeze(-1),
        )
        found = control_variates(old, first, space.sampled_features[rows], rows)
        assert bool(torch.isfinite(found.own[:, 0]).all())
        assert float(found.own[:, 0][1]) == 0.0


def test_refusals(space):
    rows = torch.arange(6)
    old, first, psi = (
        take_scores(space.old, rows),
        take_tangents(space.first, rows),
        space.sampled_features[rows],
    )
    with pytest.raises(ValueError, match="expected scores and tangents with features"):
        control_variates(replace(old, state_features=None), first, psi, rows)
    with pytest.raises(ValueError, match="expected scores and tangents with features"):
        control_variates(old, replace(first, expected_features=None), psi, rows)
    with pytest.raises(ValueError, match="at least two prompts"):
        control_variates(old, first, psi, torch.zeros(6, dtype=torch.int64))
