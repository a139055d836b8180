"""The second-order term by two ways, and against the exact second derivative."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from probe.estimators.curvature import (
    corrected_curvature,
    eta_10,
    nested_curvature,
    symmetric_curvature,
)
from probe.estimators.entropy_change import entropy_change, first_derivative, second_derivative
from probe.estimators.estimate import Estimate
from probe.estimators.groups import random_groups
from probe.scoring import score_tokens
from probe.scoring.differences import DifferencePair, difference_pair
from probe.scoring.forward_mode import forward_tangents, second_order_tangents
from tests.support.enumerable import all_sequences, tiny_policy
from tests.support.exact import exact, exact_derivatives, random_step, take_scores, take_tangents

NAMES = ("snis", "per_decision")


@pytest.mark.parametrize(("lora", "layers"), [(True, 2), (False, 1)])
def test_over_the_whole_space_it_is_the_exact_second_derivative(monkeypatch, lora, layers):
    """Both estimators, weighted by probabilities, against double backward through the exact entropies."""
    policy, batch = tiny_policy(monkeypatch, lora=lora, layers=layers), all_sequences(cap=3)
    step = random_step(policy, 0.05)
    with torch.no_grad():
        _, q = exact(policy, batch)
    _, expected = exact_derivatives(policy, batch, step)
    first, second = second_order_tangents(policy, batch, step)
    assert float(expected.abs().min()) > 1e-4
    for name in NAMES:
        found = second_derivative(q, score_tokens(policy, batch), first, second, name) / 2
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", NAMES)
def test_nested_and_symmetric_agree(monkeypatch, estimator):
    """Values, and errors over prompts, on a sample."""
    policy, batch = tiny_policy(monkeypatch, layers=2), all_sequences()
    rows = torch.multinomial(
        torch.ones(len(batch)), 40, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    group = torch.arange(40) // 2
    step = random_step(policy, 0.002)
    first, second = second_order_tangents(policy, batch, step)
    scores = score_tokens(policy, batch)
    E = take_scores(scores, rows)
    nested = nested_curvature(E, take_tangents(first, rows), take_tangents(second, rows), group, estimator)
    scale = 3e-3
    pair = difference_pair(policy, batch.subset(rows), step, scale)
    for one, other in zip(nested, symmetric_curvature(E, pair, group, estimator), strict=True):
        assert abs(one.value) > 1e-5
        assert other.value == pytest.approx(one.value, rel=1e-5)
        assert other.se == pytest.approx(one.se, rel=1e-4)
        assert one.se > 0
    # at scale 1 the even part of the change holds the fourth order too: near, not equal
    whole = symmetric_curvature(E, difference_pair(policy, batch.subset(rows), step, 1.0), group, estimator)
    assert whole.sequence.value == pytest.approx(nested.sequence.value, rel=0.5)
    assert whole.sequence.value != pytest.approx(nested.sequence.value, rel=1e-6)


def test_both_default_to_per_decision(monkeypatch):
    policy, batch = tiny_policy(monkeypatch), all_sequences(cap=2)
    step, scores, group = random_step(policy, 0.02), score_tokens(policy, batch), torch.arange(len(batch))
    first, second = second_order_tangents(policy, batch, step)
    pair = difference_pair(policy, batch, step, 0.01)
    for default, named in (
        (
            nested_curvature(scores, first, second, group),
            nested_curvature(scores, first, second, group, NAMES[1]),
        ),
        (symmetric_curvature(scores, pair, group), symmetric_curvature(scores, pair, group, NAMES[1])),
    ):
        assert [e.value for e in default] == [e.value for e in named]


@pytest.fixture
def space(monkeypatch):
    """A policy's whole space of sequences: probabilities, scores, derivatives and both sides of a step."""
    policy, batch = tiny_policy(monkeypatch, layers=2), all_sequences(cap=3)
    step = random_step(policy, 0.001)
    with torch.no_grad():
        _, q = exact(policy, batch)
    return (
        q,
        score_tokens(policy, batch),
        forward_tangents(policy, batch, step),
        difference_pair(policy, batch, step, 1.0),
    )


def of_rows(space, rows):
    """Scores, derivatives and both sides of a sample."""
    _, scores, first, pair = space
    sides = (take_scores(side, rows) for side in (pair.plus, pair.minus))
    return (
        take_scores(scores, rows),
        take_tangents(first, rows),
        DifferencePair(*sides, pair.scale, pair.error),
    )


