"""What a verdict promises, on policies of known tails: more data never makes it worse, and it is seldom wrong."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from probe.verdict.words import WORDS
from tests.support.tabular import FAMILIES, draw, tabular


@pytest.mark.parametrize(("kind", "rare"), FAMILIES.values(), ids=FAMILIES)
def test_the_tables_are_right(kind, rare):
    """Probabilities add up; the mean of what a sample of everything gives is the exact derivative and change."""
    space = tabular(kind, rare)
    for p in (space.probability, space.new_probability):
        assert float(p.sum()) == pytest.approx(1.0, abs=1e-12)
    H = [
        float((p * scores.sequence_entropy).sum())
        for p, scores in ((space.probability, space.old), (space.new_probability, space.new))
    ]
    assert float(space.change[0]) == pytest.approx(H[1] - H[0], abs=1e-14)
    score = (
        space.first.logprob.sum(1) * space.old.sequence_entropy + space.first.entropy.sum(1)
    ) * space.probability
    assert float(space.slope[0]) == pytest.approx(float(score.sum()), abs=1e-14)
    if kind == "branch":
        heavy = space.old.logprob[:, 0].exp().sub(rare).abs() < 1e-12
        assert float(space.probability[heavy].sum()) == pytest.approx(rare, rel=1e-9)
        share = [
            float(
                (space.probability * space.old.sequence_entropy)[rows].sum() / space.probability[rows].sum()
            )
            for rows in (heavy, ~heavy)
        ]
        assert share[0] > 7 * share[1]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rare"), FAMILIES.values(), ids=FAMILIES)
def test_more_data_never_makes_a_verdict_worse(kind, rare):
    """In distribution: for every word, the share of runs with that word or a better one does not fall as E grows."""
    space, repetitions = tabular(kind, rare), 80
    shares, missed = [], []
    for size in (64, 256, 1024):
        g = torch.Generator().manual_seed(size)
        runs = [draw(space, size, g, controls=False) for _ in range(repetitions)]
        ranks = torch.tensor([WORDS.index(run.verdict.word) for run in runs])
        shares.append([float((ranks <= k).double().mean()) for k in range(3)])
        exact = space.exact
        wrong = [
            run.verdict.word == "trustworthy" and not run.covers("per_decision", exact["per_decision"])[1]
            for run in runs
        ]
        missed.append(sum(wrong) / repetitions)
    for smaller, larger in itertools.pairwise(shares):
        for few, many in zip(smaller, larger, strict=True):
            assert many >= few - 3 * math.sqrt(0.25 / repetitions)
    # 5 % are promised; four standard errors of 80 runs on top
    assert max(missed) <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / repetitions)
