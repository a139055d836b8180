"""The importance-sampling estimators as functions: their derivatives, and what they are invariant to."""

from __future__ import annotations

import pytest
import torch

from probe.estimators.entropy_change import (
    entropy,
    entropy_change,
    reweighted_entropy,
    second_derivative,
)
from probe.scoring import TokenScores
from probe.scoring.scores import TokenTangents
from tests.support.exact import first_derivative

NAMES = ("snis", "per_decision")


def draw(B=9, T=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g)
    l, h, dl, dh, ddl, ddh = (torch.randn(B, T, generator=g, dtype=torch.float64) * mask for _ in range(6))
    q = torch.rand(B, generator=g, dtype=torch.float64)
    return q, TokenScores(l, h.abs(), mask), TokenTangents(dl, dh), TokenTangents(ddl, ddh)


def moved(scores, first, second, s):
    """Scores on a parabola."""
    return TokenScores(
        scores.logprob + s * first.logprob + s**2 / 2 * second.logprob,
        scores.entropy + s * first.entropy + s**2 / 2 * second.entropy,
        scores.mask,
    )


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_those_of_the_change_along_a_path(name):
    """By autograd through the path, and by fourth-order differences."""
    q, scores, first, second = draw()
    s = torch.zeros((), dtype=torch.float64, requires_grad=True)
    change = entropy_change(q, scores, moved(scores, first, second, s), name)
    slopes = [torch.autograd.grad(x, s, create_graph=True)[0] for x in change]
    bends = [torch.autograd.grad(x, s, retain_graph=True)[0] for x in slopes]
    found = first_derivative(q, scores, first, name)
    assert found.tolist() == pytest.approx([float(x.detach()) for x in slopes], rel=1e-12)
    found_second = second_derivative(q, scores, first, second, name)
    assert found_second.tolist() == pytest.approx([float(x) for x in bends], rel=1e-11)
    assert min(found.abs().min(), found_second.abs().min()) > 1e-3

    def at(x):
        return entropy_change(q, scores, moved(scores, first, second, x), name)

    e = 1e-3
    difference = (8 * (at(e) - at(-e)) - (at(2 * e) - at(-2 * e))) / (12 * e)
    assert found.tolist() == pytest.approx(difference.tolist(), rel=1e-8)
    e = 5e-3
    bent = (16 * (at(e) + at(-e)) - (at(2 * e) + at(-2 * e)) - 30 * at(0.0)) / (12 * e**2)
    assert found_second.tolist() == pytest.approx(bent.tolist(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_weights_count_sequences(name):
    """Weight 2 is the sequence twice, weight 0 is its absence, and the scale of the weights does not matter."""
    _, scores, first, second = draw(B=6)
    q = torch.tensor([2.0, 1.0, 0.0, 1.0, 3.0, 0.0], dtype=torch.float64)
    index = torch.tensor([0, 0, 1, 3, 4, 4, 4])

    def take(x):
        if isinstance(x, TokenScores):
            return TokenScores(x.logprob[index], x.entropy[index], x.mask[index])
        return TokenTangents(x.logprob[index], x.entropy[index])

    ones, new = torch.ones(7, dtype=torch.float64), moved(scores, first, second, 0.3)
    for weighted, plain in (
        (entropy(q, scores.entropy, scores.mask), entropy(ones, take(scores).entropy, take(scores).mask)),
        (entropy_change(q, scores, new, name), entropy_change(ones, take(scores), take(new), name)),
        (
            first_derivative(5 * q, scores, first, name),
            first_derivative(ones, take(scores), take(first), name),
        ),
        (
            second_derivative(q, scores, first, second, name),
            second_derivative(ones, take(scores), take(first), take(second), name),
        ),
    ):
        torch.testing.assert_close(weighted, plain, rtol=1e-12, atol=1e-14)


def test_the_estimators_agree_where_they_must():
    """On responses of one token, before which nothing happened, and without a change of log-probs."""
    q, scores, _, _ = draw(T=1)
    log_ratio = torch.randn(9, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    per_decision = reweighted_entropy(q, log_ratio, scores.entropy, scores.mask, "per_decision")
    torch.testing.assert_close(per_decision, entropy(q, scores.entropy, scores.mask))
    assert not torch.allclose(
        reweighted_entropy(q, log_ratio, scores.entropy, scores.mask, "snis"), per_decision
    )
    q, scores, _, _ = draw()
    for name in NAMES:
        found = reweighted_entropy(q, torch.zeros_like(scores.logprob), scores.entropy, scores.mask, name)
        torch.testing.assert_close(found, entropy(q, scores.entropy, scores.mask))


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name):
    q, scores, first, second = draw()

    def padded(x):
        parts = [torch.nn.functional.pad(y, (0, 3)) for y in (x.logprob, x.entropy)]
        if isinstance(x, TokenTangents):
            return TokenTangents(*parts)
        return TokenScores(*parts, torch.nn.functional.pad(x.mask, (0, 3)))

    new = moved(scores, first, second, 0.2)
    torch.testing.assert_close(
        entropy_change(q, padded(scores), padded(new), name), entropy_change(q, scores, new, name)
    )
    torch.testing.assert_close(
        first_derivative(q, padded(scores), padded(first), name), first_derivative(q, scores, first, name)
    )
