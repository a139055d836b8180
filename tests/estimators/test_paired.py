"""Differences of two updates on one E: exact against one estimator of the difference, and in distribution."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from transformers.models.qwen2 import modeling_qwen2

from probe.estimators.entropy_change import entropy_change
from probe.estimators.estimate import Estimate, estimate
from probe.estimators.ground_truth import change_by, entropy_before
from probe.estimators.paired import independent_difference, level_elsewhere, paired_difference
from probe.logs.distributions import RECORD_DIGITS, rounded
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
from tests.support.experiment import estimates_of, exact_values

PROMPTS = [(0, 1), (1, 2), (2, 2), (3, 0), (1, 0)]
REPETITIONS, SIZE, SEED = 300, 64, 5
NAMES = ("causal", "causal+cv", "per_decision", "per_decision+cv", "snis")


@pytest.fixture(scope="module")
def spaces():
    """One policy with three updates: a step, twice that step (another learning rate), and that of another U.

    Two draws of U share what earlier updates have left in the moments, most of the step, and differ in the rest.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", float64_norm)
        policy = Policy(tiny_model(0), temperature=0.8, microbatch_size=256, head_chunk_tokens=5000)
        batch = enumerate_prompts(PROMPTS)
        basis = torch.randint(len(batch), (64,), generator=torch.Generator().manual_seed(17))
        first, own = (random_step(policy, 0.006, seed) for seed in (0, 3))
        steps = [
            first,
            {name: 2 * step for name, step in first.items()},
            {name: 0.9 * step + 0.4 * own[name] for name, step in first.items()},
        ]
        yield [enumeration(policy, batch, step, basis) for step in steps]


def draw(spaces, g, responses=1):
    """Estimates of every update on one E, and its groups."""
    one = spaces[0]
    rows, group = sample_rows(one.probability, SIZE, responses, one.batch.group, g)
    found = [
        estimates_of(
            take_scores(space.old, rows),
            take_scores(space.new, rows),
            take_tangents(space.first, rows),
            space.sampled_features[rows],
            group,
            controls=True,
        )
        for space in spaces
    ]
    return rows, group, found


def through_a_log(one, group):
    """An estimate as a log keeps it: influences of responses with nine digits."""
    shares = torch.tensor(rounded(one.by_response(group), RECORD_DIGITS), dtype=torch.float64)
    return Estimate.from_responses(one.value, shares, group, one.fit)


@pytest.mark.parametrize("responses", [1, 3])
def test_the_difference_is_the_estimator_of_the_difference(spaces, responses):
    """The jackknife of `f_B - f_A` itself: one function of the weights of the responses."""
    a, b = spaces[0], spaces[2]
    rows, group, found = draw(spaces, torch.Generator().manual_seed(1), responses)
    old, new = take_scores(a.old, rows), [take_scores(space.new, rows) for space in (a, b)]

    def both(q):
        return entropy_change(q, old, new[1], "snis") - entropy_change(q, old, new[0], "snis")

    for k, expected in enumerate(estimate(both, group)):
        mine, other = (through_a_log(list(one["snis"])[k], group) for one in (found[0], found[2]))
        difference = paired_difference(mine, other)
        assert difference.value == pytest.approx(expected.value, rel=1e-12)
        assert difference.se == pytest.approx(expected.se, rel=1e-6)
        assert difference.df == pytest.approx(expected.df, rel=1e-5)
        assert difference.ci95 == pytest.approx(expected.ci95, rel=1e-5)


def test_the_entropy_of_another_policy_is_that_of_the_measured_change(spaces):
    """A policy's entropy on another's E, less the other's, is deltaH_true (snis) of the step between them."""
    space = spaces[2]
    rows, group = sample_rows(space.probability, SIZE, 2, space.batch.group, torch.Generator().manual_seed(2))
    old, new = take_scores(space.old, rows), take_scores(space.new, rows)
    log_w = new.sequence_logprob - old.sequence_logprob
    there = level_elsewhere(log_w, new.sequence_entropy, new.lengths.double(), group)
    here = entropy_before(old, group)
    for mine, other, expected in zip(here, there, change_by("snis", old, new, group), strict=True):
        found = paired_difference(mine, other)
        assert found.value == pytest.approx(expected.value, rel=1e-10)
        assert found.se == pytest.approx(expected.se, rel=1e-10)


def test_an_error_of_a_fit_is_subtracted_where_the_folds_are_one(spaces):
    _, _, (a, b, _) = draw(spaces, torch.Generator().manual_seed(3))
    mine, other = a["causal+cv"].token, b["causal+cv"].token
    assert len(mine.fit) == len(other.fit) == 25
    together, apart = (paired_difference(mine, other, same_fit) for same_fit in (True, False))
    influences = math.sqrt(SIZE / (SIZE - 1)) * float((other.influence - mine.influence).norm())
    assert together.se == pytest.approx(math.hypot(influences, float((other.fit - mine.fit).norm())))
    assert apart.se == pytest.approx(math.hypot(influences, float(other.fit.norm()), float(mine.fit.norm())))
    assert together.value == apart.value