@pytest.mark.parametrize("estimator", NAMES)
def test_the_first_derivative_is_that_of_the_change(space, estimator):
    q, scores, first, _ = space
    small = 1e-5

    def change(s):
        moved = replace(
            scores, logprob=scores.logprob + s * first.logprob, entropy=scores.entropy + s * first.entropy
        )
        return entropy_change(q, scores, moved, estimator)

    expected = (change(small) - change(-small)) / (2 * small)
    torch.testing.assert_close(first_derivative(q, scores, first, estimator), expected, rtol=1e-7, atol=1e-12)


def test_with_both_sides_of_all_it_is_the_even_part(space):
    rows = torch.multinomial(space[0], 60, replacement=True, generator=torch.Generator().manual_seed(1))
    scores, first, pair = of_rows(space, rows)
    group = torch.arange(60) // 3
    found, _ = corrected_curvature(scores, first, pair.plus, pair, torch.arange(60), group)
    for one, other in zip(found, symmetric_curvature(scores, pair, group), strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-9)
        assert one.se == pytest.approx(other.se, rel=1e-9)


def test_a_part_of_the_lower_side_is_known_with_its_error(space):
    """In distribution: the even part of the whole space over many samples, and nearly as precise as with all of it."""
    q, scores, _, pair = space
    sides = [entropy_change(q, scores, side, "per_decision") for side in (pair.plus, pair.minus)]
    expected = (sides[0] + sides[1]) / 2
    draws, B, generator = 120, 240, torch.Generator().manual_seed(2)
    off, ses, whole = torch.zeros(draws, 2), torch.zeros(draws, 2), torch.zeros(draws, 2)
    for draw in range(draws):
        rows = torch.multinomial(q, B, replacement=True, generator=generator)
        own, first, sides_of_E = of_rows(space, rows)
        group = torch.arange(B) // 2
        few = random_groups(group, 60)
        found, _ = corrected_curvature(own, first, sides_of_E.plus, sides_of_E, few, group)
        off[draw] = torch.tensor([one.value for one in found]) - expected
        ses[draw] = torch.tensor([one.se for one in found])
        whole[draw] = torch.tensor([one.se for one in symmetric_curvature(own, sides_of_E, group)])
    z = off.mean(0) / (off.std(0) / draws**0.5)
    assert float(z.abs().max()) < 4  # a bias of order 1 / B is a small part of the error
    torch.testing.assert_close(ses.square().mean(0).sqrt(), off.std(0), rtol=0.25, atol=0)
    assert bool((ses.mean(0) < 1.5 * whole.mean(0)).all())


def resolved(value, se):
    """An estimate with this standard error, over two prompts."""
    half = se / 2
    return Estimate(value, torch.tensor([half, -half], dtype=torch.float64))


def test_eta_10_is_where_the_second_order_is_a_tenth_of_the_first():
    assert resolved(1.0, 0.3).se == pytest.approx(0.3)
    for deltaH1, deltaH2 in ((0.2, -0.005), (-0.2, 0.005), (0.2, 0.005)):
        eta = eta_10(1e-3, deltaH1, resolved(deltaH2, 1e-4))
        factor = eta / 1e-3
        assert abs(deltaH2) * factor**2 == pytest.approx(0.1 * abs(deltaH1) * factor)
    assert eta_10(1e-3, 0.2, resolved(0.005, 1e-4)) == pytest.approx(4e-3)


@pytest.mark.parametrize(
    ("value", "se", "there"),
    [
        (0.0, 0.0, False),
        # two prompts have one degree of freedom: a t of 12.7
        (1.0, 0.078, True),
        (1.0, 0.079, False),
        (-1.0, 0.078, True),
        (-1.0, 0.079, False),
        (float("nan"), 0.1, False),
        (1.0, float("nan"), False),
    ],
)
def test_eta_10_is_none_where_the_second_order_is_not_resolved(value, se, there):
    found = eta_10(1e-3, 0.2, resolved(value, se))
    assert (found is not None) == there


def test_a_single_prompt_resolves_nothing():
    assert eta_10(1e-3, 0.2, Estimate(1.0, torch.zeros(1))) is None