def test_independent_errors_are_welchs():
    """Against the t test of two samples with unequal variances."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(11, generator=g, dtype=torch.float64)
    y = 3 * torch.randn(30, generator=g, dtype=torch.float64) + 1
    known = [(float(v.mean()), float(v.std() / len(v) ** 0.5), len(v) - 1.0) for v in (x, y)]
    found = independent_difference(*known)
    expected = scipy.stats.ttest_ind(y.numpy(), x.numpy(), equal_var=False)
    assert found.value / found.se == pytest.approx(expected.statistic)
    assert found.df == pytest.approx(expected.df)
    interval = expected.confidence_interval(0.95)
    assert found.ci95 == pytest.approx((interval.low, interval.high), rel=1e-3)


def test_influences_of_responses_are_those_of_their_prompts():
    group = torch.tensor([5, 2, 5, 9])
    one = Estimate(1.0, torch.tensor([0.5, -0.75, 0.25], dtype=torch.float64))
    assert one.by_response(group).tolist() == [-0.375, 0.5, -0.375, 0.25]
    again = Estimate.from_responses(1.0, one.by_response(group), group)
    assert again.influence.tolist() == one.influence.tolist()
    with pytest.raises(ValueError, match="expected an estimate over 2 prompts, found one over 3"):
        one.by_response(torch.tensor([1, 2]))


@pytest.mark.slow
@pytest.mark.parametrize(("other", "what"), [(1, "two learning rates"), (2, "two U")])
def test_intervals_cover_the_exact_difference(spaces, capsys, other, what):
    """At 95 %, within what 300 draws leave open, each way through the columns of a log; and pairing gains."""
    low, high = scipy.stats.binom.ppf([5e-5, 1 - 5e-5], REPETITIONS, 0.95) / REPETITIONS
    exact = [exact_values(spaces[k].slope, spaces[k].change) for k in (0, other)]
    g = torch.Generator().manual_seed(SEED)
    inside = {(name, k): 0 for name in NAMES for k in (0, 1)}
    errors = {key: [] for key in inside}
    gains = {key: [] for key in inside}
    for _ in range(REPETITIONS):
        _, group, found = draw([spaces[0], spaces[other]], g)
        for name, k in inside:
            mine, b = (through_a_log(list(one[name])[k], group) for one in found)
            difference = paired_difference(mine, b)
            truth = exact[1][name][k] - exact[0][name][k]
            inside[name, k] += difference.ci95[0] <= truth <= difference.ci95[1]
            errors[name, k].append((difference.value - truth) / difference.se)
            gains[name, k].append(math.hypot(mine.se, b.se) / difference.se)
    with capsys.disabled():
        print(f"\n{what}: covered, spread of errors in standard errors, gain of pairing")
        for key, count in inside.items():
            z = torch.tensor(errors[key], dtype=torch.float64)
            print(f"  {key[0]:16} {'token' if key[1] else 'sequence':9} {count / REPETITIONS:6.1%}"
                  f" {float(z.std()):6.2f} {sorted(gains[key])[REPETITIONS // 2]:6.1f}")  # fmt: skip
    for key, count in inside.items():
        assert low <= count / REPETITIONS <= high, key
        assert sorted(gains[key])[REPETITIONS // 2] > 1, key


@pytest.mark.slow
def test_intervals_cover_the_difference_of_two_policies_on_the_same_prompts(spaces):
    """Each policy draws responses of its own; prompts are what they have in common."""
    space = spaces[1]
    number = int(space.batch.group.max()) + 1
    policies = [(space.old, space.probability), (space.new, space.new.sequence_logprob.exp())]
    exact = []
    for scores, probability in policies:
        N, T = (
            float((probability * x).sum() / probability.sum())
            for x in (scores.sequence_entropy, scores.lengths.double())
        )
        exact.append((N, N / T))
    low, high = scipy.stats.binom.ppf([5e-5, 1 - 5e-5], REPETITIONS, 0.95) / REPETITIONS
    g, inside, gains = torch.Generator().manual_seed(SEED), [0, 0], [[], []]
    for _ in range(REPETITIONS):
        drawn = torch.randint(number, (SIZE,), generator=g)
        found = []
        for scores, probability in policies:
            within = torch.where(space.batch.group == drawn.unsqueeze(1), probability, 0.0)
            rows = torch.multinomial(within, 1, generator=g).flatten()
            found.append(list(entropy_before(take_scores(scores, rows), torch.arange(SIZE))))
        for k, (mine, other) in enumerate(zip(*found, strict=True)):
            difference = paired_difference(mine, other, same_fit=False)
            inside[k] += difference.ci95[0] <= exact[1][k] - exact[0][k] <= difference.ci95[1]
            gains[k].append(math.hypot(mine.se, other.se) / difference.se)
    for count, gain in zip(inside, gains, strict=True):
        assert low <= count / REPETITIONS <= high
        assert sorted(gain)[REPETITIONS // 2] > 1
